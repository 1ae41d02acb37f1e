"""What a reader of a foreign format returns: every record as a row, with a `fault` where it is malformed."""

from __future__ import annotations

from dataclasses import dataclass, field

import pyarrow as pa
import pyarrow.compute as pc

from model.data.tables import DatasetMetadata

SPLITS = ("train", "val", "test")
UNLABELED_SPLIT = "unlabeled"
UNSPLIT = "unsplit"
"""The split of images in a folder that knows none; such a set can be looked at, but not trained on."""

RAW_IMAGES_SCHEMA = pa.schema(
    {
        "image_id": pa.int64(),  # row number in the whole dataset; ids of several files may collide
        "original_id": pa.string(),  # null: missing or no usable id
        "path": pa.string(),  # below the dataset folder; null: no usable file name
        "width": pa.int32(),  # as recorded; null: not recorded
        "height": pa.int32(),
        "split": pa.string(),
        "licence": pa.string(),  # null: unknown
        "source_record": pa.string(),  # FILE#/images/3 (JSON pointer) or FILE#line=7
        "fault": pa.string(),  # what is malformed in the record; null: nothing
    }
)
RAW_BOXES_SCHEMA = pa.schema(
    {
        "image_id": pa.int64(),  # null: no such image in the same file
        "image_reference": pa.string(),  # the image id that the annotation names
        "category": pa.int32(),  # null: no such category
        "category_reference": pa.string(),
        "x": pa.float64(),  # pixels of the original image; null: malformed; NaN and infinity are kept
        "y": pa.float64(),
        "w": pa.float64(),
        "h": pa.float64(),
        "area": pa.float64(),  # null: not recorded
        "iscrowd": pa.bool_(),
        "annotation_id": pa.string(),
        "split": pa.string(),
        "source_record": pa.string(),
        "fault": pa.string(),
    }
)


@dataclass(frozen=True)
class Problem:
    """What a reader found in one place of a file: a record it could not make sense of, or a note on the file."""

    rule: str
    file: str
    record: str  # JSON pointer or line=N; empty: the whole file
    detail: str


@dataclass(frozen=True)
class RawDataset:
    """A dataset as found. Nothing is left out: malformed records are rows with a `fault`."""

    images: pa.Table
    boxes: pa.Table
    metadata: DatasetMetadata
    required_splits: tuple[str, ...] = ()
    unlisted_files: tuple[str, ...] = field(default=(), repr=False)
    """Pictures in the image folder that no record names."""
    notes: tuple[Problem, ...] = field(default=(), repr=False)
    """What the reader noticed about files and class lists, by rule of `validation.file_rules`."""

    @property
    def labelled(self) -> bool:
        """Whether the set has annotation files (an unlabelled set has neither boxes nor classes)."""
        return bool(self.metadata.class_names)

    @property
    def problems(self) -> list[Problem]:
        """The malformed records."""
        return [*_problems(self.images, "image_record"), *_problems(self.boxes, "box_record")]


def _problems(table: pa.Table, rule: str) -> list[Problem]:
    faulty = table.filter(pc.is_valid(table["fault"])).select(["source_record", "fault"])
    pairs = zip(faulty["source_record"].to_pylist(), faulty["fault"].to_pylist(), strict=True)
    return [Problem(rule, record.split("#")[0], record.split("#")[1], fault) for record, fault in pairs]
