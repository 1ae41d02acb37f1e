"""Pictures as RGB uint8 arrays."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

DENOMINATORS = (2, 4, 8)
"""By how much a JPEG can be reduced while it is decoded."""

_JPEG_BEGINS = b"\xff\xd8"
_FLAGS = {  # OpenCV names no flag for reduced pictures in RGB: it is the grey one with the colour one
    1: cv2.IMREAD_COLOR_RGB,
    2: cv2.IMREAD_REDUCED_GRAYSCALE_2 | cv2.IMREAD_COLOR_RGB,
    4: cv2.IMREAD_REDUCED_GRAYSCALE_4 | cv2.IMREAD_COLOR_RGB,
    8: cv2.IMREAD_REDUCED_GRAYSCALE_8 | cv2.IMREAD_COLOR_RGB,
}

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"})


def read_image(path: Path, denominator: int = 1) -> NDArray[np.uint8]:
    """The picture in a file as RGB uint8, (height, width, 3); ``denominator`` as ``decode_image`` takes it.

    Raises ``ValueError`` naming the file when it is absent, truncated or no picture.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ValueError(f"image {path} cannot be opened: {error.strerror}") from error
    return decode_image(content, str(path), denominator)


def decode_image(content: bytes, name: str, denominator: int = 1) -> NDArray[np.uint8]:
    """The picture in these bytes as RGB uint8, (height, width, 3); greyscale is spread over three channels.

    It is turned upright where its EXIF data say so, as viewers and annotation tools show it; an annotation file that
    records the size of the pixels as stored is noticed by the validation. OpenCV decodes from memory, because there it
    refuses truncated files, while from a file it would fill up the rest with grey. Raises ``ValueError`` with ``name``
    in it.

    A ``denominator`` of 2, 4 or 8 gives a JPEG with so many times fewer rows and columns, rounded up: the decoder
    leaves out the frequencies that they cannot show, which takes less time. Other formats come whole.
    """
    flags = _FLAGS[denominator if content.startswith(_JPEG_BEGINS) else 1]
    try:
        image = cv2.imdecode(np.frombuffer(content, np.uint8), flags) if content else None
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
