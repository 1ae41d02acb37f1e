from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline_tasks.data.json_records import read_json_object
from pipeline_tasks.errors import DataError

FILE = Path("some.json")


def read(text: str) -> tuple[dict[str, Any], list[Any]]:
    records: list[Any] = []
    members = read_json_object(
        text.encode(), FILE, {"rows": lambda position, record: records.append((position, record))}
    )
    return members, records


@pytest.mark.parametrize("indent", [None, 2])
def test_equals_json_loads(indent: int | None) -> None:
    value = {"a": {"b": [1, 2.5, 'é\\"', None]}, "rows": [{"x": 1}, [], "t", 3, None], "last": True, "empty": []}
    members, records = read(json.dumps(value, indent=indent))
    assert records == list(enumerate(value["rows"]))
    assert members == {**value, "rows": 5}


def test_empty_object_empty_list_and_byte_order_mark() -> None:
    assert read(" {} ") == ({}, [])
    assert read('{"rows": [ ]}') == ({"rows": 0}, [])
    assert read_json_object(b"\xef\xbb\xbf{}", FILE, {}) == {}


@pytest.mark.parametrize(
    ("text", "line", "column"),
    [
        ("", 1, 1),
        ('{"rows": [1,\n 2', 2, 3),
        ('{"rows": [1,\n  {"x": tru}]}', 2, 9),
        ('{"a": 1\n"b": 2}', 2, 1),
        ('{"a": 1,}', 1, 8),
        ('{"rows": [1,]}', 1, 12),
        ('{"a" 1}', 1, 6),
        ('{"a": 1} x', 1, 10),
        ("{a: 1}", 1, 2),
        ('{"rows": [1 2]}', 1, 13),
    ],
)
def test_broken_json_is_named_with_line_and_column(text: str, line: int, column: int) -> None:
    with pytest.raises(DataError, match=rf"^some.json, line {line}, column {column}: broken JSON \("):
        read(text)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"[1]", "some.json holds a list; it must be an object"),
        (b'{"rows": {}}', "'rows' must be a list, it is an object"),
        (b'{"a":\n"\xff"}', "line 2: byte 7 is not UTF-8"),
        (b'{"a": ' + b"[" * 100_000, "broken JSON"),
    ],
)
def test_other_structures_are_refused(content: bytes, sentence: str) -> None:
    with pytest.raises(DataError, match=sentence):
        read_json_object(content, FILE, {"rows": lambda position, record: None})
