"""Rows of formats that have a file for each picture, collected picture by picture."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath

import pyarrow as pa
import pyarrow.compute as pc

from model.data.tables import DatasetMetadata
from pipeline_tasks.data.coco import licence_counts, unlisted
from pipeline_tasks.data.raw import (
    RAW_BOXES_SCHEMA,
    RAW_IMAGES_SCHEMA,
    Problem,
    RawDataset,
)
from pipeline_tasks.data.readers.listing import Listing
from pipeline_tasks.data.table_builder import TableBuilder

Numbers = tuple[float | None, float | None, float | None, float | None]
_NUMBER = re.compile(
    r"[-+]?(?:(?:\d{1,400}\.?\d{0,400}|\.\d{1,400})(?:[eE][-+]?\d{1,9})?|nan|inf(?:inity)?)\Z", re.IGNORECASE | re.ASCII
)
NO_BOX: Numbers = (None, None, None, None)


class Rows:
    """Images, boxes and notes of a set; boxes belong to the image that was added last."""

    def __init__(self) -> None:
        self._images, self._boxes = TableBuilder(RAW_IMAGES_SCHEMA), TableBuilder(RAW_BOXES_SCHEMA)
        self._image_count = self._box_count = 0
        self._key, self._split = "", ""
        self.notes: list[Problem] = []

    def add_image(
        self,
        key: str,
        path: str | None,
        size: tuple[int | None, int | None],
        split: str,
        record: str,
        fault: str | None = None,
    ) -> None:
        """`key` is what the format knows the picture by, `size` the recorded width and height, None: not recorded."""
        self._images.append((self._image_count, key, path, *size, split, None, record, fault))
        self._image_count += 1
        self._key, self._split = key, split

    def add_box(self, category: str | None, xywh: Numbers, record: str, fault: str | None = None) -> None:
        """`category`: the class as the file tells it, `xywh`: pixels; a malformed record has a fault and no numbers."""
        self._box_count += 1
        self._boxes.append(
            (self._image_count - 1, self._key, None, category, *xywh, None, False, str(self._box_count), self._split,
             record, fault)
        )  # fmt: skip

    def note(self, rule: str, file: str, detail: str, record: str = "") -> None:
        """Remember something about a file."""
        self.notes.append(Problem(rule, file, record, detail))

    def finish(
        self,
        listing: Listing,
        name: str,
        root_name: str,
        classes: dict[str, str],
        category_ids: Sequence[int],
        files: Iterable[str],
        required_splits: Sequence[str],
        split_rule: str,
    ) -> RawDataset:
        """The set; `classes` are the names by what the boxes tell them by, `files` the annotation files read."""
        images, boxes = self._images.finish(), self._boxes.finish()
        keys = pa.array(list(classes), pa.string())
        place = boxes.schema.get_field_index("category")
        boxes = boxes.set_column(
            place, "category", pc.index_in(boxes["category_reference"], value_set=keys, skip_nulls=True)
        )
        licence = set_licence(listing)
        metadata = DatasetMetadata(
            name=name,
            class_names=tuple(classes.values()),
            category_ids=tuple(category_ids),
            roots=(root_name,),
            source=set_source(listing),
            licences={"images": licence_counts(images["licence"]), "annotations": licence},
            split_rule=split_rule,
            digests={"annotations": _digest(listing.folder, sorted(files))},
        )
        lost = unlisted(images, listing.pictures)
        return RawDataset(
            images, boxes.cast(RAW_BOXES_SCHEMA), metadata, tuple(required_splits), lost, tuple(self.notes)
        )


def number(text: str) -> float | None:
    """A decimal number, "nan" or "inf"; None for anything else that Python's float() would take, such as 1_000."""
    return float(text) if _NUMBER.match(text.strip()) else None


def key_of(file: str) -> str:
    """What pictures and their annotation files have in common: the path without its suffix."""
    return str(PurePosixPath(file).with_suffix(""))


def set_licence(listing: Listing) -> str:
    """The licence that a Roboflow export's README names, "unknown" elsewhere."""
    return _readme_value(listing, "License") or "unknown"


def set_source(listing: Listing) -> str:
    """The address that a Roboflow export's README names."""
    return next((line for line in _readme(listing) if line.startswith("http")), "")


def _readme_value(listing: Listing, key: str) -> str | None:
    prefix = f"{key}:"
    return next((line[len(prefix) :].strip() for line in _readme(listing) if line.startswith(prefix)), None)


def _readme(listing: Listing) -> list[str]:
    for name in ("README.dataset.txt", "README.roboflow.txt"):
        if name in listing.known:
            text = (listing.folder / name).read_bytes()[:10_000].decode("utf-8", "replace")
            return [line.strip() for line in text.splitlines()]
    return []


def _digest(folder: Path, files: Sequence[str]) -> str:
    """One digest of many small files: of their names and contents."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file}\0".encode())
        digest.update(hashlib.sha256((folder / file).read_bytes()).digest())
    return digest.hexdigest()
