"""A table that is kept in a file is the one that is kept in memory."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pyarrow as pa
import pytest

from pipeline_tasks.data import table_builder
from pipeline_tasks.data.table_builder import TableBuilder
from pipeline_tasks.errors import DataError

SCHEMA = pa.schema({"number": pa.int64(), "text": pa.string()})


def built(most_bytes: int) -> pa.Table:
    builder = TableBuilder(SCHEMA, most_bytes)
    for number in range(1003):
        builder.append((number, None if number % 7 else f"row {number}"))
    for number in range(3):
        builder.append_batch(pa.record_batch([[-number] * 700, ["x"] * 700], schema=SCHEMA))
    builder.append((5, "last"))
    return builder.finish()


def test_a_table_in_a_file_equals_one_in_memory_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(table_builder, "ROWS_PER_BATCH", 1000)
    in_memory = built(1 << 40)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    before = pa.total_allocated_bytes()
    in_file = built(0)
    assert in_file.equals(in_memory) and len(in_file) == 1003 + 2100 + 1
    assert in_file["text"][-1].as_py() == "last" and list(tmp_path.iterdir()) == []
    assert pa.total_allocated_bytes() - before < in_file.nbytes / 10, "the columns are mapped, not read"
    opened = [os.path.realpath(Path("/dev/fd", name)) for name in os.listdir("/dev/fd")]
    assert not [path for path in opened if path.startswith(str(tmp_path))]


def test_an_empty_table() -> None:
    assert TableBuilder(SCHEMA, 0).finish().equals(SCHEMA.empty_table())


def test_no_room_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "absent"))
    with pytest.raises(DataError, match=r"absent.*set TMPDIR to a folder with some"):
        built(0)
