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
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from model.data.images import decode_image
from model.data.near_duplicates import perceptual_hash
from pipeline_tasks import bucket_images

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


def look_for_images(folder: Path, paths: pa.ChunkedArray) -> pa.Table:
    """One row of `FILES_SCHEMA` for each path, without opening any file: only whether they exist is known."""
    bucket = bucket_images.of_folder(folder)
    exists = os.path.isfile if bucket is None else lambda path: bucket.size(path) is not None
    prefix = "" if bucket is not None else f"{folder}{os.sep}"
    present = [None if path is None else exists(prefix + path) for path in paths.to_pylist()]
    columns = {field.name: pa.nulls(len(paths), field.type) for field in FILES_SCHEMA}
    return pa.table({**columns, "file_present": pa.array(present, pa.bool_())}, schema=FILES_SCHEMA)


def inspect_images(
    folder: Path, paths: Sequence[str | None], threads: int = 0, limit: SizeLimit | None = None
) -> pa.Table:
    """One row of `FILES_SCHEMA` for each path below `folder`, in their order; `threads` 0 takes every core.

    A file is decoded to its last row, by Pillow, which refuses truncated data; OpenCV before version 5 fills the
    missing part of a JPEG with grey and says nothing. Damage in the middle that still decodes is not noticed.
    What is larger than `limit` is not decoded, and counts as not decodable.
    """
    size_limit = limit or SizeLimit()
    usual = (os.cpu_count() or 1) if bucket_images.of_folder(folder) is None else bucket_images.FETCHED_AT_ONCE
    groups = [paths[start : start + FILES_PER_TASK] for start in range(0, len(paths), FILES_PER_TASK)]
    with (
        ThreadPoolExecutor(threads or usual) as executor,
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
        content = _read(folder, path, limit)
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


def _read(folder: Path, path: str, limit: SizeLimit) -> bytes:
    """The bytes of a regular file, or of a picture in the set's bucket; a pipe or a device would be read for ever."""
    if (bucket := bucket_images.of_folder(folder)) is not None:
        _check_size(bucket.size(path) or 0, limit)
        return bucket.content(path)
    file = Path(folder, path)
    status = file.stat()
    if not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):  # reading a folder tells what it is
        raise ValueError("it is no regular file")
    _check_size(status.st_size, limit)
    return file.read_bytes()


def _check_size(size: int, limit: SizeLimit) -> None:
    if size > limit.megabytes * 1e6:
        allowed = f"{limit.megabytes:g} of validate_data.maximum_image_megabytes"
        raise ValueError(f"it has {size / 1e6:.1f} MB, more than the {allowed}")


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
            grey = None if checked_twice else _upright_grey(image, orientation)
    except UnidentifiedImageError:
        raise ValueError(f"not a picture in one of the formats {', '.join(FORMATS)}") from None
    # OpenCV reads fewer variants of the other formats, and not all of them upright.
    pixels = decode_image(content, "the file") if grey is None else grey
    turned = orientation if isinstance(orientation, int) else None
    return _Decoded(pixels.shape[0], pixels.shape[1], perceptual_hash(pixels), kind, mode, turned)


def _upright_grey(image: Image.Image, orientation: object) -> NDArray[np.uint8]:
    """The picture's grey values; it is turned after that, and only where it has to be, since each copies all of it."""
    grey = image.convert("L")
    return np.asarray(grey if orientation in (None, 1) else ImageOps.exif_transpose(grey))
