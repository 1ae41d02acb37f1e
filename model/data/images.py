"""Pictures as RGB uint8 arrays."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"})


def read_image(path: Path) -> NDArray[np.uint8]:
    """The picture in a file as RGB uint8, (height, width, 3).

    Raises ``ValueError`` naming the file when it is absent, truncated or no picture.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ValueError(f"image {path} cannot be opened: {error.strerror}") from error
    return decode_image(content, str(path))


def decode_image(content: bytes, name: str) -> NDArray[np.uint8]:
    """The picture in these bytes as RGB uint8, (height, width, 3); greyscale is spread over three channels.

    It is turned upright where its EXIF data say so, as viewers and annotation tools show it; an annotation file that
    records the size of the pixels as stored is noticed by the validation. OpenCV decodes from memory, because there it
    refuses truncated files, while from a file it would fill up the rest with grey. Raises ``ValueError`` with ``name``
    in it.
    """
    try:
        image = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR_RGB) if content else None
    except cv2.error as error:
        raise ValueError(f"image {name} cannot be decoded: {error.err}") from error
    if image is None:
        raise ValueError(f"image {name} cannot be decoded: it is empty, truncated or no picture; replace or remove it")
    return image.astype(np.uint8, copy=False)


def write_image(path: Path, image: NDArray[np.uint8]) -> None:
    """Write an RGB uint8 picture; the suffix names the format. ``ValueError`` when OpenCV cannot write it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        written = cv2.imwrite(str(path), cv2.cvtColor(image, cv2.COLOR_RGB2BGR))
    except cv2.error as error:
        raise ValueError(f"cannot write {path}: {error.err}; use one of {sorted(IMAGE_SUFFIXES)}") from error
    if not written:
        raise ValueError(f"cannot write {path}: the folder is not writable or the disk is full")
