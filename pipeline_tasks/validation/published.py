"""The rows that passed, in the form of the dataset contract (`model.data.tables`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from model.data.tables import BOXES_SCHEMA, IMAGES_SCHEMA, DatasetMetadata
from pipeline_tasks.data.coco import licence_counts
from pipeline_tasks.data.raw import RawDataset
from pipeline_tasks.validation.columns import ROWS_PER_PART, clip, floats, parts, split_counts
from pipeline_tasks.validation.judgement import JudgedSet

_USED_COLUMNS = [
    "image_id", "category", "annotation_id", "source_record", *"xywh", "area", "iscrowd", "image_width", "image_height",
    "overhang_px",
]  # fmt: skip


@dataclass(frozen=True)
class Published:
    """What `write_dataset` gets for one role."""

    images: pa.Table
    boxes: pa.Table
    metadata: DatasetMetadata
    clipped_boxes: int


def publishable(judged: JudgedSet) -> Published:
    """The good images, and the good boxes of good images clipped to their image."""
    images = _images(judged)
    boxes, clipped = _boxes(judged)
    return Published(images, boxes, _metadata(judged.raw, images), clipped)


def _images(judged: JudgedSet) -> pa.Table:
    """Sizes that were not recorded are those of the pictures."""
    table = judged.images.rows.filter(pa.array(judged.images.good))
    same = ("image_id", "original_id", "path", "split", "sha256", "perceptual_hash", "licence")
    columns = {name: table[name] for name in same}
    columns["root"] = pa.array(np.zeros(len(table), np.int32))
    columns["width"] = pc.coalesce(table["width"], table["real_width"])
    columns["height"] = pc.coalesce(table["height"], table["real_height"])
    return pa.table({name: columns[name] for name in IMAGES_SCHEMA.names}).cast(IMAGES_SCHEMA)


def _boxes(judged: JudgedSet) -> tuple[pa.Table, int]:
    """The boxes, and how many of them were clipped."""
    owners = judged.boxes.rows["image_id"].fill_null(0).to_numpy()
    kept = judged.boxes.good & judged.images.good[owners]
    table = judged.boxes.rows.select(_USED_COLUMNS)
    table = table if kept.all() else table.filter(pa.array(kept))
    rows = min(len(table), ROWS_PER_PART)
    same = {"score": pa.repeat(pa.scalar(1.0, pa.float32()), rows), "source": pa.repeat("label", rows)}
    boxes = pa.concat_tables(_clipped(part, same) for part in parts(table))
    return boxes, int(pc.sum(pc.greater(table["overhang_px"], 0)).as_py() or 0)


def _clipped(table: pa.Table, same: Mapping[str, pa.Array]) -> pa.Table:
    """These rows in their published form; columns in which nothing changes are shared, they take gigabytes.

    `same`: columns that have one value, for at least as many rows.
    """
    before = [floats(table[name]) for name in (*"xywh", "image_width", "image_height")]
    after = clip(*before)
    columns = {name: table[name] for name in ("image_id", "category", "annotation_id", "source_record", *"xywh")}
    for name, old, new in zip("xywh", before, after, strict=False):
        if (old != new).any():
            columns[name] = pa.array(new)
    area = table["area"]
    columns["area"] = pc.coalesce(area, pa.array(after[2] * after[3])) if area.null_count else area
    columns["iscrowd"] = table["iscrowd"]
    columns |= {name: values.slice(0, len(table)) for name, values in same.items()}
    return pa.table({name: columns[name] for name in BOXES_SCHEMA.names}).cast(BOXES_SCHEMA)


def _metadata(raw: RawDataset, images: pa.Table) -> DatasetMetadata:
    """The reader's metadata with the licences of what is published and the images lost from each split."""
    before, after = split_counts(raw.images), split_counts(images)
    lost = {split: count - after.get(split, 0) for split, count in before.items()}
    lost = {split: count for split, count in lost.items() if count}
    licences = {**raw.metadata.licences, "images": licence_counts(images["licence"])}
    return replace(raw.metadata, licences=licences, quarantined=lost)
