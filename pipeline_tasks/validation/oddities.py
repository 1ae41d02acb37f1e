"""The columns that the warning rules judge; each is null where nothing is odd."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline_tasks.data.raw import RawDataset
from pipeline_tasks.validation.class_checks import likely_misspelt, sizes_of_other_classes
from pipeline_tasks.validation.columns import by_parts, chosen_from, clip, codes_of, floats, sparse
from pipeline_tasks.validation.limits import ValidationLimits
from pipeline_tasks.validation.twins import conflicting_copies, overlapping_boxes, similar_pictures

Floats = NDArray[np.float64]

AREA_TOLERANCE = 1.05  # masks are counted in pixels, boxes in fractions of them
_MODES = {
    "L": "greyscale", "1": "black and white", "P": "coloured by a palette", "RGBA": "RGB with transparency",
    "LA": "greyscale with transparency", "PA": "coloured by a palette with transparency", "CMYK": "CMYK",
    "YCbCr": "YCbCr", "LAB": "LAB", "HSV": "HSV", "F": "of floating point numbers",
}  # fmt: skip
_SUFFIXES = {
    ".jpg": ("JPEG", "MPO"), ".jpeg": ("JPEG", "MPO"), ".png": ("PNG",), ".bmp": ("BMP",), ".webp": ("WEBP",),
    ".tif": ("TIFF",), ".tiff": ("TIFF",),
}  # fmt: skip


def with_columns(table: pa.Table, columns: dict[str, Any]) -> pa.Table:
    """The table with more columns."""
    for name, values in columns.items():
        table = table.append_column(name, values)
    return table


def odd_images(images: pa.Table, boxes: pa.Table, limits: ValidationLimits) -> pa.Table:
    """The derived image rows with the columns of `IMAGE_WARNINGS`, and `file_hint` for missing pictures."""
    modes = pc.unique(images["mode"]).to_pylist()
    described = {mode: _mode_in_words(mode) for mode in modes if mode not in (None, "RGB")}
    similar, bits = similar_pictures(images, limits.near_duplicate_bits, limits.near_duplicate_images)
    return with_columns(
        images,
        {
            "colour_mode": pa.array([described.get(mode) for mode in images["mode"].to_pylist()], pa.string()),
            "other_format": _other_format(images),
            "turned_by": _turned(images["orientation"]),
            "listed_again": _taken(images["source_record"], _earlier_of_same(images["path"])),
            "conflicting_copy": _taken(images["path"], conflicting_copies(images, boxes)),
            "similar_image": _taken(images["path"], similar),
            "similar_bits": _given(bits, similar >= 0),
        },
    )


def _mode_in_words(mode: str) -> str:
    """A Pillow mode as a user would say it; ";16" marks what Pillow cuts down to eight bits itself."""
    plain, _, bits = mode.partition(";")
    deep = "of 16 bits a channel" if bits or plain == "I" else ""
    words = _MODES.get(plain, "" if deep else f"of {plain} values")
    return " ".join(filter(None, [words, deep]))


def _other_format(images: pa.Table) -> pa.Array:
    """The format of files whose suffix tells another one."""
    pairs = zip(images["path"].to_pylist(), images["format"].to_pylist(), strict=True)
    return pa.array(
        [f if f and f not in _SUFFIXES.get(PurePosixPath(path).suffix.lower(), (f,)) else None for path, f in pairs],
        pa.string(),
    )


def _turned(orientation: pa.ChunkedArray) -> pa.ChunkedArray:
    texts = pc.binary_join_element_wise("EXIF orientation", orientation.cast(pa.string()), " ")
    return pc.if_else(pc.greater(orientation, 1), texts, pa.scalar(None, pa.string()))


def _earlier_of_same(values: pa.ChunkedArray) -> NDArray[np.int64]:
    """For each value, not null, the row that had it first, -1 for that row itself."""
    codes = pc.dictionary_encode(values).combine_chunks().indices.fill_null(-1).to_numpy(zero_copy_only=False)
    _, first, inverse = np.unique(codes, return_index=True, return_inverse=True)
    rows = np.arange(len(codes))
    found: NDArray[np.int64] = np.where((first[inverse] < rows) & (codes >= 0), first[inverse], -1)
    return found


def _taken(values: pa.Array | pa.ChunkedArray, rows: NDArray[np.int64]) -> pa.ChunkedArray:
    """The values of these rows, null for -1; most are."""
    given = np.flatnonzero(rows >= 0)
    taken = pa.concat_arrays(pa.chunked_array(values.take(pa.array(rows[given])), values.type).chunks)
    return sparse(given, taken, len(rows))


def _given(values: NDArray[Any], odd: NDArray[np.bool_]) -> pa.ChunkedArray:
    """The values of odd rows, null elsewhere."""
    return sparse(np.flatnonzero(odd), pa.array(values[odd]), len(odd))


def odd_boxes(raw: RawDataset, boxes: pa.Table, limits: ValidationLimits) -> pa.Table:
    """The derived box rows with the columns of `BOX_WARNINGS`."""
    names = pa.array(raw.metadata.class_names, pa.string())
    partner = overlapping_boxes(boxes, limits.near_identical_iou)
    category = boxes["category"].fill_null(-1).to_numpy()
    same = category[partner] == category
    sized_like, usual = sizes_of_other_classes(boxes, limits.class_size_ratio)
    crowd = np.flatnonzero(boxes["iscrowd"].fill_null(False).to_numpy())
    return with_columns(
        boxes,
        {
            "class_name": _class_names(boxes, category, names),
            "tiny_side_px": _odd(partial(_tiny, limit=limits.tiny_box_pixels), boxes),
            "whole_image_share": _odd(partial(_whole, limit=limits.whole_image_fraction), boxes),
            "repeats": _taken(boxes["annotation_id"], np.where(same, partner, -1)),
            "conflicts_with": _taken(boxes["annotation_id"], np.where(same, -1, partner)),
            "similar_class": _taken(names, _misspelt(raw, category)),
            "sized_like": _taken(names, sized_like),
            "usual_side": _given(usual, sized_like >= 0),
            "crowd_region": sparse(crowd, pa.repeat("crowd", len(crowd)), len(boxes)),
            "odd_area": _odd(_odd_area, boxes),
        },
    )


def _class_names(boxes: pa.Table, category: NDArray[np.int64], names: pa.Array) -> pa.DictionaryArray:
    """The name of each box's class; the id that the record gives where there is no such class."""
    unknown = category < 0
    if not unknown.any():
        return chosen_from(names, category)
    codes, references = codes_of(boxes["category_reference"])
    instead = np.where(codes < 0, -1, codes + len(names))
    return chosen_from(pa.concat_arrays([names, references]), np.where(unknown, instead, category))


def _misspelt(raw: RawDataset, category: NDArray[np.int64]) -> NDArray[np.int64]:
    """The class that each box's class looks like a misspelling of, -1 for none."""
    counts = np.bincount(category[category >= 0], minlength=len(raw.metadata.class_names))
    right = np.full(len(counts) + 1, -1)  # the last entry is for boxes of no known class
    for wrong, other in likely_misspelt(raw.metadata.class_names, counts.tolist()).items():
        right[wrong] = other
    found: NDArray[np.int64] = right[category]
    return found


def _odd(judge: Callable[[pa.Table], Floats], boxes: pa.Table) -> pa.ChunkedArray:
    """What `judge` finds, null where that is not a number."""
    values = by_parts(judge, boxes)
    return _given(values, ~np.isnan(values))


def _tiny(boxes: pa.Table, limit: float) -> Floats:
    """The shorter side of boxes below the limit; those without area have a rule of their own."""
    side = floats(boxes["shortest_side_px"])
    with np.errstate(invalid="ignore"):
        return np.where((side > 0) & (side < limit), side, np.nan)


def _whole(boxes: pa.Table, limit: float) -> Floats:
    """The share of the image that a box covers, where it is at least the limit."""
    x, y, w, h, width, height = (floats(boxes[name]) for name in (*"xywh", "image_width", "image_height"))
    with np.errstate(all="ignore"):
        inside = clip(x, y, w, h, width, height)
        share = inside[2] * inside[3] / (width * height)
        odd = (share >= limit) & (w > 0) & (h > 0) & ~boxes["iscrowd"].fill_null(False).to_numpy()
    return np.where(odd, share, np.nan)


def _odd_area(boxes: pa.Table) -> Floats:
    """The recorded area, where it is none or more than the box's."""
    w, h, area = (floats(boxes[name]) for name in ("w", "h", "area"))
    with np.errstate(all="ignore"):
        odd = (w > 0) & (h > 0) & np.isfinite(area) & ((area <= 0) | (area > AREA_TOLERANCE * w * h + 1))
    return np.where(odd, area, np.nan)
