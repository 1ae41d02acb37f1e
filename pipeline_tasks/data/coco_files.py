"""One COCO annotation file: its images and annotations as tables, its class list, its licences, and what it lacks."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipeline_tasks.data.json_records import read_json_object, type_name
from pipeline_tasks.data.json_stream import NotStreamableError, stream_json_object
from pipeline_tasks.data.raw import Problem
from pipeline_tasks.data.record_parts import annotation_parts, image_parts
from pipeline_tasks.data.records import AnnotationRecords, ImageRecords
from pipeline_tasks.errors import DataError

EXPECTED_KEYS = ("info", "licenses")


@dataclass(frozen=True)
class AnnotationFile:
    """One decoded annotation file."""

    name: str  # relative to the dataset folder
    images: pa.Table
    boxes: pa.Table
    categories: dict[str, str]  # id: name, in order of the ids
    licences: dict[str, str]  # id: name
    info: dict[str, Any]
    sha256: str
    notes: tuple[Problem, ...]


def read_file(path: Path, relative: str, split: str, required: Iterable[str]) -> AnnotationFile:
    """Read `path`/`relative`; `DataError` names the first thing that keeps it from being understood.

    `required`: members the object must have. `images.path` still holds file names, `licence` licence ids.
    """
    file = path / relative
    try:
        return _read_file(file, relative, split, required)
    except UnicodeEncodeError as error:  # JSON can spell half a surrogate pair, which no text can hold
        raise DataError(f"{file}: {error.object!r:.60} is no Unicode text; correct it, or export again") from error


def _read_file(file: Path, relative: str, split: str, required: Iterable[str]) -> AnnotationFile:
    images, annotations, members, sha256 = _decode(file, relative, split)
    for key in required:
        if key not in members:
            raise DataError(f"{file} has no {key!r}; COCO files need images, annotations and categories")
    info, boxes = members.get("info"), annotations.table()
    categories = _categories(file, members.get("categories", []))
    return AnnotationFile(
        name=relative,
        images=images.table(),
        boxes=boxes,
        categories=categories,
        licences=_licences(file, members.get("licenses", [])),
        info=info if isinstance(info, dict) else {},
        sha256=sha256,
        notes=tuple(_notes(relative, members, boxes, annotations.empty_segmentations)),
    )


def _decode(file: Path, relative: str, split: str) -> tuple[ImageRecords, AnnotationRecords, dict[str, Any], str]:
    """The records, the other members and the file's digest: read in parts, or as a whole where that cannot be done."""
    with suppress(NotStreamableError):  # left behind here, or the rows so far would stay while the text is read
        return _decode_in_parts(file, relative, split)
    images, annotations = ImageRecords(relative, split), AnnotationRecords(relative, split)
    with _readable(file):
        content = file.read_bytes()
    members = read_json_object(content, file, {"images": images.add, "annotations": annotations.add})
    return images, annotations, members, hashlib.sha256(content).hexdigest()


def _decode_in_parts(
    file: Path, relative: str, split: str
) -> tuple[ImageRecords, AnnotationRecords, dict[str, Any], str]:
    images, annotations = ImageRecords(relative, split), AnnotationRecords(relative, split)
    parts = {"images": image_parts(images), "annotations": annotation_parts(annotations)}
    with _readable(file):
        members, sha256 = stream_json_object(file, parts)
    return images, annotations, members, sha256


@contextmanager
def _readable(file: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(f"{file} cannot be read ({error.strerror})") from error


def _notes(name: str, members: dict[str, Any], boxes: pa.Table, empty_segmentations: int) -> Iterable[Problem]:
    if missing := [key for key in EXPECTED_KEYS if key not in members]:
        yield Problem("coco_keys", name, "", f"the file has no {' and no '.join(missing)}")
    if empty_segmentations:
        count = f"{empty_segmentations} of {len(boxes)} annotations have"
        yield Problem("segmentation_filled", name, "", f"{count} an empty list as segmentation")
    yield from _placeholders(name, members.get("categories", []), boxes)


def _placeholders(name: str, records: Any, boxes: pa.Table) -> Iterable[Problem]:
    """Categories that only serve as the parent of others: Roboflow writes one with the id 0."""
    parents = {text for record in records if type(text := record.get("supercategory")) is str}
    used = set(pc.unique(boxes["category_reference"]).to_pylist())
    for position, record in enumerate(records):
        own = record["name"]
        if own in parents and record.get("supercategory") != own and str(record["id"]) not in used:
            detail = f"category {record['id']}, {own!r}, is the parent of others and has no box of its own"
            yield Problem("category_used", name, f"/categories/{position}", detail)


def _categories(file: Path, records: Any) -> dict[str, str]:
    named = _named_records(file, "categories", records)
    seen: dict[str, int] = {}
    for identifier, class_name in named:
        if seen.setdefault(class_name, identifier) != identifier:
            raise DataError(
                f"{file}: categories {seen[class_name]} and {identifier} are both named {class_name!r}; "
                "class names must differ, since classes are matched by name"
            )
    return {str(identifier): class_name for identifier, class_name in sorted(named)}


def _licences(file: Path, records: Any) -> dict[str, str]:
    """CVAT and labelme write one licence without a name: it is as unknown as none."""
    if isinstance(records, list):
        records = [one for one in records if not (isinstance(one, dict) and one.get("name", 0) in ("", None))]
    return {str(identifier): name for identifier, name in _named_records(file, "licenses", records or [])}


def _named_records(file: Path, key: str, records: Any) -> list[tuple[int, str]]:
    """(id, name) of category or licence records; `DataError` names the first one that is malformed."""
    if not isinstance(records, list):
        raise DataError(f"{file}: {key!r} must be a list, it is {type_name(records)}")
    named: dict[int, str] = {}
    for position, record in enumerate(records):
        where = f"{file}: {key}[{position}]"
        if not isinstance(record, dict) or "id" not in record or "name" not in record:
            raise DataError(f"{where} must be an object with id and name")
        identifier, name = record["id"], record["name"]
        if type(identifier) is not int or not -(2**63) <= identifier < 2**63:
            raise DataError(f"{where}: id {identifier!r:.40} must be a whole number")
        if type(name) is not str or not name.strip():
            raise DataError(f"{where} (id {identifier}): name {name!r:.40} must be text")
        name.encode()
        if identifier in named:
            raise DataError(f"{where}: id {identifier} is given twice; ids must differ")
        named[identifier] = name
    return list(named.items())
