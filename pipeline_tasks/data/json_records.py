"""Reading a large JSON object without holding all of its records as Python objects at once."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from json import JSONDecodeError
from pathlib import Path
from typing import Any

from pipeline_tasks.errors import DataError

_WHITESPACE = re.compile(r"[ \t\n\r]*")
_DECODER = json.JSONDecoder()

RecordSink = Callable[[int, Any], None]
"""Receives the position of a record in its array and the decoded record."""


def read_json_object(content: bytes, file: Path, sinks: Mapping[str, RecordSink]) -> dict[str, Any]:
    """Decode a JSON object: members named in `sinks` must be arrays and are handed over record by record.

    Returns the other members; for a member given to a sink, its number of records. Besides the text only one
    record is held at a time (Objects365 has 25 million). `DataError` names file, line and column.
    """
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        where = f"{file}, line {line}: byte {error.start}"
        raise DataError(f"{where} is not UTF-8 text; save the file as UTF-8") from error
    try:
        return _read_object(text, file, sinks)
    except JSONDecodeError as error:
        where = f"{file}, line {error.lineno}, column {error.colno}"
        raise DataError(f"{where}: broken JSON ({error.msg}); repair or export the file again") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file}: broken JSON ({error}); repair or export the file again") from error


def _read_object(text: str, file: Path, sinks: Mapping[str, RecordSink]) -> dict[str, Any]:
    members: dict[str, Any] = {}
    position = _skip(text, 0)
    if position == len(text):
        raise JSONDecodeError("the file is empty", text, position)
    if text[position] != "{":
        value, _ = _DECODER.raw_decode(text, position)
        kind = type_name(value)
        raise DataError(f"{file} holds {kind}; it must be an object with images, annotations and categories")
    position = _skip(text, position + 1)
    while text[position : position + 1] != "}":
        if text[position : position + 1] != '"':
            raise JSONDecodeError("Expecting property name enclosed in double quotes", text, position)
        key, position = _DECODER.raw_decode(text, position)
        position = _expect(text, _skip(text, position), ":")
        if key in sinks:
            members[key], position = _read_array(text, position, file, key, sinks[key])
        else:
            members[key], position = _DECODER.raw_decode(text, position)
        position = _after_item(text, position, "}")
    if _skip(text, position + 1) != len(text):
        raise JSONDecodeError("Extra data", text, _skip(text, position + 1))
    return members


def _read_array(text: str, position: int, file: Path, key: str, sink: RecordSink) -> tuple[int, int]:
    if text[position : position + 1] != "[":
        value, _ = _DECODER.raw_decode(text, position)
        raise DataError(f"{file}: {key!r} must be a list, it is {type_name(value)}")
    count, position = 0, _skip(text, position + 1)
    while text[position : position + 1] != "]":
        record, position = _DECODER.raw_decode(text, position)
        sink(count, record)
        count += 1
        position = _after_item(text, position, "]")
    return count, position + 1


def _after_item(text: str, position: int, end: str) -> int:
    """Position of the next item or of the closing bracket `end`."""
    position = _skip(text, position)
    if text[position : position + 1] == end:
        return position
    following = _expect(text, position, ",")
    if text[following : following + 1] == end:
        raise JSONDecodeError("Illegal trailing comma", text, position)
    return following


def _expect(text: str, position: int, character: str) -> int:
    if text[position : position + 1] != character:
        raise JSONDecodeError(f"Expecting {character!r}", text, position)
    return _skip(text, position + 1)


def _skip(text: str, position: int) -> int:
    match = _WHITESPACE.match(text, position)
    return match.end() if match else position


def type_name(value: object) -> str:
    """The JSON name of a value's type, for error sentences."""
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")
