"""Rows collected to an Arrow table that lies in memory while it is small, and in a temporary file from then on."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import IO, Any

import pyarrow as pa

from pipeline_tasks.errors import DataError

ROWS_PER_BATCH = 65536
MOST_BYTES_IN_MEMORY = 64 << 20


class TableBuilder:
    """Collects rows and turns each 65536 of them into an Arrow batch, so that their Python objects can go.

    Batches beyond `most_bytes` go to a file in the folder for temporary files (TMPDIR), which the finished table maps:
    its pages are read when they are looked at, shared after a fork, and given back by the system when memory is short.
    The file has no name, so nothing stays behind. Raises `DataError` when there is no room for it.
    """

    def __init__(self, schema: pa.Schema, most_bytes: int = MOST_BYTES_IN_MEMORY) -> None:
        self._schema, self._most_bytes = schema, most_bytes
        self._rows: list[tuple[Any, ...]] = []
        self._waiting: list[pa.RecordBatch] = []  # too small to be kept on their own
        self._batches: list[pa.RecordBatch] = []
        self._file: IO[bytes] | None = None
        self._writer: pa.RecordBatchFileWriter | None = None

    def append(self, row: tuple[Any, ...]) -> None:
        """Add one row, its values in the order of the schema."""
        self._rows.append(row)
        if len(self._rows) == ROWS_PER_BATCH:
            self._flush()

    def append_batch(self, batch: pa.RecordBatch) -> None:
        """Add many rows that are columns already."""
        self._flush()
        self._wait(batch)

    def finish(self) -> pa.Table:
        """The table of all rows; nothing can be added any more."""
        self._flush()
        self._keep()
        if self._writer is None or self._file is None:
            return pa.Table.from_batches(self._batches, self._schema)
        try:
            self._writer.close()
            self._file.flush()
        except OSError as error:
            raise _no_room(error) from error
        # Closed here, not when the last reference goes: Arrow's reading threads may hold theirs a little longer.
        with self._file as file, pa.memory_map(_path_of(file)) as mapped:
            return pa.ipc.open_file(mapped).read_all()

    def _flush(self) -> None:
        if self._rows:
            columns = [pa.array(c, f.type) for c, f in zip(zip(*self._rows, strict=True), self._schema, strict=True)]
            self._rows = []
            self._wait(pa.RecordBatch.from_arrays(columns, schema=self._schema))

    def _wait(self, batch: pa.RecordBatch) -> None:
        self._waiting.append(batch)
        if sum(len(waiting) for waiting in self._waiting) >= ROWS_PER_BATCH:
            self._keep()

    def _keep(self) -> None:
        """Join what waits to one batch, and keep it in memory or in the file."""
        if not self._waiting:
            return
        joined = pa.Table.from_batches(self._waiting, self._schema).combine_chunks()
        self._waiting = []
        self._batches += joined.to_batches()
        if self._writer is not None or sum(batch.nbytes for batch in self._batches) > self._most_bytes:
            self._write()

    def _write(self) -> None:
        try:
            if self._writer is None:
                self._file = tempfile.TemporaryFile(prefix="nasline-records-")  # noqa: SIM115 (`finish` closes it)
                self._writer = pa.ipc.new_file(self._file, self._schema)
            for batch in self._batches:
                self._writer.write_batch(batch)
        except OSError as error:
            raise _no_room(error) from error
        self._batches = []


def _no_room(error: OSError) -> DataError:
    return DataError(
        f"the records cannot be kept in {tempfile.gettempdir()} ({error.strerror or error}); make room there, or set "
        "TMPDIR to a folder with some"
    )


def _path_of(file: IO[bytes]) -> str:
    """A path to an open file that has no name."""
    return str(Path("/dev/fd", str(file.fileno())))
