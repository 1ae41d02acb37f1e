"""Width and height of a picture from its header alone."""

from __future__ import annotations

import warnings
from io import BytesIO
from pathlib import Path

from PIL import Image

from pipeline_tasks import bucket_images

FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "TIFF")
_TRANSPOSED = (5, 6, 7, 8)  # EXIF orientations that exchange width and height
_ORIENTATION = 0x0112


def upright_size(folder: Path, picture: str) -> tuple[int, int] | None:
    """(width, height) after the EXIF orientation; None where the file cannot be read, which the inspection tells.

    `picture`: path below the set's folder. One that stays in a bucket is fetched, into the local cache.
    """
    bucket = bucket_images.of_folder(folder)
    try:
        source = folder / picture if bucket is None else BytesIO(bucket.content(picture))
    except FileNotFoundError:
        return None
    try:
        with warnings.catch_warnings(), Image.open(source, formats=FORMATS) as image:
            warnings.simplefilter("ignore")
            width, height = image.size
            transposed = image.getexif().get(_ORIENTATION) in _TRANSPOSED
    except Exception:  # Pillow raises what its plug-ins raise; the inspection of pictures tells the reason
        return None
    return (height, width) if transposed else (width, height)
