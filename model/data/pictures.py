"""Pictures of a training set with their boxes, no larger than the network can use, kept in memory as far as wanted."""

from __future__ import annotations

import mmap
from collections import OrderedDict
from collections.abc import Callable
from typing import TypeAlias

import cv2
import numpy as np
from numpy.typing import NDArray

from model.data.augmentation import Sample
from model.data.image_set import ImageSet, OpenImage
from model.data.images import DENOMINATORS
from model.preprocessing import Preprocessing

OpenReduced: TypeAlias = Callable[[str, int], NDArray[np.uint8]]
"""Takes ``ImageSet.path(i)`` and one of DENOMINATORS: the picture with so many times fewer rows and columns, or whole
where its format cannot be decoded so.
"""


class ReducedPictures:
    """Pictures with their boxes, shrunk to what the network can see at scale 1; enlarging is left to the
    warp.

    The first images of the set stay in memory, as many as the budget allows. The memory is an anonymous
    shared mapping: forked workers fill and read it together; two that fill the same place write the same
    bytes. Of the others each process keeps ``kept``, for as long as they are partners of later images.

    ``open_reduced``, where given, opens pictures that stay large enough at a half, a quarter or an eighth of their
    size. Only whole fractions of both sides are taken, so that boxes stay where they are to the last digit.
    """

    def __init__(
        self,
        image_set: ImageSet,
        open_image: OpenImage,
        preprocessing: Preprocessing,
        cache_megabytes: int,
        kept: int = 0,
        open_reduced: OpenReduced | None = None,
    ) -> None:
        self.image_set = image_set
        self.preprocessing = preprocessing
        self._open_image, self._open_reduced = open_image, open_reduced
        sides = self._reduced_sizes()
        ends = np.cumsum(sides.prod(axis=1, dtype=np.int64) * 3)
        cached = int(np.searchsorted(ends, cache_megabytes * 2**20, side="right"))
        self._sizes, self._starts = sides, np.concatenate([[0], ends[:cached]])
        self._pixels = _shared_bytes(int(self._starts[-1]))
        self._filled = _shared_bytes(cached)
        self._kept, self._recent = kept, OrderedDict[int, NDArray[np.uint8]]()

    def __len__(self) -> int:
        return len(self.image_set)

    def load(self, index: int, renew: bool = True) -> Sample:
        """The picture at a position of the set, with the boxes that are targets.

        Those renewed longest ago are dropped first; so let its own turn in an epoch renew a picture, but no partner's.
        Whatever opening it raises comes out unchanged; ``ValueError`` when it has another size than recorded.
        """
        boxes_xyxy, labels, weights = self.image_set.targets(index)
        inside = self.preprocessing.input_size - self.preprocessing.margin
        scale = min(1.0, inside / max(self.image_set.size(index)))
        return Sample(self._picture(index, renew), boxes_xyxy * np.float32(scale), labels, weights)

    def _picture(self, index: int, renew: bool) -> NDArray[np.uint8]:
        if index >= len(self._filled):
            return self._recent_picture(index, renew)
        width, height = self._sizes[index]
        place = self._pixels[self._starts[index] : self._starts[index + 1]].reshape(height, width, 3)
        if not self._filled[index]:
            place[:] = self._read(index)
            self._filled[index] = 1
        return place

    def _recent_picture(self, index: int, renew: bool) -> NDArray[np.uint8]:
        picture = self._recent.get(index)
        if picture is None:
            picture = self._recent[index] = self._read(index)
        elif renew:
            self._recent.move_to_end(index)
        if len(self._recent) > self._kept:
            self._recent.popitem(last=False)
        return picture

    def _read(self, index: int) -> NDArray[np.uint8]:
        image = self._read_reduced(index)
        if image is None:
            image = self._read_whole(index)
        width, height = (int(side) for side in self._sizes[index])
        if image.shape[:2] == (height, width):
            return image
        return cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR).astype(np.uint8, copy=False)

    def _read_whole(self, index: int) -> NDArray[np.uint8]:
        image = self._open_image(self.image_set.path(index))
        width, height = self.image_set.size(index)
        if image.shape != (height, width, 3):
            raise ValueError(
                f"image {self.image_set.path(index)} is {image.shape[1]}x{image.shape[0]} pixels, "
                f"the dataset says {width}x{height}; validate the data again"
            )
        return image

    def _read_reduced(self, index: int) -> NDArray[np.uint8] | None:
        """None where that is not wanted, not possible, or gives another size than it should."""
        width, height = self.image_set.size(index)
        denominator = fitting_denominator((width, height), tuple(self._sizes[index].tolist()))
        if self._open_reduced is None or denominator == 1:
            return None
        image = self._open_reduced(self.image_set.path(index), denominator)
        return image if image.shape == (height // denominator, width // denominator, 3) else None

    def _reduced_sizes(self) -> NDArray[np.int64]:
        """(images, 2) width and height: as evaluation resizes, but never enlarged."""
        sizes = self.image_set.sizes
        inside = self.preprocessing.input_size - self.preprocessing.margin
        scale = np.minimum(1.0, inside / sizes.max(axis=1, keepdims=True))
        reduced: NDArray[np.int64] = np.maximum(1, np.rint(sizes * scale)).astype(np.int64)
        return reduced


def fitting_denominator(size: tuple[int, int], wanted: tuple[int, ...]) -> int:
    """The largest of DENOMINATORS that leaves at least ``wanted`` of a (width, height) and divides both, else 1."""
    for denominator in sorted(DENOMINATORS, reverse=True):
        if all(
            side % denominator == 0 and side // denominator >= least for side, least in zip(size, wanted, strict=True)
        ):
            return denominator
    return 1


def _shared_bytes(count: int) -> NDArray[np.uint8]:
    """Zeros that stay shared with processes forked later; pages take memory only once written."""
    return np.frombuffer(mmap.mmap(-1, max(1, count)), np.uint8, count)
