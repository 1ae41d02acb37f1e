"""Readers of COCO folders and of folders with unlabelled pictures."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from model.data.tables import DatasetMetadata
from pipeline_tasks.data.json_records import read_json_object, type_name
from pipeline_tasks.data.raw import (
    RAW_BOXES_SCHEMA,
    RAW_IMAGES_SCHEMA,
    SPLITS,
    UNLABELED_SPLIT,
    RawDataset,
)
from pipeline_tasks.data.records import AnnotationRecords, ImageRecords
from pipeline_tasks.errors import DataError

UNKNOWN_LICENCE = "unknown"
PICTURE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"})


@dataclass(frozen=True)
class _AnnotationFile:
    """One decoded annotation file."""

    name: str  # relative to the dataset folder
    images: pa.Table
    boxes: pa.Table
    categories: dict[str, str]  # id: name, in order of the ids
    licences: dict[str, str]  # id: name
    info: dict[str, Any]
    sha256: str


def read_coco_folder(
    path: Path, root_name: str, required_splits: Sequence[str] = SPLITS, name: str | None = None
) -> RawDataset:
    """Read `images/` and `annotations/instances_{train,val,test}.json` below `path`.

    A picture is looked for at images/FILE_NAME, then images/SPLIT/FILE_NAME, then FILE_NAME. `root_name` is
    the symbolic root of the tables and, unless `name` is given, the dataset's name. Malformed records become
    rows with a fault. `DataError`: the folder cannot be understood at all, the files' class lists differ, or a
    required split has no images or no boxes.
    """
    pictures = _list_pictures(path)
    files = _read_splits(path, required_splits)
    categories = _common_categories(path, files)
    images = _resolve_images(files, pictures)
    boxes = pa.concat_tables(_resolve_boxes(file, row, categories) for file, row in _with_first_row(files))
    metadata = DatasetMetadata(
        name=name or root_name,
        class_names=tuple(categories.values()),
        category_ids=tuple(int(identifier) for identifier in categories),
        roots=(root_name,),
        source=_source(files),
        licences={"images": licence_counts(images["licence"]), "annotations": _annotation_licence(files)},
        split_rule="annotations/instances_SPLIT.json",
        digests={file.name: file.sha256 for file in files},
    )
    return RawDataset(images, boxes, metadata, tuple(required_splits), _unlisted(images, pictures))


def read_unlabeled_folder(path: Path, root_name: str, name: str | None = None) -> RawDataset:
    """Read `images/` and, where it exists, `images.json` (COCO layout without annotations) below `path`.

    Without images.json every picture below images/ counts, its licence and recorded size unknown. All images
    are in the split "unlabeled". Raises `DataError` as `read_coco_folder` does.
    """
    pictures = _list_pictures(path)
    if (path / "images.json").is_file():
        files = [_read_file(path, "images.json", UNLABELED_SPLIT, required=("images",))]
        images = _resolve_images(files, pictures)
    else:
        files, images = [], _listed_images(pictures)
    if not len(images):
        raise DataError(f"{path} holds no images; an unlabelled set needs pictures in images/")
    metadata = DatasetMetadata(
        name=name or root_name,
        class_names=(),
        category_ids=(),
        roots=(root_name,),
        source=_source(files),
        licences={"images": licence_counts(images["licence"]), "annotations": "none"},
        split_rule="none",
        digests={file.name: file.sha256 for file in files},
    )
    return RawDataset(images, RAW_BOXES_SCHEMA.empty_table(), metadata, (UNLABELED_SPLIT,), _unlisted(images, pictures))


def licence_counts(licences: pa.ChunkedArray) -> dict[str, int]:
    """Images by licence name, in order of the names; "unknown" where none is recorded."""
    counts = Counter(UNKNOWN_LICENCE if value is None else value for value in licences.to_pylist())
    return dict(sorted(counts.items()))


def _list_pictures(path: Path) -> list[str]:
    """Pictures below images/, relative to `path` with "/" between folders, sorted."""
    if not path.is_dir():
        pointer = path.with_name(path.name + ".dvc")
        remedy = f"run `dvc pull {pointer}`" if pointer.is_file() else "give the folder of a dataset"
        raise DataError(f"{path} is not a folder; {remedy}")
    if not (path / "images").is_dir():
        raise DataError(f"{path} has no folder images/; put the pictures there")
    found = []
    for folder, _, names in os.walk(path / "images", followlinks=True):
        prefix = Path(folder).relative_to(path).as_posix()
        found += [f"{prefix}/{name}" for name in names if _is_picture(name)]
    return sorted(found)


def _is_picture(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in PICTURE_SUFFIXES and not name.startswith(".")


def _read_splits(path: Path, required_splits: Sequence[str]) -> list[_AnnotationFile]:
    """The annotation files that exist; `DataError` for a required one that is missing or empty."""
    files = []
    for split in SPLITS:
        relative = f"annotations/instances_{split}.json"
        if (path / relative).is_file():
            file = _read_file(path, relative, split, required=("images", "annotations", "categories"))
            if split in required_splits:
                _check_not_empty(path, file, split)
            files.append(file)
        elif split in required_splits:
            names = ",".join(required_splits)
            raise DataError(
                f"{path / relative} does not exist; a labelled set needs images/ and "
                f"annotations/instances_{{{names}}}.json"
            )
    if not files:
        raise DataError(f"{path / 'annotations'} holds none of instances_{{{','.join(SPLITS)}}}.json")
    return files


def _read_file(path: Path, relative: str, split: str, required: Iterable[str]) -> _AnnotationFile:
    file = path / relative
    images, annotations = ImageRecords(relative, split), AnnotationRecords(relative, split)
    try:
        content = file.read_bytes()
    except OSError as error:
        raise DataError(f"{file} cannot be read ({error.strerror})") from error
    members = read_json_object(content, file, {"images": images.add, "annotations": annotations.add})
    for key in required:
        if key not in members:
            raise DataError(f"{file} has no {key!r}; COCO files need images, annotations and categories")
    info = members.get("info")
    return _AnnotationFile(
        name=relative,
        images=images.table(),
        boxes=annotations.table(),
        categories=_categories(file, members.get("categories", [])),
        licences=_licences(file, members.get("licenses", [])),
        info=info if isinstance(info, dict) else {},
        sha256=hashlib.sha256(content).hexdigest(),
    )


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
        if identifier in named:
            raise DataError(f"{where}: id {identifier} is given twice; ids must differ")
        named[identifier] = name
    return list(named.items())


def _common_categories(path: Path, files: list[_AnnotationFile]) -> dict[str, str]:
    """The class list that all files share; `DataError` names the first difference."""
    first = files[0]
    if not first.categories:
        raise DataError(f"{path / first.name}: 'categories' is empty; at least one class is needed")
    for other in files[1:]:
        for identifier in [*first.categories, *other.categories]:
            ours, theirs = first.categories.get(identifier), other.categories.get(identifier)
            if ours != theirs:
                raise DataError(
                    f"{path / other.name}: category {identifier} is {theirs!r}, but {ours!r} in {first.name}; all "
                    "splits need the same categories"
                )
    return first.categories


def _check_not_empty(path: Path, file: _AnnotationFile, split: str) -> None:
    if not len(file.images):
        raise DataError(f"{path / file.name} lists no images; the split {split} must not be empty")
    if not len(file.boxes):
        purpose = "training needs some" if split == "train" else "accuracy cannot be measured without"
        raise DataError(f"{path / file.name} lists {len(file.images)} images but no boxes; {purpose}")


def _with_first_row(files: list[_AnnotationFile]) -> list[tuple[_AnnotationFile, int]]:
    """Each file with the number of image rows before it."""
    starts = np.cumsum([0] + [len(file.images) for file in files])
    return list(zip(files, starts[:-1].tolist(), strict=True))


def _resolve_images(files: list[_AnnotationFile], pictures: list[str]) -> pa.Table:
    """The images of all files, with ids 0 …, licences by name and paths below the dataset folder."""
    tables = []
    for file, start in _with_first_row(files):
        names, splits = file.images["path"], file.images["split"]
        ids = pa.array(np.arange(start, start + len(file.images)))
        paths = _existing_paths(names, splits, pictures)
        licences = _map_values(file.images["licence"], file.licences)
        table = file.images.set_column(0, "image_id", ids)
        table = table.set_column(table.schema.get_field_index("path"), "path", paths)
        tables.append(table.set_column(table.schema.get_field_index("licence"), "licence", licences))
    return pa.concat_tables(tables).cast(RAW_IMAGES_SCHEMA)


def _existing_paths(names: pa.ChunkedArray, splits: pa.ChunkedArray, pictures: list[str]) -> pa.ChunkedArray:
    """Where each file name lies; images/FILE_NAME where it is found nowhere."""
    plain = pc.binary_join_element_wise("images", names, "/")
    in_split = pc.binary_join_element_wise("images", splits, names, "/")
    known = pa.array(pictures, pa.string())
    candidates = [pc.if_else(pc.is_in(c, value_set=known), c, None) for c in (plain, in_split, names)]
    return pc.coalesce(*candidates, plain)


def _map_values(values: pa.ChunkedArray, mapping: dict[str, str]) -> pa.ChunkedArray:
    """Each value's entry in `mapping`, null where it has none."""
    found = pc.index_in(values, value_set=pa.array(list(mapping), pa.string()), skip_nulls=True)
    names = pa.array(list(mapping.values()), pa.string())
    return pa.chunked_array([names.take(chunk) for chunk in found.chunks], pa.string())


def _resolve_boxes(file: _AnnotationFile, start: int, categories: dict[str, str]) -> pa.Table:
    """The boxes of one file with image ids and category indices in place of the file's own ids."""
    originals = file.images["original_id"].combine_chunks()
    rows = pc.index_in(file.boxes["image_reference"], value_set=originals, skip_nulls=True)
    indices = pc.index_in(
        file.boxes["category_reference"], value_set=pa.array(list(categories), pa.string()), skip_nulls=True
    )
    table = file.boxes.set_column(0, "image_id", pc.add(rows.cast(pa.int64()), start))
    table = table.set_column(table.schema.get_field_index("category"), "category", indices)
    return table.cast(RAW_BOXES_SCHEMA)


def _listed_images(pictures: list[str]) -> pa.Table:
    """Rows for pictures that no file describes."""
    count = len(pictures)
    columns = {field.name: pa.nulls(count, field.type) for field in RAW_IMAGES_SCHEMA}
    columns["image_id"] = pa.array(np.arange(count))
    columns["path"] = pa.array(pictures, pa.string())
    columns["original_id"] = columns["source_record"] = columns["path"]
    columns["split"] = pa.array([UNLABELED_SPLIT] * count, pa.string())
    return pa.table(columns, schema=RAW_IMAGES_SCHEMA)


def _unlisted(images: pa.Table, pictures: list[str]) -> tuple[str, ...]:
    known = pa.array(pictures, pa.string())
    listed = pc.is_in(known, value_set=images["path"].combine_chunks())
    return tuple(known.filter(pc.invert(listed)).to_pylist())


def _source(files: list[_AnnotationFile]) -> str:
    """What the first file's info says: description, version and address."""
    if not files:
        return ""
    info = files[0].info
    parts = [str(info[key]) for key in ("description", "version", "url") if info.get(key)]
    return "; ".join(parts)


def _annotation_licence(files: list[_AnnotationFile]) -> str:
    """The licence named in info, or the only one of the list `licenses`; "unknown" where neither settles it.

    COCO has no field for it: `licenses` lists what the images are under. A list with one entry is read as the
    licence of the whole set.
    """
    named = {str(file.info[key]) for file in files for key in ("license", "licence") if file.info.get(key)}
    listed = {name for file in files for name in file.licences.values()}
    candidates = named or listed
    return candidates.pop() if len(candidates) == 1 else UNKNOWN_LICENCE
