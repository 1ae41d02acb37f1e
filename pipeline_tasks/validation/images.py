"""Reading every picture once: is it there, can it be decoded to the end, how large is it, what are its digests."""

from __future__ import annotations

import hashlib
import io
import os
import stat
import struct
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image, ImageOps, UnidentifiedImageError

from model.data.images import decode_image
from model.data.near_duplicates import perceptual_hash

FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "TIFF")
FILES_PER_TASK = 32
_DECODE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    struct.error,
    Image.DecompressionBombError,
)

FILES_SCHEMA = pa.schema(
    {
        "file_present": pa.bool_(),  # null: the record names no usable file
        "decodable": pa.bool_(),  # null: the file is missing
        "decode_error": pa.string(),
        "real_width": pa.int32(),  # pixels, upright after the EXIF orientation
        "real_height": pa.int32(),
        "sha256": pa.string(),  # of the file's bytes
        "perceptual_hash": pa.uint64(),  # of the upright picture
        "format": pa.string(),  # by the file's content: JPEG, PNG, …
        "mode": pa.string(),  # Pillow's name of the pixels' type: RGB, L, CMYK, I;16, …
        "orientation": pa.int32(),  # EXIF: 1 is upright; null: not told
    }
)
_ORIENTATION = 0x0112


@dataclass(frozen=True)
class SizeLimit:
    """What a picture may take: a few bytes can unpack to gigabytes."""

    megapixels: float = 178.0
    megabytes: float = 512.0


@dataclass(frozen=True)
class _Decoded:
    """A picture as the training loader will see it."""

    real_height: int
    real_width: int
    perceptual_hash: int
    format: str
    mode: str
    orientation: int | None


def inspect_images(
    folder: Path, paths: Sequence[str | None], threads: int = 0, limit: SizeLimit | None = None
) -> pa.Table:
    """One row of `FILES_SCHEMA` for each path below `folder`, in their order; `threads` 0 takes every core.

    A file is decoded to its last row, by Pillow, which refuses truncated data; OpenCV before version 5 fills the
    missing part of a JPEG with grey and says nothing. Damage in the middle that still decodes is not noticed.
    What is larger than `limit` is not decoded, and counts as not decodable.
    """
    size_limit = limit or SizeLimit()
    groups = [paths[start : start + FILES_PER_TASK] for start in range(0, len(paths), FILES_PER_TASK)]
    with (
        ThreadPoolExecutor(threads or os.cpu_count() or 1) as executor,
        warnings.catch_warnings(),
        _own_limit_of_pixels(),
    ):
        warnings.simplefilter("ignore")  # odd EXIF data and large pictures; what matters comes as an error
        inspected = executor.map(lambda group: [_inspect(folder, path, size_limit) for path in group], groups)
        rows = list(chain.from_iterable(inspected))
    return pa.Table.from_pylist(rows, schema=FILES_SCHEMA)


@contextmanager
def _own_limit_of_pixels() -> Iterator[None]:
    """Pillow's limit of pixels is out of the way, since `SizeLimit` is looked at before anything is decoded."""
    before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = before


def _inspect(folder: Path, path: str | None, limit: SizeLimit) -> dict[str, Any]:
    """The fields of `FILES_SCHEMA` that are known."""
    if path is None:
        return {}
    try:
        content = _read(Path(folder, path), limit)
    except ValueError as error:
        return {"file_present": True, "decodable": False, "decode_error": str(error)}
    except OSError as error:
        missing = isinstance(error, FileNotFoundError | NotADirectoryError)
        readable = None if missing else False
        return {"file_present": not missing, "decodable": readable, "decode_error": error.strerror}
    known = {"file_present": True, "sha256": hashlib.sha256(content).hexdigest()}
    try:
        return {**known, "decodable": True, **vars(_decoded(content, limit))}
    except _DECODE_ERRORS as error:
        return {**known, "decodable": False, "decode_error": str(error) or type(error).__name__}


def _read(file: Path, limit: SizeLimit) -> bytes:
    """The bytes of a regular file; a pipe or a device would be read for ever."""
    status = file.stat()
    if not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):  # reading a folder tells what it is
        raise ValueError("it is no regular file")
    if status.st_size > limit.megabytes * 1e6:
        allowed = f"{limit.megabytes:g} of validate_data.maximum_image_megabytes"
        raise ValueError(f"it has {status.st_size / 1e6:.1f} MB, more than the {allowed}")
    return file.read_bytes()


def _decoded(content: bytes, limit: SizeLimit) -> _Decoded:
    """The picture in these bytes; raises where it is not whole."""
    if not content:
        raise ValueError("the file is empty")
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            megapixels = image.width * image.height / 1e6
            if megapixels > limit.megapixels:
                allowed = f"{limit.megapixels:g} of validate_data.maximum_image_megapixels"
                raise ValueError(f"it has {megapixels:.1f} megapixels, more than the {allowed}")
            kind, mode = str(image.format), image.mode + (";16" if ";16" in str(image.tile) else "")
            image.load()
            orientation = image.getexif().get(_ORIENTATION)
            checked_twice = image.format not in ("JPEG", "MPO")  # MPO: a JPEG with more pictures behind it
            grey = None if checked_twice else np.asarray(ImageOps.exif_transpose(image).convert("L"))
    except UnidentifiedImageError:
        raise ValueError(f"not a picture in one of the formats {', '.join(FORMATS)}") from None
    # OpenCV reads fewer variants of the other formats, and not all of them upright.
    pixels = decode_image(content, "the file") if grey is None else grey
    turned = orientation if isinstance(orientation, int) else None
    return _Decoded(pixels.shape[0], pixels.shape[1], perceptual_hash(pixels), kind, mode, turned)
