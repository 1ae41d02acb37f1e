"""From raw tables to derived tables, which have a column for everything that a rule judges."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline_tasks.data.raw import RawDataset
from pipeline_tasks.validation.columns import chosen_from, clip, floats, parts
from pipeline_tasks.validation.hints import missing_hints

Floats = NDArray[np.float64]

_SPLIT_RANK = {"train": 1, "val": 2, "test": 3}
"""A picture in several splits stays in the highest: what measures stays whole, training loses a copy."""


def derive_images(raw: RawDataset, files: pa.Table, target_test: pa.Table | None) -> pa.Table:
    """The raw image rows with what is in the files (`FILES_SCHEMA`) and the columns that the rules judge.

    `target_test`: columns sha256 and path of the target's test images, None for the target itself.
    """
    table = raw.images
    for name in files.column_names:
        table = table.append_column(name, files[name])
    columns = {
        "record_key": _record_key(table, "original_id"),
        "size_difference_px": _size_difference(table),
        "also_in_split": _kept_in_split(table),
        "file_hint": missing_hints(raw, table["file_present"]),
        "size_hint": _size_hint(table),
    }
    if target_test is not None:
        rows = pc.index_in(table["sha256"], value_set=target_test["sha256"].combine_chunks(), skip_nulls=True)
        columns["target_test_image"] = target_test["path"].combine_chunks().take(rows.combine_chunks())
    for name, values in columns.items():
        table = table.append_column(name, values)
    return table


def derive_boxes(raw: RawDataset, images: pa.Table, tolerance_pixels: float) -> pa.Table:
    """The raw box rows with the columns that the rules judge; `images` are the derived image rows."""
    sizes = {name: floats(images[name]) for name in ("width", "height")}
    paths = images["path"].combine_chunks()
    derived = pa.concat_tables(_derive_part(part, sizes, paths, tolerance_pixels) for part in parts(raw.boxes))
    return derived.append_column("record_key", _record_key(raw.boxes, "annotation_id"))


def _derive_part(boxes: pa.Table, sizes: Mapping[str, Floats], paths: pa.Array, tolerance_pixels: float) -> pa.Table:
    """What `derive_boxes` finds row by row; `sizes` and `paths` are those of the images, whose ids are row numbers."""
    owners = boxes["image_id"].fill_null(-1).to_numpy()
    width, height = (np.append(sizes[name], np.nan)[owners] for name in ("width", "height"))
    x, y, w, h = (floats(boxes[name]) for name in "xywh")
    with np.errstate(all="ignore"):  # not-a-number and infinity are judged by box_numbers_finite
        overhang = np.maximum(np.maximum(-x, -y), np.maximum(x + w - width, y + h - height))
        overhang = np.maximum(overhang, 0.0)
        clipped = clip(x, y, w, h, width, height)
        shortest = np.minimum(w, h)
        inside = np.fmin(shortest, np.minimum(*clipped[2:]))
        shortest = np.where(overhang <= tolerance_pixels, inside, shortest)
    finite = np.isfinite(x) & np.isfinite(y) & np.isfinite(w) & np.isfinite(h)
    finite &= np.isfinite(floats(boxes["area"])) | boxes["area"].is_null().to_numpy()
    complete = boxes["x"].is_valid()
    columns: dict[str, Any] = {
        "image_known": _where(boxes["image_reference"].is_valid(), boxes["image_id"].is_valid()),
        "category_known": _where(boxes["category_reference"].is_valid(), boxes["category"].is_valid()),
        "finite": _where(complete, finite),
        "shortest_side_px": pa.array(shortest, mask=~(finite & np.isfinite(shortest))),
        "overhang_px": pa.array(overhang, mask=~(finite & np.isfinite(overhang))),
        "image_width": _whole_numbers(width),
        "image_height": _whole_numbers(height),
        "image_path": chosen_from(paths, owners),
    }
    for name, values in columns.items():
        boxes = boxes.append_column(name, values)
    return boxes


def _whole_numbers(values: Floats) -> pa.Array:
    """Not a number becomes null."""
    unknown = np.isnan(values)
    return pa.array(np.where(unknown, 0, values).astype(np.int32), mask=unknown)


def _record_key(table: pa.Table, identifier: str) -> pa.ChunkedArray | pa.Array:
    """What is unique in a clean set: another annotation file may use an id again, the same one not.

    It is the id with its split, as text; where the ids are numbers and all different, it is these, which are compared
    in a moment.
    """
    numbers = _different_numbers(table[identifier])
    if numbers is not None:
        return numbers
    return pc.binary_join_element_wise(table["split"], table[identifier], " ")


def _different_numbers(texts: pa.ChunkedArray) -> pa.ChunkedArray | None:
    """The whole numbers that these texts are; None if one is none, is written in another way, or is there twice."""
    try:
        numbers = texts.cast(pa.int64())
    except pa.ArrowInvalid:
        return None
    if texts.null_count or not pc.all(pc.equal(numbers.cast(pa.string()), texts), min_count=0).as_py():
        return None
    values = numbers.to_numpy()
    rising = bool((np.diff(values) > 0).all())
    return numbers if rising or (np.diff(np.sort(values)) > 0).all() else None


def _size_difference(table: pa.Table) -> pa.ChunkedArray:
    wide = pc.abs(pc.subtract(table["width"], table["real_width"]))
    high = pc.abs(pc.subtract(table["height"], table["real_height"]))
    return pc.max_element_wise(wide, high, skip_nulls=False)


def _size_hint(table: pa.Table) -> pa.ChunkedArray:
    """Text after a wrong size: whether it is that of the file before it is turned upright."""
    stored = pc.and_(pc.equal(table["width"], table["real_height"]), pc.equal(table["height"], table["real_width"]))
    turned = pc.fill_null(pc.and_(stored, pc.greater(table["orientation"], 4)), False)
    hint = "; the record is of the picture before its EXIF orientation turns it, and so are its boxes"
    return pc.if_else(turned, hint, "")


def _kept_in_split(table: pa.Table) -> pa.Array:
    """For a picture that is in a higher split too, the name of that split; null for all others."""
    codes = pc.dictionary_encode(table["sha256"]).combine_chunks().indices.fill_null(-1)
    content = codes.to_numpy(zero_copy_only=False)
    names = [*_SPLIT_RANK, None]
    ranks = pc.index_in(table["split"], value_set=pa.array(list(_SPLIT_RANK))).fill_null(-1).to_numpy()
    highest = np.full(int(content.max(initial=-1)) + 2, -1)  # the last entry is for files without digest
    np.maximum.at(highest, content, ranks)
    highest[-1] = -1
    kept_in = np.where(highest[content] > ranks, highest[content], len(names) - 1)
    return pa.array(names, pa.string()).take(pa.array(kept_in))


def _where(judged: pa.ChunkedArray, value: Any) -> pa.ChunkedArray:
    """`value` on the judged rows, null on the others."""
    return pc.if_else(judged, pa.array(value) if isinstance(value, np.ndarray) else value, None)
