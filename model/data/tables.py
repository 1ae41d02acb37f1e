"""The dataset contract: ``images.parquet``, ``boxes.parquet`` and ``dataset.json`` in one directory."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from model.data import mapped_tables
from model.data.image_set import Annotations, BoxColumns, Columns, ImageSet, OpenImage, concatenate

__all__ = [
    "BOXES_SCHEMA",
    "IMAGES_SCHEMA",
    "Annotations",
    "BoxColumns",
    "Dataset",
    "DatasetMetadata",
    "ImageSet",
    "OpenImage",
    "box_batches",
    "concatenate",
    "read_dataset",
    "write_dataset",
]

SCHEMA_VERSION = 1
ROWS_PER_GROUP = 1 << 20
HASH_COLUMN = "perceptual_hash"
IMAGES_FILE, BOXES_FILE, METADATA_FILE = "images.parquet", "boxes.parquet", "dataset.json"


def _schema(optional: tuple[str, ...] = (), **columns: pa.DataType) -> pa.Schema:
    return pa.schema([pa.field(name, kind, nullable=name in optional) for name, kind in columns.items()])


IMAGES_SCHEMA = _schema(
    optional=("sha256", "perceptual_hash", "licence"),
    image_id=pa.int64(),
    original_id=pa.string(),
    root=pa.int32(),  # index into metadata.roots
    path=pa.string(),  # relative to the root, "/" between folders
    width=pa.int32(),
    height=pa.int32(),
    split=pa.string(),
    sha256=pa.string(),  # null until the file was read
    perceptual_hash=pa.uint64(),  # near_duplicates.perceptual_hash of the upright picture; null until it was decoded
    licence=pa.string(),  # null: unknown
)
BOXES_SCHEMA = _schema(
    image_id=pa.int64(),
    category=pa.int32(),  # index into metadata.class_names
    x=pa.float64(),  # left edge, pixels of the original image
    y=pa.float64(),  # top edge
    w=pa.float64(),
    h=pa.float64(),
    area=pa.float64(),  # as annotated: COCO's size classes use it; below w * h where masks exist
    iscrowd=pa.bool_(),
    score=pa.float32(),  # 1.0 for human labels
    source=pa.string(),  # "label" or "pseudo"
    annotation_id=pa.string(),
    source_record=pa.string(),  # file and line or id that the box came from
)


@dataclass(frozen=True)
class DatasetMetadata:
    """What ``dataset.json`` says about a dataset; the only home of its class names."""

    name: str
    class_names: tuple[str, ...]
    category_ids: tuple[int, ...]  # ids of the source format, in the order of class_names
    roots: tuple[str, ...]  # symbolic names such as "target"; never a folder of this machine
    source: str = ""
    licences: dict[str, Any] = field(default_factory=lambda: {"images": {}, "annotations": "unknown"})
    split_rule: str = ""
    quarantined: dict[str, int] = field(default_factory=dict)  # images taken out, per split
    digests: dict[str, str] = field(default_factory=dict)  # what the tables were derived from

    def __post_init__(self) -> None:
        for name in ("class_names", "category_ids", "roots"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if len(self.class_names) != len(self.category_ids):
            raise ValueError(
                f"dataset {self.name!r} has {len(self.class_names)} class names but "
                f"{len(self.category_ids)} category ids; each class needs one id"
            )
        if len(set(self.class_names)) != len(self.class_names):
            raise ValueError(f"dataset {self.name!r} lists a class name twice: {list(self.class_names)}")


@dataclass(frozen=True)
class Dataset:
    """A dataset in memory: both tables sorted by image id, and views of them by split."""

    metadata: DatasetMetadata
    images: pa.Table
    columns: Columns
    read_boxes: Callable[[], pa.Table] = field(repr=False)

    @cached_property
    def boxes(self) -> pa.Table:
        """The whole table of boxes; training needs ``columns`` only, which large sets have without reading it."""
        return self.read_boxes()

    @property
    def split_names(self) -> list[str]:
        return sorted(pc.unique(self.images["split"]).to_pylist())

    def image_set(self) -> ImageSet:
        """Every image of every split."""
        return ImageSet(self.columns, self.metadata.class_names)

    def split(self, name: str) -> ImageSet:
        """The images of one split; ``ValueError`` when the dataset has no such split."""
        if name not in self.split_names:
            raise ValueError(f"dataset {self.metadata.name!r} has no split {name!r}; it has {self.split_names}")
        return self.image_set().subset(_numpy(pc.equal(self.images["split"], name)))


def write_dataset(directory: Path, images: pa.Table, boxes: pa.Table, metadata: DatasetMetadata) -> None:
    """Write the three files, rows sorted by image id (boxes of one image keep their order).

    Large sets get the folder ``mapped`` too (``mapped_tables``).

    Equal content gives equal bytes.  Raises ``ValueError`` naming column and value when the tables do not fit
    their schema or each other.
    """
    images, boxes = _conform(images, IMAGES_SCHEMA, IMAGES_FILE), _conform(boxes, BOXES_SCHEMA, BOXES_FILE)
    images = next(mapped_tables.parts(images, _order(images), max(len(images), 1)))
    _check_references(images, boxes, metadata, str(directory))
    directory.mkdir(parents=True, exist_ok=True)
    pq.write_table(images, directory / IMAGES_FILE, compression="zstd")
    _write_boxes(directory, images, boxes, metadata.roots)
    content = {"schema_version": SCHEMA_VERSION, **asdict(metadata)}
    text = json.dumps(content, indent=2, ensure_ascii=False, sort_keys=True) + "\n"
    (directory / METADATA_FILE).write_text(text, encoding="utf-8")


def read_dataset(directory: Path) -> Dataset:
    """Read what ``write_dataset`` wrote; ``ValueError`` names the file and what is wrong with it."""
    metadata = _read_metadata(directory / METADATA_FILE)
    rows = _row_counts(directory)
    if rows is not None and (mapped := mapped_tables.read(directory, *rows)) is not None:
        return Dataset(metadata, *mapped, lambda: _read_table(directory / BOXES_FILE, BOXES_SCHEMA))
    images = _read_table(directory / IMAGES_FILE, IMAGES_SCHEMA)
    boxes = _read_table(directory / BOXES_FILE, BOXES_SCHEMA)
    _check_references(images, boxes, metadata, str(directory))
    return Dataset(metadata, images, _columns(images, boxes, metadata.roots), lambda: boxes)


def box_batches(directory: Path, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """These columns of a dataset's boxes, batch by batch: the whole table of 25 million takes gigabytes.

    ``ValueError`` names the file and what is wrong with it.
    """
    path = directory / BOXES_FILE
    try:
        with pq.ParquetFile(path, memory_map=True) as file:
            yield from file.iter_batches(mapped_tables.ROWS_PER_BATCH, columns=list(columns), use_threads=False)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path} cannot be read as Parquet ({error}); write the dataset again") from error


def _row_counts(directory: Path) -> tuple[int, int] | None:
    """Images and boxes; None where the tables cannot be read, as reading them then tells."""
    try:
        images, boxes = (pq.read_metadata(directory / name).num_rows for name in (IMAGES_FILE, BOXES_FILE))
    except (pa.ArrowException, OSError):
        return None
    return images, boxes


def _write_boxes(directory: Path, images: pa.Table, boxes: pa.Table, roots: tuple[str, ...]) -> None:
    """Sorted part by part, since the texts of 25 million boxes take gigabytes."""
    mapped_tables.forget(directory)
    large = len(boxes) >= mapped_tables.FROM_BOXES
    mapped = mapped_tables.Writer(directory, images, len(boxes), roots) if large else None
    with pq.ParquetWriter(directory / BOXES_FILE, BOXES_SCHEMA, compression="zstd") as file:
        for part in mapped_tables.parts(boxes, _order(boxes), ROWS_PER_GROUP):
            file.write_table(part, row_group_size=ROWS_PER_GROUP)
            if mapped is not None:
                mapped.add(part)
    if mapped is not None:
        mapped.close()


def _order(table: pa.Table) -> NDArray[np.int64] | None:
    """The rows in the order of their image ids, None where they are."""
    ids = _numpy(table["image_id"])
    return None if (np.diff(ids) >= 0).all() else np.argsort(ids, kind="stable")


def _columns(images: pa.Table, boxes: pa.Table, roots: tuple[str, ...]) -> Columns:
    image_ids = _numpy(images["image_id"])
    bounds = np.append(image_ids, image_ids[-1] + 1 if len(image_ids) else 0)
    root_names = pa.array(roots, pa.string()).take(images["root"])
    return Columns(
        image_ids=image_ids,
        paths=pa.chunked_array(pc.binary_join_element_wise(root_names, images["path"], "/")),
        sha256=images["sha256"],
        sizes=np.stack([_numpy(images["width"]), _numpy(images["height"])], axis=1),
        first_box=np.searchsorted(_numpy(boxes["image_id"]), bounds).astype(np.int64),
        boxes_xywh=np.stack([_numpy(boxes[name]) for name in "xywh"], axis=1),
        labels=_numpy(boxes["category"]),
        scores=_numpy(boxes["score"]),
        is_crowd=_numpy(boxes["iscrowd"]),
        area=_numpy(boxes["area"]),
        annotation_ids=boxes["annotation_id"],
    )


def _numpy(column: pa.ChunkedArray) -> NDArray[Any]:
    values: NDArray[Any] = column.to_numpy(zero_copy_only=False) if len(column) else _empty(column.type)
    return values


def _empty(kind: pa.DataType) -> NDArray[Any]:
    return np.empty(0, kind.to_pandas_dtype())


def _conform(table: pa.Table, schema: pa.Schema, file_name: str) -> pa.Table:
    """Columns in the schema's order and types."""
    if missing := [name for name in schema.names if name not in table.column_names]:
        raise ValueError(f"{file_name} lacks the columns {missing}; it has {table.column_names}")
    if unknown := [name for name in table.column_names if name not in schema.names]:
        raise ValueError(f"{file_name} has unknown columns {unknown}; allowed are {schema.names}")
    for name in schema.names:
        if table[name].null_count and not schema.field(name).nullable:
            raise ValueError(f"{file_name}: column {name!r} has {table[name].null_count} empty values; it needs all")
    return table.select(schema.names).replace_schema_metadata(None).cast(schema)


def _check_references(images: pa.Table, boxes: pa.Table, metadata: DatasetMetadata, where: str) -> None:
    image_ids = _numpy(images["image_id"])
    repeated = image_ids[1:][np.diff(image_ids) == 0]
    if len(repeated):
        raise ValueError(f"{where}: image_id {repeated[0]} occurs more than once; ids must be unique")
    owners = _numpy(boxes["image_id"])
    orphans = owners[~np.isin(owners, image_ids)]
    if len(orphans):
        raise ValueError(f"{where}: {len(orphans)} boxes belong to no image, the first to image_id {orphans.min()}")
    _check_range(_numpy(images["root"]), len(metadata.roots), f"{where}: images.root", "roots")
    _check_range(_numpy(boxes["category"]), len(metadata.class_names), f"{where}: boxes.category", "class names")


def _check_range(values: NDArray[Any], count: int, column: str, meaning: str) -> None:
    outside = values[(values < 0) | (values >= count)]
    if len(outside):
        raise ValueError(f"{column} holds {outside[0]}, but there are only {count} {meaning}")


def _read_table(path: Path, schema: pa.Schema) -> pa.Table:
    """A table as ``write_dataset`` wrote it; releases that knew no perceptual hashes wrote none, so they are null."""
    if not path.is_file():
        raise ValueError(
            f"{path} does not exist; a dataset directory holds {IMAGES_FILE}, {BOXES_FILE}, {METADATA_FILE}"
        )
    try:
        table = pq.read_table(path, memory_map=True)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path} cannot be read as Parquet ({error}); write the dataset again") from error
    older = [name for name in schema.names if name != HASH_COLUMN]
    if HASH_COLUMN in schema.names and table.column_names == older:
        place = schema.get_field_index(HASH_COLUMN)
        table = table.add_column(place, schema.field(HASH_COLUMN), pa.nulls(len(table), pa.uint64()))
    if not table.schema.equals(schema):
        raise ValueError(f"{path} has other columns than this version expects; write the dataset again")
    return table.combine_chunks()


def _read_metadata(path: Path) -> DatasetMetadata:
    if not path.is_file():
        raise ValueError(
            f"{path} does not exist; a dataset directory holds {IMAGES_FILE}, {BOXES_FILE}, {METADATA_FILE}"
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}); write the dataset again") from error
    version = content.pop("schema_version", None)
    if version != SCHEMA_VERSION:
        raise ValueError(f"{path} has schema version {version}, this program reads {SCHEMA_VERSION}; write it again")
    try:
        return DatasetMetadata(**content)
    except TypeError as error:
        raise ValueError(f"{path} has fields that do not fit ({error}); write the dataset again") from error
