"""A JSON object of gigabytes, read block by block: the memory it takes does not grow with the file.

The arrays of records are cut at places that look like the end of a record (`}`, comma, `{`). Whether one is, decoding
the part tells: with an unfinished string or bracket it fails. From then on brackets are counted, which takes longer but
finds the ends of records that hold lists of objects. What this cannot make sense of is left to `json_records`, which
reads the text as a whole and names line and column.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

BLOCK_BYTES = 1 << 20
"""The records of a block fit into the processor's cache: 8 MB take half as long again."""
BLOCKS_AHEAD = 8
LARGEST_MEMBER_BYTES = 256 << 20  # of one that is no array of records: info, licenses, categories
SEARCHED_TAILS = (1 << 14, 1 << 18)  # bytes
_BETWEEN = re.compile(rb"\}\s*,\s*(?=\{)")
_END = re.compile(rb"\}\s*\]")
_COMMA = re.compile(rb"\s*,\s*(?=[^\s])")
_ESCAPED = re.compile(rb"\\.", re.DOTALL)
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
    with file.open("rb") as content, ThreadPoolExecutor(1, "digest") as thread:
        stream = _Stream(content, block_bytes, thread)
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
        return members, stream.finish()


class _Stream:
    """A window on a file: `buffer` from `place` on is what was not taken yet. `thread` reads ahead and computes the
    digest, neither of which needs Python's lock.
    """

    def __init__(self, content: BinaryIO, block_bytes: int, thread: Executor) -> None:
        self.buffer, self.place, self.ended = b"", 0, False
        self._content, self._block_bytes, self._thread = content, block_bytes, thread
        self._hash = hashlib.sha256()
        self._blocks = self._read_ahead()
        self.read_on()

    def read_on(self) -> None:
        """Add a block to the buffer, and drop what was taken; where nothing could be, the buffer doubles."""
        left = self.buffer[self.place :]
        blocks: list[bytes | memoryview] = [left]
        missing = max(self._block_bytes, len(left))
        while missing > 0 and not self.ended:
            block = next(self._blocks, None)
            self.ended = block is None
            if block is not None:
                blocks.append(block)
                missing -= len(block)
        self.buffer, self.place = b"".join(blocks), 0

    def _read_ahead(self) -> Iterator[memoryview]:
        """The blocks of the file, while the thread reads and hashes those after them."""
        coming = self._thread.submit(self._read)
        while chunk := coming.result():
            coming = self._thread.submit(self._read)
            view = memoryview(chunk)
            yield from (view[place : place + self._block_bytes] for place in range(0, len(chunk), self._block_bytes))

    def _read(self) -> bytes:
        chunk = self._content.read(BLOCKS_AHEAD * self._block_bytes)
        self._hash.update(chunk)
        return chunk

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

    def finish(self) -> str:
        """The SHA-256 of the whole file, in which nothing but blanks may follow."""
        self.next_is(b"")
        if self.place < len(self.buffer):
            raise NotStreamableError
        return self._hash.hexdigest()


def _records(stream: _Stream, sink: PartSink) -> int:
    """Take an array of records, part by part."""
    stream.expect(b"[")
    count = 0
    if stream.next_is(b"]"):
        stream.place += 1
        return count
    guess = True
    while True:
        added, ended, guess = _part(stream, sink, count, guess)
        count += added
        if ended:
            return count


@dataclass(frozen=True)
class _Cut:
    """Where a part ends: its last byte but one, where the next begins, and whether the array ends there."""

    end: int
    following: int
    is_last: bool


def _part(stream: _Stream, sink: PartSink, position: int, guess: bool) -> tuple[int, bool, bool]:
    """Hand over as many records as the buffer holds whole.

    Returns how many, whether the array ended with them, and whether the ends of records may still be guessed.
    """
    while True:
        for cut in _guessed(stream) if guess else ():
            if (count := _hand_over(stream, sink, position, cut)) is not None:
                return count, cut.is_last, True
        exact = _counted(stream)
        if exact is not None:
            count = _hand_over(stream, sink, position, exact)
            if count is None:
                raise NotStreamableError
            return count, exact.is_last, False
        if stream.ended or len(stream.buffer) > LARGEST_MEMBER_BYTES:
            raise NotStreamableError
        stream.read_on()


def _hand_over(stream: _Stream, sink: PartSink, position: int, cut: _Cut) -> int | None:
    count = sink(position, b"".join((b"[", memoryview(stream.buffer)[stream.place : cut.end], b"]")))
    if count is not None:
        stream.place = cut.following
    return count


def _guessed(stream: _Stream) -> Iterator[_Cut]:
    """The last place in the buffer that looks like the border of two records, and the first like the array's end."""
    for tail in (*SEARCHED_TAILS, len(stream.buffer)):
        places = list(_BETWEEN.finditer(stream.buffer, max(stream.place, len(stream.buffer) - tail)))
        if places:
            yield _Cut(places[-1].start() + 1, places[-1].end(), False)
            break
    if (end := _END.search(stream.buffer, stream.place)) is not None:
        yield _Cut(end.start() + 1, end.end(), True)


def _counted(stream: _Stream) -> _Cut | None:
    """The end of the last whole record, by counting brackets outside of texts; None where none is whole."""
    text = stream.buffer[stream.place :]
    if b"\\" in text:
        text = _ESCAPED.sub(b"__", text)
    characters = np.frombuffer(text, np.uint8)
    in_text = np.bitwise_xor.accumulate(characters == ord('"'))
    folded = characters | 0x20  # brackets and braces differ in this bit alone
    steps = (folded == ord("{")).astype(np.int8) - (folded == ord("}")).astype(np.int8)
    steps[in_text] = 0
    places = np.flatnonzero(steps)
    depth = np.cumsum(steps[places], dtype=np.int64)
    ended = np.flatnonzero(depth < 0)
    if len(ended):
        end = stream.place + int(places[ended[0]])
        return _Cut(end, end + 1, True)
    whole = np.flatnonzero(depth == 0)
    if not len(whole):
        return None
    end = stream.place + int(places[whole[-1]]) + 1
    following = _COMMA.match(stream.buffer, end)
    return None if following is None else _Cut(end, following.end(), False)
