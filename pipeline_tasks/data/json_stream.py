"""A JSON object of gigabytes, read block by block: the memory it takes does not grow with the file.

The arrays of records are cut at places that look like the end of a record (`}`, comma, `{`). Whether one is, decoding
the part tells: with an unfinished string or bracket it fails, and the place before is tried. What this cannot make
sense of is left to `json_records`, which reads the text as a whole and names line and column.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

BLOCK_BYTES = 8 << 20
LARGEST_MEMBER_BYTES = 256 << 20  # of one that is no array of records: info, licenses, categories
TRIED_PLACES = 8
_BETWEEN = re.compile(rb"\}\s*,\s*(?=\{)")
_END = re.compile(rb"\}\s*\]")
_SPACE = b" \t\n\r"

PartSink = Callable[[int, bytes], int | None]
"""Receives the position of the first record and an array of records as JSON; returns how many there were, None if it
is no JSON."""


class NotStreamableError(Exception):
    """The file is broken or of a form that cannot be read in parts."""


def stream_json_object(file: Path, sinks: Mapping[str, PartSink], block_bytes: int = BLOCK_BYTES) -> tuple[
    dict[str, Any], str
]:  # fmt: skip
    """The members of the object in a file, and the file's SHA-256; arrays named in `sinks` are handed over in parts.

    For these a member holds the number of records. Raises `NotStreamableError` after a sink may have got some, and
    `OSError`.
    """
    with file.open("rb") as content:
        stream = _Stream(content, block_bytes)
        stream.skip(b"\xef\xbb\xbf")
        members: dict[str, Any] = {}
        stream.expect(b"{")
        while not stream.next_is(b"}"):
            if members:
                stream.expect(b",")
            key = stream.value()
            if type(key) is not str:
                raise NotStreamableError
            stream.expect(b":")
            members[key] = _records(stream, sinks[key]) if key in sinks else stream.value()
        stream.expect(b"}")
        stream.finish()
        return members, stream.digest.hexdigest()


class _Stream:
    """A window on a file: `buffer` from `place` on is what was not taken yet."""

    def __init__(self, content: BinaryIO, block_bytes: int) -> None:
        self.buffer, self.place, self.ended = b"", 0, False
        self.digest = hashlib.sha256()
        self._content, self.block_bytes = content, block_bytes
        self.read_on()

    def read_on(self) -> None:
        """Add a block to the buffer, and drop what was taken."""
        block = self._content.read(self.block_bytes)
        self.digest.update(block)
        self.ended = len(block) < self.block_bytes
        self.buffer, self.place = self.buffer[self.place :] + block, 0

    def skip(self, prefix: bytes) -> None:
        """Take these bytes where they are next."""
        if self.buffer.startswith(prefix, self.place):
            self.place += len(prefix)

    def next_is(self, character: bytes) -> bool:
        """Whether this character follows after blanks, which are taken."""
        while True:
            while self.buffer[self.place : self.place + 1] and self.buffer[self.place] in _SPACE:
                self.place += 1
            if self.place < len(self.buffer) or self.ended:
                return self.buffer[self.place : self.place + 1] == character
            self.read_on()

    def expect(self, character: bytes) -> None:
        """Take this character, which must be next after blanks."""
        if not self.next_is(character):
            raise NotStreamableError
        self.place += 1

    def value(self) -> Any:
        """Take the next value, however large."""
        self.next_is(b"")
        while True:
            try:
                text = self.buffer[self.place :].decode("utf-8", "surrogateescape")
                value, end = json.JSONDecoder().raw_decode(text)
            except (ValueError, RecursionError):
                value, end = None, len(text)
            if end < len(text):  # a number at the end of a block may go on in the next
                self.place += len(text[:end].encode("utf-8", "surrogateescape"))
                return value
            if self.ended or len(self.buffer) > LARGEST_MEMBER_BYTES:
                raise NotStreamableError
            self.read_on()

    def finish(self) -> None:
        """Nothing but blanks may follow."""
        self.next_is(b"")
        if self.place < len(self.buffer):
            raise NotStreamableError


def _records(stream: _Stream, sink: PartSink) -> int:
    """Take an array of records, part by part."""
    stream.expect(b"[")
    count = 0
    if stream.next_is(b"]"):
        stream.place += 1
        return count
    while True:
        added, ended = _part(stream, sink, count)
        count += added
        if ended:
            return count


def _part(stream: _Stream, sink: PartSink, position: int) -> tuple[int, bool]:
    """Hand over as many records as the buffer holds whole; how many, and whether the array ended with them."""
    while True:
        end = _END.search(stream.buffer, stream.place)
        tried = 0
        while end is not None and tried < TRIED_PLACES:
            count = sink(position, b"[" + stream.buffer[stream.place : end.end()])
            if count is not None:
                stream.place = end.end()
                return count, True
            end, tried = _END.search(stream.buffer, end.start() + 1), tried + 1
        if not tried:
            for place in reversed([found.end() for found in _last_places(stream)]):
                part = stream.buffer[stream.place : place].rstrip(_SPACE).removesuffix(b",")
                count = sink(position, b"[" + part + b"]")
                if count is not None:
                    stream.place = place
                    return count, False
        if stream.ended or len(stream.buffer) > LARGEST_MEMBER_BYTES:
            raise NotStreamableError
        stream.read_on()


def _last_places(stream: _Stream) -> list[re.Match[bytes]]:
    """The last places in the buffer that look like the border of two records."""
    for tail in (1 << 14, 1 << 18, len(stream.buffer)):
        found = list(_BETWEEN.finditer(stream.buffer, max(stream.place, len(stream.buffer) - tail)))
        if found:
            return found[-TRIED_PLACES:]
    return []
