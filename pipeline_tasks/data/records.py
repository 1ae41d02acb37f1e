"""COCO image and annotation records as columns: one call a record, nothing kept but flat arrays."""

from __future__ import annotations

import math
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa

from pipeline_tasks.data.json_records import type_name
from pipeline_tasks.data.raw import RAW_BOXES_SCHEMA, RAW_IMAGES_SCHEMA
from pipeline_tasks.data.table_builder import Columns, TableBuilder

LARGEST_SIDE = 1_000_000


class ImageRecords:
    """Turns the image records of one file into rows of `RAW_IMAGES_SCHEMA`.

    `coco.py` completes them: `path` is still the file name relative to images/, `licence` the licence's id.
    """

    def __init__(self, file: str, split: str) -> None:
        self._builder = TableBuilder(RAW_IMAGES_SCHEMA)
        self.file, self.split = file, split

    def add(self, position: int, record: Any) -> None:
        """Add the record at `position` of the file's list of images."""
        source = f"{self.file}#/images/{position}"
        if not isinstance(record, dict):
            no_record = f"is {type_name(record)}, not an object"
            self._builder.append((position, None, None, None, None, self.split, None, source, no_record))
            return
        faults: list[str] = []
        identifier = _identifier(record, "id", faults)
        name = _file_name(record, faults)
        width, height = _side(record, "width", faults), _side(record, "height", faults)
        licence = record.get("license")
        licence = None if licence is None else str(licence)
        fault = "; ".join(faults) or None
        self._builder.append((position, identifier, name, width, height, self.split, licence, source, fault))

    def append(self, batch: pa.RecordBatch | Columns) -> None:
        """Add rows that were decoded elsewhere (`record_parts`)."""
        self._builder.append_batch(batch)

    def table(self) -> pa.Table:
        """The rows so far."""
        return self._builder.finish()


class AnnotationRecords:
    """Turns the annotation records of one file into rows of `RAW_BOXES_SCHEMA`.

    `coco.py` completes them: the image id and the category index are still null.
    """

    def __init__(self, file: str, split: str) -> None:
        self._builder = TableBuilder(RAW_BOXES_SCHEMA)
        self.file, self.split = file, split
        self.empty_segmentations = 0

    def add(self, position: int, record: Any) -> None:
        """Add the record at `position` of the file's list of annotations."""
        source = f"{self.file}#/annotations/{position}"
        if not isinstance(record, dict):
            no_record = f"is {type_name(record)}, not an object"
            self._builder.append((None,) * 11 + (self.split, source, no_record))
            return
        faults: list[str] = []
        image, category = _identifier(record, "image_id", faults), _identifier(record, "category_id", faults)
        x, y, w, h = _bbox(record, faults)
        area = _area(record, faults)
        crowd = _crowd(record, faults)
        self.empty_segmentations += record.get("segmentation") == []
        identifier = _identifier(record, "id", faults)
        fault = "; ".join(faults) or None
        self._builder.append(
            (None, image, None, category, x, y, w, h, area, crowd, identifier, self.split, source, fault)
        )

    def append(self, batch: pa.RecordBatch | Columns) -> None:
        """Add rows that were decoded elsewhere (`record_parts`)."""
        self._builder.append_batch(batch)

    def table(self) -> pa.Table:
        """The rows so far."""
        return self._builder.finish()


def _identifier(record: dict[str, Any], key: str, faults: list[str]) -> str | None:
    """An id as text: COCO's are whole numbers, some exports use text."""
    value = record.get(key)
    if type(value) is int or type(value) is str:
        return str(value)
    if type(value) is float and value.is_integer():
        return str(int(value))
    faults.append(f"{key} is {type_name(value)}" if key in record else f"has no {key}")
    return None


def _file_name(record: dict[str, Any], faults: list[str]) -> str | None:
    value = record.get("file_name")
    if type(value) is not str or not value:
        faults.append("file_name is " + type_name(value) if value else "has no file_name")
        return None
    path = PurePosixPath(value)
    if path.is_absolute() or ".." in path.parts or "\0" in value:
        faults.append(f"file_name {value!r} leads out of the folder images/")
        return None
    return str(path)


def _side(record: dict[str, Any], key: str, faults: list[str]) -> int | None:
    value = record.get(key)
    if type(value) is float and value.is_integer():
        value = int(value)
    if type(value) is int and 0 < value <= LARGEST_SIDE:
        return value
    if value is None:
        faults.append(f"has no {key}")
    else:
        faults.append(f"{key} {value!r:.40} is not a whole number from 1 to {LARGEST_SIDE}")
    return None


_NO_BOX = (None, None, None, None)


def _bbox(record: dict[str, Any], faults: list[str]) -> tuple[float | None, ...]:
    value = record.get("bbox")
    if type(value) is list and len(value) == 4:
        numbers = tuple(_number(side) for side in value)
        if None not in numbers:
            return numbers
    if value is None:
        faults.append("has no bbox")
    else:
        faults.append(f"bbox {value!r:.60} is not a list of four numbers x, y, width, height")
    return _NO_BOX


def _number(value: Any) -> float | None:
    """A JSON number as float: NaN and infinity stay, whole numbers too large for a float become infinite."""
    if type(value) is float:
        return value
    if type(value) is not int:
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _area(record: dict[str, Any], faults: list[str]) -> float | None:
    value = record.get("area")
    number = _number(value)
    if value is not None and number is None:
        faults.append(f"area is {type_name(value)}, not a number")
    return number


def _crowd(record: dict[str, Any], faults: list[str]) -> bool:
    value = record.get("iscrowd", 0)
    if value is None or value == 0:
        return False
    if value != 1:
        faults.append(f"iscrowd {value!r:.20} is neither 0 nor 1")
    return True
