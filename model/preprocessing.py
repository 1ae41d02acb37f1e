"""From an image of any size to the square network input and back: resize, pad, and the boxes' way between both."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import cv2
import numpy as np
from jaxtyping import Float, UInt8
from numpy.typing import NDArray

from model.boxes import FloatArray


@dataclass(frozen=True)
class Letterbox:
    """Where an image of ``width`` x ``height`` original pixels lies in the network input.

    ``scale`` is input pixels per original pixel; ``left`` and ``top`` are the padding in input pixels.
    """

    scale: float
    left: int
    top: int
    width: int
    height: int

    def to_input(self, boxes_xyxy: Float[FloatArray, "*shape 4"]) -> Float[FloatArray, "*shape 4"]:
        """Boxes of the original image in input pixels."""
        mapped: FloatArray = (boxes_xyxy * self.scale + self._offset()).astype(boxes_xyxy.dtype)
        return mapped

    def to_original(self, boxes_xyxy: Float[FloatArray, "*shape 4"]) -> Float[FloatArray, "*shape 4"]:
        """Boxes of the network input in pixels of the original image, not clipped to it."""
        mapped: FloatArray = ((boxes_xyxy - self._offset()) / self.scale).astype(boxes_xyxy.dtype)
        return mapped

    def _offset(self) -> NDArray[np.float64]:
        return np.array([self.left, self.top, self.left, self.top], dtype=np.float64)


@dataclass(frozen=True)
class Preprocessing:
    """Fit an RGB image into a square of ``input_size`` pixels, aspect kept, centred on a grey border.

    The longer side becomes ``input_size - margin`` pixels (also enlarging); published COCO checkpoints use margin 4 at
    640 pixels.  Channels stay RGB; the division by 255 belongs to the network's caller or the exported graph.
    """

    input_size: int
    margin: int = 0
    pad_value: int = 114

    def __post_init__(self) -> None:
        if self.input_size < 32 or self.input_size % 32:
            raise ValueError(f"preprocessing.input_size must be a positive multiple of 32, got {self.input_size}")
        if not 0 <= self.margin < self.input_size:
            raise ValueError(f"preprocessing.margin must be from 0 to below input_size, got {self.margin}")
        if not 0 <= self.pad_value <= 255:
            raise ValueError(f"preprocessing.pad_value must be from 0 to 255, got {self.pad_value}")

    def letterbox(self, width: int, height: int) -> Letterbox:
        """Where an image of this size comes to lie; no pixels needed."""
        scale = (self.input_size - self.margin) / max(width, height)
        new_width, new_height = _scaled_size(width, height, scale)
        left, top = (self.input_size - new_width) // 2, (self.input_size - new_height) // 2
        return Letterbox(scale, left, top, width, height)

    def apply(self, image: UInt8[NDArray[np.uint8], "H W 3"]) -> tuple[UInt8[NDArray[np.uint8], "3 S S"], Letterbox]:
        """Resize (bilinear, no antialiasing) and pad; raises ValueError for anything but an RGB uint8 image."""
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or image.size == 0:
            raise ValueError(f"expected an RGB image, uint8 (height, width, 3), got {image.dtype} {image.shape}")
        height, width = image.shape[:2]
        box = self.letterbox(width, height)
        new_width, new_height = _scaled_size(width, height, box.scale)
        if (new_width, new_height) != (width, height):
            image = cv2.resize(image, (new_width, new_height), interpolation=cv2.INTER_LINEAR).astype(np.uint8)
        padded = np.full((3, self.input_size, self.input_size), self.pad_value, dtype=np.uint8)
        padded[:, box.top : box.top + new_height, box.left : box.left + new_width] = image.transpose(2, 0, 1)
        return padded, box

    def to_json(self) -> dict[str, int]:
        """The fields as a JSON-ready dictionary."""
        return asdict(self)

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Preprocessing:
        """Read what ``to_json`` wrote; raises ValueError for missing, unknown or wrongly typed fields."""
        names = {field.name for field in fields(cls)}
        if set(record) != names:
            raise ValueError(f"preprocessing must have the fields {sorted(names)}, got {sorted(record)}")
        for name, value in record.items():
            if not isinstance(value, int) or isinstance(value, bool):
                raise ValueError(f"preprocessing.{name} must be a whole number, got {value!r}")
        return cls(**record)


def _scaled_size(width: int, height: int, scale: float) -> tuple[int, int]:
    return max(1, round(width * scale)), max(1, round(height * scale))
