"""Readers of COCO folders and of folders with unlabelled pictures."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from model.data.tables import DatasetMetadata
from pipeline_tasks import bucket_images
from pipeline_tasks.data.coco_files import AnnotationFile, read_file
from pipeline_tasks.data.raw import (
    RAW_BOXES_SCHEMA,
    RAW_IMAGES_SCHEMA,
    SPLITS,
    UNLABELED_SPLIT,
    Problem,
    RawDataset,
)
from pipeline_tasks.data.split_names import split_of_folder
from pipeline_tasks.errors import DataError

UNKNOWN_LICENCE = "unknown"
PICTURE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"})


def read_coco_folder(
    path: Path, root_name: str, required_splits: Sequence[str] = SPLITS, name: str | None = None
) -> RawDataset:
    """Read `images/` and `annotations/instances_{train,val,test}.json` below `path`.

    A picture is looked for at images/FILE_NAME, then images/SPLIT/FILE_NAME, then FILE_NAME. `root_name` is
    the symbolic root of the tables and, unless `name` is given, the dataset's name. Malformed records become
    rows with a fault. `DataError`: the folder cannot be understood at all, the files' class lists differ, or a
    required split has no images or no boxes.
    """
    pictures = list_pictures(path)
    files = _read_splits(path, required_splits)
    categories = _common_categories(path, files)
    rule = "annotations/instances_SPLIT.json"
    return assemble(files, pictures, categories, root_name, required_splits, name or root_name, rule)


def assemble(
    files: Sequence[AnnotationFile],
    pictures: Sequence[str],
    categories: dict[str, int],
    root_name: str,
    required_splits: Sequence[str],
    name: str,
    split_rule: str,
    notes: tuple[Problem, ...] = (),
) -> RawDataset:
    """One set of several annotation files; `pictures` lie below its folder, `categories` are class names and ids."""
    images = resolve_images(files, pictures)
    boxes = pa.concat_tables(_resolve_boxes(file, row, categories) for file, row in _with_first_row(files))
    metadata = DatasetMetadata(
        name=name,
        class_names=tuple(categories),
        category_ids=tuple(categories.values()),
        roots=(root_name,),
        source=_source(files),
        licences={"images": licence_counts(images["licence"]), "annotations": _annotation_licence(files)},
        split_rule=split_rule,
        digests={file.name: file.sha256 for file in files},
    )
    notes = (*(note for file in files for note in file.notes), *notes)
    return RawDataset(images, boxes, metadata, tuple(required_splits), unlisted(images, pictures), notes)


def read_unlabeled_folder(path: Path, root_name: str, name: str | None = None) -> RawDataset:
    """Read `images/` and, where it exists, `images.json` (COCO layout without annotations) below `path`.

    Without images.json every picture below images/ counts, its licence and recorded size unknown. All images
    are in the split "unlabeled". Raises `DataError` as `read_coco_folder` does.
    """
    pictures = list_pictures(path)
    described = "images.json" if (path / "images.json").is_file() else None
    return read_pictures(path, pictures, described, root_name, name or root_name)


def read_pictures(path: Path, pictures: Sequence[str], described: str | None, root_name: str, name: str) -> RawDataset:
    """The pictures below `path` without boxes, as the file `described` lists them, or as they lie there."""
    files = [] if described is None else [read_file(path, described, UNLABELED_SPLIT, required=("images",))]
    images = resolve_images(files, pictures) if files else _listed_images(pictures)
    if not len(images):
        raise DataError(f"{path} holds no images; an unlabelled set needs pictures in images/")
    metadata = DatasetMetadata(
        name=name,
        class_names=(),
        category_ids=(),
        roots=(root_name,),
        source=_source(files),
        licences={"images": licence_counts(images["licence"]), "annotations": "none"},
        split_rule="none",
        digests={file.name: file.sha256 for file in files},
    )
    lost = unlisted(images, pictures)
    notes = tuple(note for file in files for note in file.notes)
    return RawDataset(images, RAW_BOXES_SCHEMA.empty_table(), metadata, (UNLABELED_SPLIT,), lost, notes)


def licence_counts(licences: pa.ChunkedArray) -> dict[str, int]:
    """Images by licence name, in order of the names; "unknown" where none is recorded."""
    counts = Counter(UNKNOWN_LICENCE if value is None else value for value in licences.to_pylist())
    return dict(sorted(counts.items()))


def list_pictures(path: Path) -> list[str]:
    """Pictures below images/, relative to `path` with "/" between folders, sorted."""
    if not path.is_dir():
        pointer = path.with_name(path.name + ".dvc")
        remedy = f"run `dvc pull {pointer}`" if pointer.is_file() else "give the folder of a dataset"
        raise DataError(f"{path} is not a folder; {remedy}")
    if (bucket := bucket_images.of_folder(path)) is not None:
        return bucket.paths()
    if not (path / "images").is_dir():
        raise DataError(f"{path} has no folder images/; put the pictures there")
    found = []
    for folder, _, names in os.walk(path / "images", followlinks=True):
        prefix = Path(folder).relative_to(path).as_posix()
        found += [f"{prefix}/{name}" for name in names if is_picture(name)]
    return sorted(found)


def is_picture(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in PICTURE_SUFFIXES and not name.startswith(".")


def _read_splits(path: Path, required_splits: Sequence[str]) -> Sequence[AnnotationFile]:
    """The annotation files that exist; `DataError` for a required one that is missing or empty."""
    files = []
    for split in SPLITS:
        relative = f"annotations/instances_{split}.json"
        if (path / relative).is_file():
            file = read_file(path, relative, split, required=("images", "annotations", "categories"))
            if split in required_splits:
                check_not_empty(path, file, split)
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


def _common_categories(path: Path, files: Sequence[AnnotationFile]) -> dict[str, int]:
    """The class list that all files share, name to id; `DataError` names the first difference."""
    first = files[0]
    if not first.categories:
        raise DataError(f"{path / first.name}: 'categories' is empty; at least one class is needed")
    for difference in category_differences(files):
        raise DataError(f"{path / difference.file}: {difference.detail}; all splits need the same categories")
    return {class_name: int(identifier) for identifier, class_name in first.categories.items()}


def category_differences(files: Sequence[AnnotationFile]) -> Iterator[Problem]:
    """Each id that a later file names otherwise than the first one."""
    first = files[0]
    for other in files[1:]:
        for identifier in dict.fromkeys([*first.categories, *other.categories]):
            ours, theirs = first.categories.get(identifier), other.categories.get(identifier)
            if ours != theirs:
                detail = f"category {identifier} is {theirs!r}, but {ours!r} in {first.name}"
                yield Problem("categories_agree", other.name, "/categories", detail)


def check_not_empty(path: Path, file: AnnotationFile, split: str) -> None:
    if not len(file.images):
        raise DataError(f"{path / file.name} lists no images; the split {split} must not be empty")
    if not len(file.boxes):
        purpose = "training needs some" if split == "train" else "accuracy cannot be measured without"
        raise DataError(f"{path / file.name} lists {len(file.images)} images but no boxes; {purpose}")


def _with_first_row(files: Sequence[AnnotationFile]) -> list[tuple[AnnotationFile, int]]:
    """Each file with the number of image rows before it."""
    starts = np.cumsum([0] + [len(file.images) for file in files])
    return list(zip(files, starts[:-1].tolist(), strict=True))


def resolve_images(files: Sequence[AnnotationFile], pictures: Sequence[str]) -> pa.Table:
    """The images of all files, with ids 0 …, licences by name and paths below the dataset folder."""
    tables = []
    for file, start in _with_first_row(files):
        names, splits = file.images["path"], file.images["split"]
        ids = pa.array(np.arange(start, start + len(file.images)))
        paths = _existing_paths(names, splits, _picture_folders(file, pictures), pictures)
        licences = _map_values(file.images["licence"], file.licences)
        table = file.images.set_column(0, "image_id", ids)
        table = table.set_column(table.schema.get_field_index("path"), "path", paths)
        tables.append(table.set_column(table.schema.get_field_index("licence"), "licence", licences))
    return pa.concat_tables(tables).cast(RAW_IMAGES_SCHEMA)


def _existing_paths(
    names: pa.ChunkedArray, splits: pa.ChunkedArray, folders: Sequence[str], pictures: Sequence[str]
) -> pa.ChunkedArray:
    """Where each file name lies, in images/ or one of the `folders`; images/FILE_NAME where it is found nowhere."""
    plain = pc.binary_join_element_wise("images", names, "/")
    in_split = pc.binary_join_element_wise("images", splits, names, "/")
    others = [pc.binary_join_element_wise(folder, names, "/") for folder in folders]
    known = pa.array(pictures, pa.string())
    candidates = [pc.if_else(pc.is_in(c, value_set=known), c, None) for c in (plain, in_split, names, *others)]
    return pc.coalesce(*candidates, plain)


def _picture_folders(file: AnnotationFile, pictures: Sequence[str]) -> list[str]:
    """Folders outside images/ where a file's pictures may lie: its own, and those that are named after its split."""
    split = file.images["split"][0].as_py() if len(file.images) else None
    above = {str(parent) for parent in PurePosixPath(file.name).parents} - {"."}
    holders = {parent for picture in dict.fromkeys(map(_folder, pictures)) for parent in _with_parents(picture)}
    named = {holder for holder in holders if split is not None and split_of_folder(holder.rsplit("/", 1)[-1]) == split}
    return sorted(above) + sorted(named - above)


def _folder(picture: str) -> str:
    return picture.rpartition("/")[0]


def _with_parents(folder: str) -> Iterator[str]:
    while folder:
        yield folder
        folder = _folder(folder)


def _map_values(values: pa.ChunkedArray, mapping: dict[str, str]) -> pa.ChunkedArray:
    """Each value's entry in `mapping`, null where it has none."""
    found = pc.index_in(values, value_set=pa.array(list(mapping), pa.string()), skip_nulls=True)
    names = pa.array(list(mapping.values()), pa.string())
    return pa.chunked_array([names.take(chunk) for chunk in found.chunks], pa.string())


def _resolve_boxes(file: AnnotationFile, start: int, categories: dict[str, int]) -> pa.Table:
    """The boxes of one file with image ids and category indices in place of the file's own ids."""
    known = {
        "image_reference": file.images["original_id"].combine_chunks(),
        "category_reference": pa.array(list(file.categories), pa.string()),
    }
    with ThreadPoolExecutor(len(known)) as threads:
        rows, own = threads.map(
            lambda name: pc.index_in(file.boxes[name], value_set=known[name], skip_nulls=True), known
        )  # fmt: skip
    names = list(categories)
    places = pa.array([names.index(class_name) for class_name in file.categories.values()], pa.int32())
    indices = pa.chunked_array([places.take(chunk) for chunk in own.chunks], pa.int32())
    table = file.boxes.set_column(0, "image_id", pc.add(rows.cast(pa.int64()), start))
    table = table.set_column(table.schema.get_field_index("category"), "category", indices)
    return table.cast(RAW_BOXES_SCHEMA)


def _listed_images(pictures: Sequence[str]) -> pa.Table:
    """Rows for pictures that no file describes."""
    count = len(pictures)
    columns = {field.name: pa.nulls(count, field.type) for field in RAW_IMAGES_SCHEMA}
    columns["image_id"] = pa.array(np.arange(count))
    columns["path"] = pa.array(pictures, pa.string())
    columns["original_id"] = columns["source_record"] = columns["path"]
    columns["split"] = pa.array([UNLABELED_SPLIT] * count, pa.string())
    return pa.table(columns, schema=RAW_IMAGES_SCHEMA)


def unlisted(images: pa.Table, pictures: Sequence[str]) -> tuple[str, ...]:
    known = pa.array(pictures, pa.string())
    listed = pc.is_in(known, value_set=images["path"].combine_chunks())
    return tuple(known.filter(pc.invert(listed)).to_pylist())


def _source(files: Sequence[AnnotationFile]) -> str:
    """What the first file's info says: description, version and address."""
    if not files:
        return ""
    info = files[0].info
    parts = [str(info[key]) for key in ("description", "version", "url") if info.get(key)]
    return "; ".join(parts)


def _annotation_licence(files: Sequence[AnnotationFile]) -> str:
    """The licence named in info, or the only one of the list `licenses`; "unknown" where neither settles it.

    COCO has no field for it: `licenses` lists what the images are under. A list with one entry is read as the
    licence of the whole set.
    """
    named = {str(file.info[key]) for file in files for key in ("license", "licence") if file.info.get(key)}
    listed = {name for file in files for name in file.licences.values()}
    candidates = named or listed
    return candidates.pop() if len(candidates) == 1 else UNKNOWN_LICENCE
