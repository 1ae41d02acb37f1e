"""COCO records decoded straight into typed values, a part of the array at a time.

Only records in which nothing is odd go this way; a part with any that is goes record by record through `records`, so
that both ways end in the same rows and the same faults.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable
from operator import attrgetter
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline_tasks.data.json_stream import PartSink
from pipeline_tasks.data.raw import RAW_BOXES_SCHEMA, RAW_IMAGES_SCHEMA
from pipeline_tasks.data.records import LARGEST_SIDE, AnnotationRecords, ImageRecords

_ODD_PATH = re.compile(r"(^|/)\.{0,2}(/|$)|\0")
"""What PurePosixPath would change or the reader refuses: empty parts, "." and ".."."""


class _Odd(Exception):
    """A record needs a closer look."""


class _Image(msgspec.Struct, gc=False):
    id: int
    file_name: str
    width: int
    height: int
    license: int | str | None = None


class _Annotation(msgspec.Struct, gc=False):
    id: int
    image_id: int
    category_id: int
    bbox: tuple[float, float, float, float]
    area: float | None = None
    iscrowd: int | bool | None = 0
    segmentation: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET


class _Parts:
    """Calls `whole` with the typed records of a part, and `single` for each record of a part with an odd one."""

    def __init__(self, kind: Any, whole: Callable[[int, list[Any]], None], single: Callable[[int, Any], None]) -> None:
        self._decoder: Any = msgspec.json.Decoder(list[kind])
        self._whole, self._single = whole, single

    def __call__(self, position: int, part: bytes) -> int | None:
        """See `json_stream.PartSink`."""
        try:
            records = self._decoder.decode(part)
            self._whole(position, records)
            return len(records)
        except (msgspec.MsgspecError, _Odd, OverflowError, UnicodeDecodeError):
            pass
        try:
            plain = json.loads(part)
        except (ValueError, RecursionError):
            return None
        for place, record in enumerate(plain, position):
            self._single(place, record)
        return len(plain)


def image_parts(records: ImageRecords) -> PartSink:
    """A sink for parts of the array of images."""

    def add(position: int, images: list[_Image]) -> None:
        names = _all(images, "file_name")
        if any(map(_ODD_PATH.search, names)):
            raise _Odd
        sides = [np.array(_all(images, side), np.int64) for side in ("width", "height")]
        if any(((side < 1) | (side > LARGEST_SIDE)).any() for side in sides):
            raise _Odd
        count = len(images)
        licences = [None if image.license is None else str(image.license) for image in images]
        columns = {
            "image_id": _range(position, count),
            "original_id": _texts(images, "id"),
            "path": names,
            "width": sides[0],
            "height": sides[1],
            "split": _repeated(records.split, count),
            "licence": licences,
            "source_record": _sources(f"{records.file}#/images/", position, count),
        }
        records.append(_batch(RAW_IMAGES_SCHEMA, columns, count))

    return _Parts(_Image, add, records.add)


def annotation_parts(records: AnnotationRecords) -> PartSink:
    """A sink for parts of the array of annotations."""

    def add(position: int, annotations: list[_Annotation]) -> None:
        count = len(annotations)
        crowd = _all(annotations, "iscrowd")
        if not set(crowd) <= {0, 1, None}:
            raise _Odd
        flat = itertools.chain.from_iterable(_all(annotations, "bbox"))
        boxes = np.fromiter(flat, np.float64, 4 * count).reshape(count, 4)
        columns = {
            "image_reference": _texts(annotations, "image_id"),
            "category_reference": _texts(annotations, "category_id"),
            **{side: np.ascontiguousarray(boxes[:, place]) for place, side in enumerate("xywh")},
            "area": _all(annotations, "area"),
            "iscrowd": np.array([bool(flag) for flag in crowd], np.bool_),
            "annotation_id": _texts(annotations, "id"),
            "split": _repeated(records.split, count),
            "source_record": _sources(f"{records.file}#/annotations/", position, count),
        }
        records.append(_batch(RAW_BOXES_SCHEMA, columns, count))
        given = [one for one in _all(annotations, "segmentation") if one is not msgspec.UNSET]
        records.empty_segmentations += sum(map(_is_empty_list, given))

    return _Parts(_Annotation, add, records.add)


def _all(records: list[Any], name: str) -> list[Any]:
    return list(map(attrgetter(name), records))


def _texts(records: list[Any], name: str) -> pa.Array:
    """Whole numbers as text, as ids are kept; an id beyond 64 bits raises OverflowError."""
    return pa.array(_all(records, name), pa.int64()).cast(pa.string())


def _range(first: int, count: int) -> pa.Array:
    return pa.array(np.arange(first, first + count))


def _repeated(text: str, count: int) -> pa.Array:
    return pa.repeat(pa.scalar(text, pa.string()), count)


def _sources(prefix: str, first: int, count: int) -> pa.Array:
    return pc.binary_join_element_wise(prefix, _range(first, count).cast(pa.string()), "")


def _batch(schema: pa.Schema, columns: dict[str, Any], count: int) -> pa.RecordBatch:
    """The columns in the order and types of the schema, null where none is given."""
    arrays = [pa.array(columns[f.name], f.type) if f.name in columns else pa.nulls(count, f.type) for f in schema]
    return pa.RecordBatch.from_arrays(arrays, schema=schema)


def _is_empty_list(segmentation: msgspec.Raw) -> bool:
    view = memoryview(segmentation)
    return 2 <= len(view) <= 16 and bytes(view).split() in ([b"[]"], [b"[", b"]"])
