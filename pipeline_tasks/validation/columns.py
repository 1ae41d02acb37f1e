"""Columns of Arrow tables as numpy arrays, and what is computed on them in more than one place."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline_tasks.data.raw import SPLITS

ROWS_PER_PART = 1 << 20
"""What is computed row by row is computed for so many at once: of 25 million boxes an array takes 200 MB."""
_ROWS_PER_CHUNK = 1 << 16


def parts(table: pa.Table) -> Iterator[pa.Table]:
    """The table cut along its rows; an empty table is one part."""
    for first in range(0, max(len(table), 1), ROWS_PER_PART):
        yield table.slice(first, ROWS_PER_PART)


def by_parts(compute: Callable[[pa.Table], NDArray[Any]], table: pa.Table) -> NDArray[Any]:
    """What `compute` finds for each row, part by part."""
    return np.concatenate([compute(part) for part in parts(table)])


def sparse(rows: NDArray[np.int64], values: pa.Array, count: int) -> pa.ChunkedArray:
    """A column of `count` rows that has these values at these rising rows, and is null elsewhere.

    Stretches of nulls share one array: a column takes no memory where nothing is odd.
    """
    nulls, chunks = pa.nulls(min(count, _ROWS_PER_CHUNK), values.type), []
    for start in range(0, count, _ROWS_PER_CHUNK):
        length = min(_ROWS_PER_CHUNK, count - start)
        first, end = np.searchsorted(rows, [start, start + length])
        if first == end:
            chunks.append(nulls.slice(0, length))
            continue
        codes = np.full(length, -1)
        codes[rows[first:end] - start] = np.arange(first, end)
        chunks.append(values.take(pa.array(codes, mask=codes < 0)))
    return pa.chunked_array(chunks, values.type)


def split_counts(table: pa.Table) -> dict[str, int]:
    """Rows of each split: train, val, test, then others by name."""
    counts = {row["values"]: row["counts"] for row in pc.value_counts(table["split"]).to_pylist()}
    names = [name for name in SPLITS if name in counts] + sorted(set(counts) - set(SPLITS))
    return {name: counts[name] for name in names}


def floats(column: pa.ChunkedArray, rows: pa.Array | None = None) -> NDArray[np.float64]:
    """A column as float64, nulls as NaN, optionally taken at `rows` (null rows give NaN)."""
    taken = column if rows is None else column.take(rows)
    values: NDArray[np.float64] = taken.cast(pa.float64()).fill_null(np.nan).to_numpy()
    return values


def chosen_from(names: pa.Array, codes: NDArray[np.int64]) -> pa.DictionaryArray:
    """The names at these positions, null for negative ones, as codes: 4 bytes a row however long the names."""
    return pa.DictionaryArray.from_arrays(pa.array(codes.astype(np.int32), mask=codes < 0), names)


def codes_of(column: pa.ChunkedArray) -> tuple[NDArray[np.int64], pa.Array]:
    """Each value's position among the distinct ones, -1 for null; and these."""
    encoded = pc.dictionary_encode(column).combine_chunks()
    if isinstance(encoded, pa.ChunkedArray):  # of length 0
        return np.empty(0, np.int64), pa.array([], column.type)
    codes: NDArray[np.int64] = encoded.indices.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)
    return codes, encoded.dictionary


def clip(
    x: NDArray[np.float64], y: NDArray[np.float64], w: NDArray[np.float64], h: NDArray[np.float64],
    width: NDArray[np.float64], height: NDArray[np.float64],
) -> tuple[NDArray[np.float64], ...]:  # fmt: skip
    """Boxes cut at the image border; a box that lies inside keeps its numbers to the last bit."""
    left, top = np.maximum(x, 0.0), np.maximum(y, 0.0)
    right, bottom = np.minimum(x + w, width), np.minimum(y + h, height)
    inside_x, inside_y = (x >= 0) & (x + w <= width), (y >= 0) & (y + h <= height)
    return left, top, np.where(inside_x, w, right - left), np.where(inside_y, h, bottom - top)
