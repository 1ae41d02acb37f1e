"""Reading every picture once: is it there, can it be decoded to the end, how large is it, what are its digests."""

from __future__ import annotations

import hashlib
import io
import os
import struct
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path

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
    }
)
_FileFacts = tuple[bool | None, bool | None, str | None, int | None, int | None, str | None, int | None]


def inspect_images(folder: Path, paths: Sequence[str | None], threads: int = 0) -> pa.Table:
    """One row of `FILES_SCHEMA` for each path below `folder`, in their order; `threads` 0 takes every core.

    A file is decoded to its last row, by Pillow, which refuses truncated data; OpenCV before version 5 fills the
    missing part of a JPEG with grey and says nothing. Damage in the middle that still decodes is not noticed.
    """
    groups = [paths[start : start + FILES_PER_TASK] for start in range(0, len(paths), FILES_PER_TASK)]
    with ThreadPoolExecutor(threads or os.cpu_count() or 1) as executor, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # odd EXIF data and large pictures; what matters comes as an error
        inspected = executor.map(lambda group: [_inspect(folder, path) for path in group], groups)
        rows = list(chain.from_iterable(inspected))
    columns = zip(*rows, strict=True) if rows else [() for _ in FILES_SCHEMA]
    return pa.table([pa.array(c, f.type) for c, f in zip(columns, FILES_SCHEMA, strict=True)], schema=FILES_SCHEMA)


def _inspect(folder: Path, path: str | None) -> _FileFacts:
    if path is None:
        return None, None, None, None, None, None, None
    try:
        content = Path(folder, path).read_bytes()
    except OSError as error:
        missing = isinstance(error, FileNotFoundError | NotADirectoryError)
        return not missing, None if missing else False, error.strerror, None, None, None, None
    digest = hashlib.sha256(content).hexdigest()
    try:
        height, width, perceptual = _decoded(content)
    except _DECODE_ERRORS as error:
        return True, False, str(error) or type(error).__name__, None, None, digest, None
    return True, True, None, width, height, digest, perceptual


def _decoded(content: bytes) -> tuple[int, int, int]:
    """Height, width and hash of a picture as the training loader will see it; raises where it is not whole."""
    if not content:
        raise ValueError("the file is empty")
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            image.load()
            checked_twice = image.format not in ("JPEG", "MPO")  # MPO: a JPEG with more pictures behind it
            grey = None if checked_twice else np.asarray(ImageOps.exif_transpose(image).convert("L"))
    except UnidentifiedImageError:
        raise ValueError(f"not a picture in one of the formats {', '.join(FORMATS)}") from None
    # OpenCV reads fewer variants of the other formats, and not all of them upright.
    pixels = decode_image(content, "the file") if grey is None else grey
    return pixels.shape[0], pixels.shape[1], perceptual_hash(pixels)
