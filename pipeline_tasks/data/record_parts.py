"""COCO records decoded straight into typed values, a part of the array at a time.

Only records in which nothing is odd go this way; a part with any that is goes record by record through `records`, so
that both ways end in the same rows and the same faults.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from operator import attrgetter
from typing import Any, cast

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline_tasks.data.json_stream import PartSink
from pipeline_tasks.data.number_columns import NumberColumns, whole_numbers
from pipeline_tasks.data.raw import RAW_BOXES_SCHEMA, RAW_IMAGES_SCHEMA
from pipeline_tasks.data.records import LARGEST_SIDE, AnnotationRecords, ImageRecords
from pipeline_tasks.data.table_builder import Columns

_ODD_PATH = r"(^|/)\.{0,2}(/|$)|\x00"
"""What PurePosixPath would change or the reader refuses: empty parts, "." and ".."."""


class _Odd(Exception):
    """A record needs a closer look."""


class _Image(msgspec.Struct, gc=False):
    id: int
    file_name: str
    width: int
    height: int
    license: int | str | None = None


class _Box(msgspec.Struct, array_like=True, forbid_unknown_fields=True, gc=False):
    """Four numbers, no more; a tuple of them would be looked at by the garbage collector."""

    x: float
    y: float
    w: float
    h: float


class _Annotation(msgspec.Struct, gc=False):
    """Whole numbers are floats here, so that `NumberColumns` applies; `whole_numbers` makes them what they are."""

    id: float
    image_id: float
    category_id: float
    bbox: _Box
    area: float | None = math.nan  # none: JSON has no NaN
    iscrowd: float | bool | None = 0.0


class _Outlined(_Annotation, gc=False):
    """An annotation of a part in which some have a segmentation."""

    segmentation: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET


_NUMBERS = NumberColumns({"id": 0, "image_id": 0, "category_id": 0, "bbox": 4, "area": 0, "iscrowd": 0})


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
        except (msgspec.MsgspecError, _Odd, OverflowError, UnicodeDecodeError, RecursionError):
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
        names = pa.array(_all(images, "file_name"), pa.string())
        if pc.any(pc.match_substring_regex(names, _ODD_PATH), min_count=0).as_py():
            raise _Odd
        sides = [np.array(_all(images, side), np.int64) for side in ("width", "height")]
        if any(((side < 1) | (side > LARGEST_SIDE)).any() for side in sides):
            raise _Odd
        count = len(images)
        licences = _all(images, "license")
        texts = {licence: None if licence is None else str(licence) for licence in set(licences)}
        columns = {
            "image_id": np.arange(position, position + count),
            "original_id": _texts(np.fromiter((image.id for image in images), np.int64, count)),
            "path": names,
            "width": sides[0],
            "height": sides[1],
            "split": _repeated(records.split, count),
            "licence": list(map(texts.__getitem__, licences)),
            "source_record": _sources(f"{records.file}#/images/", np.arange(position, position + count)),
        }
        records.append(_batch(RAW_IMAGES_SCHEMA, columns, count))

    return _Parts((_Image, _Image), b"", add, records.add)


def annotation_parts(records: AnnotationRecords) -> PartSink:
    """A sink for parts of the array of annotations."""
    file, split = records.file, records.split  # not `records`, which hold what `batch` waits in: a circle

    def add(position: int, annotations: list[_Annotation]) -> None:
        count, empty = len(annotations), _without_segmentations(annotations)
        numbers = _numbers_of(annotations)
        whole = {name: whole_numbers(numbers[name]) for name in ("image_id", "category_id", "id")}
        arrays = {"position": np.arange(position, position + count), **numbers, **whole}
        records.append(Columns(batch, arrays | {"iscrowd": _crowd(numbers["iscrowd"])}))
        records.empty_segmentations += empty

    def batch(arrays: dict[str, NDArray[Any]]) -> pa.RecordBatch:
        count = len(arrays["position"])
        columns = {
            "image_reference": _texts(arrays["image_id"]),
            "category_reference": _texts(arrays["category_id"]),
            **{side: np.ascontiguousarray(arrays["bbox"][:, place]) for place, side in enumerate("xywh")},
            "area": pa.array(arrays["area"], from_pandas=True),  # NaN, which stands for none, becomes null
            "iscrowd": arrays["iscrowd"],
            "annotation_id": _texts(arrays["id"]),
            "split": _repeated(split, count),
            "source_record": _sources(f"{file}#/annotations/", arrays["position"]),
        }
        return _batch(RAW_BOXES_SCHEMA, columns, count)

    return _Parts((_Annotation, _Outlined), b"segmentation", add, records.add)


def _all(records: list[Any], name: str) -> list[Any]:
    return list(map(attrgetter(name), records))


def _without_segmentations(annotations: list[_Annotation]) -> int:
    """Take the segmentations away, which are no numbers; how many were empty lists."""
    empty = 0
    if annotations and isinstance(annotations[0], _Outlined):
        for one in cast("list[_Outlined]", annotations):
            if one.segmentation is not msgspec.UNSET:
                empty += _is_empty_list(one.segmentation)
                one.segmentation = msgspec.UNSET
    return empty


def _numbers_of(annotations: list[_Annotation]) -> dict[str, NDArray[np.float64]]:
    numbers = _NUMBERS(annotations)
    if numbers is None:  # some have null or true
        for one in annotations:
            one.area = math.nan if one.area is None else one.area
            one.iscrowd = float(one.iscrowd or 0)
        numbers = _NUMBERS(annotations)
    assert numbers is not None
    return numbers


def _texts(identifiers: NDArray[np.int64]) -> pa.Array:
    """Whole numbers as text, as ids are kept."""
    return pa.array(identifiers).cast(pa.string())


def _crowd(numbers: NDArray[np.float64]) -> NDArray[np.bool_]:
    flags = numbers.astype(np.bool_)
    if (flags != numbers).any():
        raise _Odd
    return flags


def _repeated(text: str, count: int) -> pa.Array:
    return pa.repeat(pa.scalar(text, pa.string()), count)


def _sources(prefix: str, positions: NDArray[np.int64]) -> pa.Array:
    return pc.binary_join_element_wise(prefix, _texts(positions), "")


def _batch(schema: pa.Schema, columns: dict[str, Any], count: int) -> pa.RecordBatch:
    """The columns in the order and types of the schema, null where none is given."""
    arrays = [pa.array(columns[f.name], f.type) if f.name in columns else pa.nulls(count, f.type) for f in schema]
    return pa.RecordBatch.from_arrays(arrays, schema=schema)


def _is_empty_list(segmentation: msgspec.Raw) -> bool:
    view = memoryview(segmentation)
    return 2 <= len(view) <= 16 and bytes(view).split() in ([b"[]"], [b"[", b"]"])
