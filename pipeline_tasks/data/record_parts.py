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
from numpy.typing import NDArray

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


class _Outlined(_Annotation, gc=False):
    """An annotation of a part in which some have a segmentation."""

    segmentation: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET


class _Parts:
    """Calls `whole` with the typed records of a part, and `single` for each record of a part with an odd one.

    `kinds`: the records' type, and that of a part in which the member `word` occurs.
    """

    def __init__(
        self,
        kinds: tuple[Any, Any],
        word: bytes,
        whole: Callable[[int, list[Any]], None],
        single: Callable[[int, Any], None],
    ) -> None:
        self._plain, self._full = (_decoder(kind) for kind in kinds)
        self._word, self._whole, self._single = word, whole, single

    def __call__(self, position: int, part: bytes) -> int | None:
        """See `json_stream.PartSink`."""
        try:
            decoder = self._full if self._word in part or b"\\" in part else self._plain
            records = decoder.decode(part)
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


def _decoder(kind: Any) -> Any:
    return msgspec.json.Decoder(list[kind])


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
        licences = _all(images, "license")
        texts = {licence: None if licence is None else str(licence) for licence in set(licences)}
        columns = {
            "image_id": _range(position, count),
            "original_id": _texts(images, "id"),
            "path": names,
            "width": sides[0],
            "height": sides[1],
            "split": _repeated(records.split, count),
            "licence": list(map(texts.__getitem__, licences)),
            "source_record": _sources(f"{records.file}#/images/", position, count),
        }
        records.append(_batch(RAW_IMAGES_SCHEMA, columns, count))

    return _Parts((_Image, _Image), b"", add, records.add)


def annotation_parts(records: AnnotationRecords) -> PartSink:
    """A sink for parts of the array of annotations."""

    def add(position: int, annotations: list[_Annotation]) -> None:
        count = len(annotations)
        flat = itertools.chain.from_iterable(map(attrgetter("bbox"), annotations))
        boxes = np.fromiter(flat, np.float64, 4 * count).reshape(count, 4)
        columns = {
            "image_reference": _texts(annotations, "image_id"),
            "category_reference": _texts(annotations, "category_id"),
            **{side: np.ascontiguousarray(boxes[:, place]) for place, side in enumerate("xywh")},
            "area": _areas(annotations),
            "iscrowd": _crowd(annotations),
            "annotation_id": _texts(annotations, "id"),
            "split": _repeated(records.split, count),
            "source_record": _sources(f"{records.file}#/annotations/", position, count),
        }
        records.append(_batch(RAW_BOXES_SCHEMA, columns, count))
        if count and isinstance(annotations[0], _Outlined):
            given = [one for one in _all(annotations, "segmentation") if one is not msgspec.UNSET]
            records.empty_segmentations += sum(map(_is_empty_list, given))

    return _Parts((_Annotation, _Outlined), b"segmentation", add, records.add)


def _all(records: list[Any], name: str) -> list[Any]:
    return list(map(attrgetter(name), records))


def _texts(records: list[Any], name: str) -> pa.Array:
    """Whole numbers as text, as ids are kept; an id beyond 64 bits raises OverflowError."""
    return pa.array(np.fromiter(map(attrgetter(name), records), np.int64, len(records))).cast(pa.string())


def _areas(annotations: list[_Annotation]) -> Any:
    areas = np.fromiter(map(attrgetter("area"), annotations), np.float64, len(annotations))
    return _all(annotations, "area") if np.isnan(areas).any() else areas  # JSON has no NaN: some have no area


def _crowd(annotations: list[_Annotation]) -> NDArray[np.bool_]:
    try:
        flags = np.fromiter(map(attrgetter("iscrowd"), annotations), np.int64, len(annotations))
    except TypeError:  # null is no crowd
        flags = np.array([0 if one.iscrowd is None else one.iscrowd for one in annotations], np.int64)
    if ((flags < 0) | (flags > 1)).any():
        raise _Odd
    return flags.astype(np.bool_)


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
