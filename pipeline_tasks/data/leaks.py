"""Pictures that are in a set twice: by the bytes of their files, or because they look alike (perceptual hash)."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from model.data.images import decode_image
from model.data.near_duplicates import COMPARED_AT_ONCE, NEAR_BITS, Hashes, perceptual_hash
from pipeline_tasks import bucket_images
from pipeline_tasks.data.picture_digests import picture_digests
from pipeline_tasks.images import read_content

FILES_PER_TASK = 32
LISTED = 20


@dataclass(frozen=True)
class Fingerprints:
    """Of each of N pictures the digest of its file and its perceptual hash; None where it cannot be read."""

    digests: list[str | None]
    hashes: list[int | None]


@dataclass(frozen=True)
class Leak:
    """Pictures of different splits that are one: a model that has learned one of them knows the others."""

    exact: bool
    """Whether all their files are equal; otherwise they look alike."""
    members: tuple[tuple[str, str], ...]
    """Split and path of each."""

    def __str__(self) -> str:
        kind = "the same file" if self.exact else "alike"
        return f"{kind}: " + ", ".join(f"{split} {path}" for split, path in self.members)


def fingerprints(folder: Path, paths: Sequence[str], decode: bool = True) -> Fingerprints:
    """Read and decode every picture once, on all cores; without `decode` there are no perceptual hashes.

    Pictures that stay in a bucket are fetched to be decoded, many at once, into the local cache.
    """
    found = picture_digests(folder, paths)
    digests = [found.get(path) for path in paths]
    if not decode:
        return Fingerprints(digests, [None] * len(paths))
    groups = [paths[start : start + FILES_PER_TASK] for start in range(0, len(paths), FILES_PER_TASK)]
    threads = (os.cpu_count() or 1) if bucket_images.of_folder(folder) is None else bucket_images.FETCHED_AT_ONCE
    with ThreadPoolExecutor(threads) as executor:
        hashes = list(chain.from_iterable(executor.map(lambda group: [_hash(folder, path) for path in group], groups)))
    return Fingerprints(digests, hashes)


def _hash(folder: Path, path: str) -> int | None:
    try:
        return perceptual_hash(decode_image(read_content(folder, path), path))
    except ValueError:
        return None


def alike(found: Fingerprints, near_bits: int | None = NEAR_BITS) -> NDArray[np.int64]:
    """Number the pictures so that equal and near ones have one number, (N,); it is the row of the first of them.

    Near is what differs in at most `near_bits` of 64 bits; None joins equal files only. Chains are joined: of three
    pictures the outer two may differ more.
    """
    groups = UnionFind(len(found.digests))
    groups.join_equal(found.digests)
    if near_bits is not None:
        rows = np.array([row for row, value in enumerate(found.hashes) if value is not None], np.int64)
        hashes = np.array([value for value in found.hashes if value is not None], np.uint64)
        groups.join_pairs((rows[first], rows[second]) for first, second in near_pairs(hashes, near_bits))
    return groups.numbers()


def near_pairs(hashes: Hashes, bits: int) -> Iterable[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Rows of hashes that differ in at most `bits` bits, block by block; of equal hashes only neighbours are paired.

    Every hash is compared with every other: 100,000 in about 40 s on one core.
    """
    values, first_rows, place = np.unique(hashes, return_index=True, return_inverse=True)
    yield first_rows[place], np.arange(len(hashes))
    rows_at_once = max(1, COMPARED_AT_ONCE // max(len(values), 1))
    for start in range(0, len(values), rows_at_once):
        part = values[start : start + rows_at_once]
        rest = values[start:]
        near = np.bitwise_count(part[:, None] ^ rest[None]) <= bits  # (n, M)
        i, j = np.nonzero(near)
        above = j > i
        yield first_rows[start + i[above]], first_rows[start + j[above]]


class UnionFind:
    """Numbers that are joined to groups; the smallest number of a group names it."""

    def __init__(self, count: int) -> None:
        self._parent = list(range(count))

    def join(self, first: int, second: int) -> None:
        """Make one group of the two groups."""
        low, high = sorted((self._root(first), self._root(second)))
        self._parent[high] = low

    def join_equal(self, keys: Sequence[Any]) -> None:
        """Join numbers with equal keys; None equals nothing."""
        first: dict[Any, int] = {}
        for number, key in enumerate(keys):
            if key is not None:
                self.join(first.setdefault(key, number), number)

    def join_pairs(self, blocks: Iterable[tuple[NDArray[np.int64], NDArray[np.int64]]]) -> None:
        """Join the numbers that stand at the same place of two arrays."""
        for first, second in blocks:
            for one, other in zip(first.tolist(), second.tolist(), strict=True):
                self.join(one, other)

    def numbers(self) -> NDArray[np.int64]:
        """The name of each number's group."""
        return np.array([self._root(number) for number in range(len(self._parent))], np.int64)

    def _root(self, number: int) -> int:
        while self._parent[number] != number:
            self._parent[number] = self._parent[self._parent[number]]
            number = self._parent[number]
        return number


def find_leaks(
    paths: Sequence[str], splits: Sequence[str], groups: NDArray[np.int64], digests: Sequence[str | None]
) -> list[Leak]:
    """Groups with pictures of more than one split, equal files first."""
    members: dict[int, list[int]] = defaultdict(list)
    for row, group in enumerate(groups.tolist()):
        members[group].append(row)
    leaks = [
        Leak(len({digests[row] for row in rows}) == 1, tuple((splits[row], paths[row]) for row in rows))
        for rows in members.values()
        if len({splits[row] for row in rows}) > 1
    ]
    return sorted(leaks, key=lambda leak: not leak.exact)


def text(leaks: list[Leak]) -> str:
    """The leaks for a reader."""
    if not leaks:
        return "no picture is in two splits, neither equal nor alike"
    exact = sum(leak.exact for leak in leaks)
    shown = [f"  {leak}" for leak in leaks[:LISTED]]
    more = [f"  and {len(leaks) - LISTED} more"] if len(leaks) > LISTED else []
    title = f"pictures in more than one split: {len(leaks)}, {exact} as equal files and {len(leaks) - exact} alike"
    return "\n".join([title, *shown, *more])
