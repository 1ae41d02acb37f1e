"""Repairs of what has one possible meaning, into a copy; everything else stays as it is for a person to decide."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline_tasks.data.raw import RAW_BOXES_SCHEMA, RAW_IMAGES_SCHEMA
from pipeline_tasks.data.writers import WRITABLE, Written, write_folder
from pipeline_tasks.validation.columns import clip, floats
from pipeline_tasks.validation.folder import FolderReport
from pipeline_tasks.validation.judgement import JudgedTable

REPAIRS_FILE = "repairs.jsonl"
_SUFFIX = {"JPEG": ".jpg", "MPO": ".jpg", "PNG": ".png", "BMP": ".bmp", "WEBP": ".webp", "TIFF": ".tiff"}
_DONE_BY_THE_COPY = ("file_name_matches", "coco_keys", "label_file_present", "class_names_given")
"""Findings on files that are gone in any copy, since it is written anew."""
_UNUSABLE_IMAGE = ("image_record", "image_file_present")
_UNUSABLE_BOX = ("box_record", "box_image_known", "box_category_known")

Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Repair:
    """One change of the copy against the original."""

    rule: str
    record: str
    change: str


def write_repaired(report: FolderReport, target: Path, tolerance_pixels: float) -> tuple[Written, list[Repair]]:
    """Write a repaired copy of the folder to `target`, with repairs.jsonl that tells every change.

    The copy has the format of the original where it can be written, else COCO's. Raises `UsageError` when `target`
    exists.
    """
    repairs: list[Repair] = []
    images = _repaired_images(report.judged.images, report.judged.boxes, repairs)
    boxes = _repaired_boxes(report.judged.boxes, tolerance_pixels, repairs)
    for rule in _DONE_BY_THE_COPY:
        repairs += _of_files(report.judged.files, rule)
    raw = replace(report.judged.raw, images=images, boxes=boxes)
    lines = "".join(json.dumps(asdict(repair), ensure_ascii=False) + "\n" for repair in repairs)
    own = report.reader.recognised.format
    chosen = own if own in WRITABLE else "coco"
    return write_folder(raw, report.reader.folder, target, chosen, {REPAIRS_FILE: lines}), repairs


def _of_files(files: JudgedTable, rule: str) -> Iterable[Repair]:
    rows = files.rows.filter(pc.is_valid(files.rows[rule])).to_pylist()
    return [Repair(rule, row["source_record"], f"{row['note']}; the copy has it right") for row in rows]


def _record(table: pa.Table, rows: Mask, rule: str, change: Callable[[dict[str, Any]], str]) -> list[Repair]:
    return [Repair(rule, row["source_record"], change(row)) for row in table.filter(pa.array(rows)).to_pylist()]


def _repaired_images(images: JudgedTable, boxes: JudgedTable, repairs: list[Repair]) -> pa.Table:
    table, bad = images.rows, images.bad
    wrong = bad["image_size"] & _boxes_fit(images, boxes)
    repairs += _record(
        table, wrong, "image_size",
        lambda row: f"size {row['width']}x{row['height']} corrected to {row['real_width']}x{row['real_height']}",
    )  # fmt: skip
    misnamed = bad.get("image_suffix", np.zeros(len(table), np.bool_))
    names = [_right_name(row) if odd else None for row, odd in zip(table.to_pylist(), misnamed, strict=True)]
    known = set(table["path"].to_pylist())
    names = [None if name in known else name for name in names]
    renamed = np.array([name is not None for name in names], np.bool_)
    repairs += _record(table, renamed, "image_suffix", lambda row: f"the copy is named {_right_name(row)}")
    left_out = np.logical_or.reduce([bad[rule] for rule in _UNUSABLE_IMAGE])
    left_out |= bad["image_decodable"] & ~table["width"].is_valid().to_numpy()  # of no known size
    repairs += _record(table, left_out, "image_file_present", lambda row: "left out of the copy with its boxes")
    mask = pa.array(wrong)
    columns = {name: table[name] for name in RAW_IMAGES_SCHEMA.names}
    for side in ("width", "height"):
        columns[side] = pc.if_else(mask, table[f"real_{side}"], table[side])
    columns["name"] = pc.coalesce(pa.array(names, pa.string()), table["path"])
    return pa.table(columns).filter(pa.array(~left_out))


def _right_name(row: dict[str, Any]) -> str:
    return str(PurePosixPath(row["path"]).with_suffix(_SUFFIX[row["format"]]))


def _boxes_fit(images: JudgedTable, boxes: JudgedTable) -> Mask:
    """Images whose boxes lie inside the picture as it is, and which are not merely turned."""
    table = boxes.rows
    owners = table["image_id"].combine_chunks()
    x, y, w, h = (floats(table[name]) for name in "xywh")
    sides = [floats(images.rows[f"real_{side}"], owners) for side in ("width", "height")]
    with np.errstate(invalid="ignore"):
        outside = ~((x >= 0) & (y >= 0) & (x + w <= sides[0]) & (y + h <= sides[1]))
    fit = np.ones(len(images.rows), np.bool_)
    rows = owners.fill_null(-1).to_numpy(zero_copy_only=False)
    fit[rows[outside & (rows >= 0)]] = False
    turned = pc.equal(images.rows["width"], images.rows["real_height"]).fill_null(False).to_numpy()
    return np.asarray(fit & ~turned, np.bool_)


def _repaired_boxes(boxes: JudgedTable, tolerance_pixels: float, repairs: list[Repair]) -> pa.Table:
    table = boxes.rows
    empty = _without_extent(table)
    repairs += _record(table, empty, "box_positive_area", lambda row: f"removed: {row['w']:g} x {row['h']:g} pixels")
    repeated = _exact_copies(table) & ~empty
    repairs += _record(table, repeated, "box_not_repeated", lambda row: "removed: the same box of the same class again")
    removed = empty | repeated
    left_out = np.logical_or.reduce([boxes.bad[rule] for rule in _UNUSABLE_BOX]) & ~removed
    repairs += _record(table, left_out, "box_record", lambda row: "left out of the copy: it cannot be understood")
    sizes = [floats(table[name]) for name in (*"xywh", "image_width", "image_height")]
    with np.errstate(invalid="ignore"):
        overhang = floats(table["overhang_px"])
        over = (overhang > 0) & (overhang <= tolerance_pixels) & ~removed & ~left_out
        clipped = clip(*sizes)
    repairs += _record(table, over, "box_inside_image", lambda row: f"clipped, {row['overhang_px']:g} pixels were over")
    columns = {name: table[name] for name in RAW_BOXES_SCHEMA.names}
    for name, values in zip("xywh", clipped, strict=True):
        columns[name] = pc.if_else(pa.array(over), pa.array(values), table[name])
    columns["annotation_id"] = _renumbered(boxes, repairs)
    return pa.table(columns, schema=RAW_BOXES_SCHEMA).filter(pa.array(~(removed | left_out)))


def _without_extent(table: pa.Table) -> Mask:
    """Boxes of no width or no height: there is nothing in them. Negative numbers may be exchanged corners."""
    w, h = floats(table["w"]), floats(table["h"])
    with np.errstate(invalid="ignore"):
        return np.asarray(((w == 0) & (h >= 0)) | ((h == 0) & (w >= 0)), np.bool_)


def _exact_copies(table: pa.Table) -> Mask:
    """Boxes with the numbers, class and image of an earlier one."""
    names = ("image_id", "category", *"xywh", "iscrowd")
    keys = pc.binary_join_element_wise(*(table[name].cast(pa.string()) for name in names), " ")
    codes = pc.dictionary_encode(keys).combine_chunks().indices.fill_null(-1).to_numpy(zero_copy_only=False)
    first = np.zeros(len(codes), np.bool_)
    first[np.unique(codes, return_index=True)[1]] = True
    return np.asarray(~first & (codes >= 0), np.bool_)


def _renumbered(boxes: JudgedTable, repairs: list[Repair]) -> pa.Array:
    """Ids of which each occurs once in the set: the first box keeps it, later ones get new numbers."""
    table, identifiers = boxes.rows, boxes.rows["annotation_id"].to_pylist()
    numbers = [int(text) for text in identifiers if text and text.isascii() and text.isdecimal() and len(text) < 19]
    following, seen = max(numbers, default=0) + 1, set()
    again = boxes.bad["annotation_id_unique"]
    changed = np.zeros(len(table), np.bool_)
    for row in np.flatnonzero(again).tolist():
        key = (table["split"][row].as_py(), identifiers[row])
        if key in seen:
            identifiers[row], changed[row] = str(following), True
            following += 1
        seen.add(key)
    repairs += _record(table, changed, "annotation_id_unique", lambda row: "the later box got an id of its own")
    return pa.array(identifiers, pa.string())
