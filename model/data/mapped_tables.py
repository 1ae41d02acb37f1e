"""The columns that training reads, as files which are mapped into memory: nothing is read or copied to open them.

``boxes.parquet`` of Objects365 takes seconds to decode and a gigabyte in every process that does. ``write_dataset``
therefore lays the columns of large sets down beside it once more, as they are needed in memory. The processes of a
machine share one copy of their pages, whether they were forked or not.
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from model.data.image_set import Columns

FOLDER = "mapped"
FROM_BOXES = 1_000_000
"""Smaller sets are read from Parquet, in about a second at most."""
ROWS_PER_BATCH = 1 << 16
_BOX_COLUMNS = {"labels": "category", "scores": "score", "is_crowd": "iscrowd", "area": "area"}
_KINDS = {"labels": np.int32, "scores": np.float32, "is_crowd": np.bool_, "area": np.float64}

_IDS_SCHEMA = pa.schema([pa.field("annotation_id", pa.string(), nullable=False)])


class Writer:
    """Writes the folder ``mapped`` of a dataset from its sorted tables, the boxes part by part."""

    def __init__(self, directory: Path, images: pa.Table, boxes: int, roots: tuple[str, ...]) -> None:
        self._folder = directory / FOLDER
        self._folder.mkdir()
        root_names = pa.array(roots, pa.string()).take(images["root"].combine_chunks())
        paths = pc.binary_join_element_wise(root_names, images["path"].combine_chunks(), "/")
        self._write_texts("images", images.append_column("rooted_path", paths))
        self._image_ids = images["image_id"].to_numpy()
        self._counts = np.zeros(len(images), np.int64)
        self._xywh = self._new("boxes_xywh", np.float64, (boxes, 4))
        self._columns = {name: self._new(name, kind, (boxes,)) for name, kind in _KINDS.items()}
        self._ids = pa.OSFile(str(self._folder / "annotation_ids.arrow"), "wb")
        self._id_writer = pa.ipc.new_file(self._ids, _IDS_SCHEMA)

    def add(self, boxes: pa.Table) -> None:
        """The next boxes, sorted by image id."""
        self._xywh.write(np.stack([boxes[side].to_numpy() for side in "xywh"], axis=1).tobytes())
        for name, column in _BOX_COLUMNS.items():
            self._columns[name].write(boxes[column].to_numpy().astype(_KINDS[name]).tobytes())
        self._id_writer.write_table(boxes.select(["annotation_id"]))
        owners = np.searchsorted(self._image_ids, boxes["image_id"].to_numpy())
        self._counts += np.bincount(owners, minlength=len(self._counts))

    def close(self) -> None:
        """Write what is known at the end."""
        self._id_writer.close()
        self._ids.close()
        for file in (self._xywh, *self._columns.values()):
            file.close()
        np.save(self._folder / "first_box.npy", np.concatenate([[0], np.cumsum(self._counts)]).astype(np.int64))

    def _new(self, name: str, kind: Any, shape: tuple[int, ...]) -> IO[bytes]:
        """A file that the rows are appended to; mapped for writing, a full disk would end the process (SIGBUS)."""
        file = (self._folder / f"{name}.npy").open("wb")
        header = {"descr": np.lib.format.dtype_to_descr(np.dtype(kind)), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        return file

    def _write_texts(self, name: str, table: pa.Table) -> None:
        with pa.OSFile(str(self._folder / f"{name}.arrow"), "wb") as file, pa.ipc.new_file(file, table.schema) as out:
            out.write_table(table.combine_chunks())


def forget(directory: Path) -> None:
    """Remove the folder of tables that are written anew."""
    shutil.rmtree(directory / FOLDER, ignore_errors=True)


def parts(table: pa.Table, order: NDArray[np.int64] | None, rows: int) -> Iterator[pa.Table]:
    """The table in this order, at most so many rows at a time; an empty table is one part."""
    batches = [] if order is None else table.to_batches(max_chunksize=ROWS_PER_BATCH)
    first_rows = np.cumsum([0, *map(len, batches)])
    for start in range(0, max(len(table), 1), rows):
        if order is None:
            yield table.slice(start, rows).combine_chunks()
        else:
            yield _gathered(batches, first_rows, order[start : start + rows], table.schema)


def _gathered(
    batches: list[pa.RecordBatch], first_rows: NDArray[np.int64], rows: NDArray[np.int64], schema: pa.Schema
) -> pa.Table:
    """These rows of the batches: `Table.take` joins a whole column of texts for each part, 1.5 GB of 25 million."""
    rising = np.argsort(rows, kind="stable")
    bounds = np.searchsorted(rows[rising], first_rows)
    pieces = [
        batch.take(pa.array(rows[rising[first:end]] - first_row))
        for batch, first_row, (first, end) in zip(batches, first_rows, itertools.pairwise(bounds), strict=False)
        if first < end
    ]
    places = np.empty(len(rows), np.int64)
    places[rising] = np.arange(len(rows))
    return pa.Table.from_batches(pieces, schema).combine_chunks().take(pa.array(places)).combine_chunks()


def read(directory: Path, images: int, boxes: int) -> tuple[pa.Table, Columns] | None:
    """The table of images and the columns; None for a set without the folder.

    Raises ``ValueError`` where the folder is damaged or belongs to tables with other numbers of rows.
    """
    folder = directory / FOLDER
    if not folder.is_dir():
        return None
    try:
        table, annotation_ids = _table(folder / "images.arrow"), _table(folder / "annotation_ids.arrow")
        arrays = {name: _array(folder / f"{name}.npy") for name in ("boxes_xywh", "first_box", *_KINDS)}
    except (OSError, ValueError, pa.ArrowException) as error:
        raise ValueError(f"{folder} cannot be read ({error}); remove it, or write the dataset again") from error
    lengths = {len(annotation_ids), *(len(array) for name, array in arrays.items() if name != "first_box")}
    if (lengths, len(table), len(arrays["first_box"])) != ({boxes}, images, images + 1):
        raise ValueError(f"{folder} does not belong to the tables beside it; remove it, or write the dataset again")
    columns = Columns(
        image_ids=table["image_id"].to_numpy(),
        paths=table["rooted_path"],
        sha256=table["sha256"],
        sizes=np.stack([table[side].to_numpy() for side in ("width", "height")], axis=1),
        annotation_ids=annotation_ids["annotation_id"],
        **arrays,
    )
    return table.drop_columns(["rooted_path"]), columns


def _table(file: Path) -> pa.Table:
    return pa.ipc.open_file(pa.memory_map(str(file))).read_all()


def _array(file: Path) -> NDArray[Any]:
    """Read-only, and a plain array: numpy's class of mapped ones takes longer to slice."""
    return np.asarray(np.load(file, mmap_mode="r"))
