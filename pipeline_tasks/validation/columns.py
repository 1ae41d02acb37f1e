"""Columns of Arrow tables as numpy arrays, and what is computed on them in more than one place."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline_tasks.data.raw import SPLITS


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
