"""Rows collected to an Arrow table that lies in memory while it is small, and in a temporary file from then on."""

from __future__ import annotations

import itertools
import mmap
import tempfile
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline_tasks.errors import DataError

ROWS_PER_BATCH = 65536
MOST_WAITING_ROWS = 4 * ROWS_PER_BATCH
"""Worked on at once: between two of its steps the thread waits for Python's lock, 5 ms where the caller has it."""
MOST_BYTES_IN_MEMORY = 64 << 20

_MAPPED: weakref.WeakSet[mmap.mmap] = weakref.WeakSet()


@dataclass(frozen=True)
class Columns:
    """Rows as arrays, and what makes them a batch of the table; equal arrays of several are joined before."""

    make: Callable[[dict[str, NDArray[Any]]], pa.RecordBatch]
    arrays: dict[str, NDArray[Any]]

    def __len__(self) -> int:
        return len(next(iter(self.arrays.values())))


class TableBuilder:
    """Collects rows and turns each 65536 of them into an Arrow batch, so that their Python objects can go.

    Batches beyond `most_bytes` go to a file in the folder for temporary files (TMPDIR), which the finished table maps:
    its pages are read when they are looked at, shared after a fork, and given back by the system when memory is short.
    The file has no name, so nothing stays behind. Raises `DataError` when there is no room for it. Arrow writes without
    Python's lock, so a thread of its own does it while the caller decodes what comes next.
    """

    def __init__(self, schema: pa.Schema, most_bytes: int = MOST_BYTES_IN_MEMORY) -> None:
        self._schema, self._most_bytes = schema, most_bytes
        self._rows: list[tuple[Any, ...]] = []
        self._waiting: list[pa.RecordBatch | Columns] = []  # too small to be kept on their own
        self._batches: list[pa.RecordBatch] = []
        self._file: IO[bytes] | None = None
        self._written: pa.NativeFile | None = None
        self._writer: pa.RecordBatchFileWriter | None = None
        self._thread = ThreadPoolExecutor(1, "table-builder")  # starts with the first thing to do
        self._in_work: Future[None] | None = None

    def append(self, row: tuple[Any, ...]) -> None:
        """Add one row, its values in the order of the schema."""
        self._rows.append(row)
        if len(self._rows) == ROWS_PER_BATCH:
            self._flush()

    def append_batch(self, batch: pa.RecordBatch | Columns) -> None:
        """Add many rows that are columns already, or become some in the thread."""
        self._flush()
        self._wait(batch)

    def finish(self) -> pa.Table:
        """The table of all rows; nothing can be added any more."""
        self._flush()
        self._settle()
        self._thread.shutdown()
        self._keep(self._waiting)
        if self._writer is None or self._written is None or self._file is None:
            return pa.Table.from_batches(self._batches, self._schema)
        try:
            self._writer.close()
            self._written.close()
        except OSError as error:
            raise _no_room(error) from error
        with self._file as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        _MAPPED.add(mapped)
        return pa.ipc.open_file(pa.py_buffer(mapped)).read_all()

    def _flush(self) -> None:
        if self._rows:
            columns = [pa.array(c, f.type) for c, f in zip(zip(*self._rows, strict=True), self._schema, strict=True)]
            self._rows = []
            self._wait(pa.RecordBatch.from_arrays(columns, schema=self._schema))

    def _wait(self, batch: pa.RecordBatch | Columns) -> None:
        self._waiting.append(batch)
        if sum(map(len, self._waiting)) >= MOST_WAITING_ROWS:
            self._settle()
            self._in_work = self._thread.submit(self._keep, self._waiting)
            self._waiting = []

    def _settle(self) -> None:
        """Wait for what is in work, and tell its failure; so no more than that and what waits is in memory."""
        if self._in_work is not None:
            self._in_work.result()

    def _keep(self, waiting: Sequence[pa.RecordBatch | Columns]) -> None:
        """Join what waits to one batch, and keep it in memory or in the file."""
        self._batches += pa.Table.from_batches(_made(waiting), self._schema).combine_chunks().to_batches()
        if self._writer is not None or sum(batch.nbytes for batch in self._batches) > self._most_bytes:
            self._write()

    def _write(self) -> None:
        try:
            if self._writer is None:
                self._file = tempfile.TemporaryFile(prefix="nasline-records-")  # noqa: SIM115 (`finish` closes it)
                self._written = pa.OSFile(_path_of(self._file), "wb")
                self._writer = pa.ipc.new_file(self._written, self._schema)
            for batch in self._batches:
                self._writer.write_batch(batch)
        except OSError as error:
            raise _no_room(error) from error
        self._batches = []


def _made(waiting: Sequence[pa.RecordBatch | Columns]) -> Iterator[pa.RecordBatch]:
    for make, group in itertools.groupby(waiting, lambda one: one.make if isinstance(one, Columns) else None):
        if make is None:
            yield from group
        else:
            parts = [one.arrays for one in group]
            yield make({name: np.concatenate([part[name] for part in parts]) for name in parts[0]})


def release_pages() -> None:
    """Take the pages of finished tables out of this process's memory; they come back from the system's cache, or from
    the file, when they are looked at again. For the borders between passes over a large table.
    """
    for mapped in list(_MAPPED):
        mapped.madvise(mmap.MADV_DONTNEED)


def _no_room(error: OSError) -> DataError:
    return DataError(
        f"the records cannot be kept in {tempfile.gettempdir()} ({error.strerror or error}); make room there, or set "
        "TMPDIR to a folder with some"
    )


def _path_of(file: IO[bytes]) -> str:
    """A path to an open file that has no name."""
    return str(Path("/dev/fd", str(file.fileno())))
