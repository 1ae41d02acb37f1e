"""A table that is kept in a file is the one that is kept in memory."""

from __future__ import annotations

import os
import re
import tempfile
import time
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
    monkeypatch.setattr(table_builder, "MOST_WAITING_ROWS", 1000)
    in_memory = built(1 << 40)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    before = pa.total_allocated_bytes()
    in_file = built(0)
    assert in_file.equals(in_memory) and len(in_file) == 1003 + 2100 + 1
    assert in_file["text"][-1].as_py() == "last" and list(tmp_path.iterdir()) == []
    assert pa.total_allocated_bytes() - before < in_file.nbytes / 10, "the columns are mapped, not read"
    del in_file
    deadline = time.monotonic() + 10  # Arrow's reading threads may hold the file a little longer
    while _opened_below(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not _opened_below(tmp_path)


def _opened_below(folder: Path) -> list[str]:
    paths = [os.path.realpath(Path("/dev/fd", name)) for name in os.listdir("/dev/fd")]
    return [path for path in paths if path.startswith(str(folder))]


def test_released_pages_come_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    table = built(0)
    before = table["number"].to_pylist()
    assert _resident_bytes(tmp_path) > 0
    table_builder.release_pages()
    assert _resident_bytes(tmp_path) == 0
    assert table["number"].to_pylist() == before


def _resident_bytes(folder: Path) -> int:
    """Of the mapped files of a folder."""
    resident, ours = 0, False
    for line in Path("/proc/self/smaps").read_text(encoding="utf-8").splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            ours = str(folder) in line
        elif ours and line.startswith("Rss:"):
            resident += 1024 * int(line.split()[1])
    return resident


def test_an_empty_table() -> None:
    assert TableBuilder(SCHEMA, 0).finish().equals(SCHEMA.empty_table())


@pytest.mark.parametrize("in_the_thread", [False, True])
def test_no_room_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_the_thread: bool) -> None:
    if in_the_thread:
        monkeypatch.setattr(table_builder, "ROWS_PER_BATCH", 500)
        monkeypatch.setattr(table_builder, "MOST_WAITING_ROWS", 500)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "absent"))
    with pytest.raises(DataError, match=r"absent.*set TMPDIR to a folder with some"):
        built(0)
