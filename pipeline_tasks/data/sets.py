"""Sets as the commands of `nasline data` see them: a folder of any known format, or a DVC revision of one."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline_tasks.data.raw import RawDataset
from pipeline_tasks.data.readers import Recognised, open_reader
from pipeline_tasks.errors import DataError, UsageError


@dataclass(frozen=True)
class OpenSet:
    """A set that was read: where its pictures lie, what its format is, and its rows."""

    folder: Path
    recognised: Recognised
    raw: RawDataset

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.raw.metadata.class_names


@contextmanager
def open_set(address: str, given_format: str | None = None) -> Iterator[OpenSet]:
    """Read the set at `address`: a folder, or FOLDER@REVISION, a Git revision under which DVC tracks it.

    The files of a revision are there as long as the block runs. Raises `DataError` for what cannot be read, and
    `UsageError` for a revision of a folder that DVC does not track.
    """
    folder, revision = _parts(address)
    if revision is None:
        yield _read(folder, given_format)
        return
    from pipeline_tasks.data.revisions import check_out

    project = _project_of(folder)
    with tempfile.TemporaryDirectory(prefix="nasline-", dir=project / ".dvc" / "tmp") as scratch:
        target = Path(scratch, folder.name)
        check_out(folder, revision, target)
        yield _read(target, given_format)


def _parts(address: str) -> tuple[Path, str | None]:
    """An existing folder is taken as it is, also with an @ in its name."""
    whole = Path(address)
    if whole.is_dir() or "@" not in address:
        return whole, None
    folder, revision = address.rsplit("@", 1)
    return Path(folder), revision


def _project_of(folder: Path) -> Path:
    from pipeline_tasks.data.versioning import project_root

    project = project_root(folder)
    if project is None:
        raise UsageError(f"{folder} lies outside of a DVC project, so it has no revisions; give a folder")
    (project / ".dvc" / "tmp").mkdir(exist_ok=True)
    return project


def _read(folder: Path, given_format: str | None) -> OpenSet:
    if not folder.is_dir():
        pointer = folder.with_name(folder.name + ".dvc")
        remedy = f"run `dvc pull {pointer}`" if pointer.is_file() else "give the folder of a dataset"
        raise DataError(f"{folder} is not a folder; {remedy}")
    reader = open_reader(folder, given_format)
    return OpenSet(folder, reader.recognised, reader.read(name=folder.resolve().name))


def usable_images(raw: RawDataset) -> pa.Table:
    """The image rows without a fault, which name a file."""
    return raw.images.filter(pc.and_(pc.is_null(raw.images["fault"]), pc.is_valid(raw.images["path"])))


def usable_boxes(raw: RawDataset) -> pa.Table:
    """The box rows of usable images that have a known class and finite numbers.

    Rows with a fault are `nasline data validate`'s business; the other commands leave them out.
    """
    boxes = raw.boxes
    finite = np.logical_and.reduce([np.isfinite(_floats(boxes[name])) for name in "xywh"])
    known = pc.is_in(boxes["image_id"], value_set=usable_images(raw)["image_id"].combine_chunks())
    whole = pc.and_(pc.and_(known, pc.is_valid(boxes["category"])), pc.is_null(boxes["fault"]))
    return boxes.filter(pc.and_(whole, pa.chunked_array([pa.array(finite)])))


def distinct(values: NDArray[np.int64]) -> NDArray[np.int64]:
    """The different values, ascending. numpy.unique hashes, which takes minutes for 25 million close numbers."""
    ordered = np.sort(values)
    different: NDArray[np.int64] = ordered[np.diff(ordered, prepend=ordered[:1] - 1) != 0]
    return different


def _floats(column: pa.ChunkedArray) -> np.ndarray:
    values: np.ndarray = column.cast(pa.float64()).fill_null(np.nan).to_numpy()
    return values
