"""Pairs that should not be: boxes on each other, pictures that look alike, one picture with two sets of boxes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline_tasks.validation.columns import ROWS_PER_PART, floats

COMPARED_AT_ONCE = 4_000_000  # pairs of hashes; bounds the memory to 32 MB
Rows = NDArray[np.int64]
Floats = NDArray[np.float64]


def overlapping_boxes(boxes: pa.Table, minimum_iou: float) -> Rows:
    """For each box the row of an earlier box of its image that overlaps it by at least `minimum_iou`, -1 for none.

    Crowd regions and boxes without area are left out. Boxes are sorted by their left edge within each image, and two
    that overlap so much begin no further apart than a share of their width: the search takes about linear time.
    """
    x, y, w, h = (floats(boxes[name]) for name in "xywh")
    image = boxes["image_id"].fill_null(-1).to_numpy()
    with np.errstate(invalid="ignore"):
        usable = (image >= 0) & (w > 0) & (h > 0) & np.isfinite(x + y + w + h)
    usable &= ~boxes["iscrowd"].fill_null(False).to_numpy()
    rows = np.flatnonzero(usable)
    rows = rows[np.lexsort((x[rows], image[rows]))]
    partner = np.full(len(boxes), -1, np.int64)
    for part in _whole_images(rows, image[rows]):
        one, other = _overlapping(image[part], x[part], y[part], w[part], h[part], minimum_iou)
        one, other = part[one], part[other]
        partner[np.maximum(one, other)] = np.minimum(one, other)
    return partner


def _whole_images(rows: Rows, image: Rows) -> Iterator[Rows]:
    """The rows, of rising images, some at a time and never only some of an image."""
    first = 0
    while first < len(rows):
        last = image[min(first + ROWS_PER_PART, len(rows)) - 1]
        end = int(np.searchsorted(image, last, "right"))
        yield rows[first:end]
        first = end


def _overlapping(image: Rows, x: Floats, y: Floats, w: Floats, h: Floats, minimum_iou: float) -> tuple[Rows, Rows]:
    """Pairs of boxes, which are sorted by image and left edge, that overlap so much; those further apart come last."""
    found = []
    active, step = np.arange(len(x) - 1), 1
    while len(active):
        active = active[active + step < len(x)]
        other = active + step
        near = (image[active] == image[other]) & (x[other] - x[active] <= (1 - minimum_iou) / minimum_iou * w[active])
        active, other = active[near], other[near]
        hits = _iou(x, y, w, h, active, other) >= minimum_iou
        found.append((active[hits], other[hits]))
        step += 1
    one, other = (np.concatenate([pair[side] for pair in found] or [np.empty(0, np.int64)]) for side in (0, 1))
    return one, other


def _iou(x: Floats, y: Floats, w: Floats, h: Floats, a: Rows, b: Rows) -> Floats:
    wide = np.minimum(x[a] + w[a], x[b] + w[b]) - np.maximum(x[a], x[b])
    high = np.minimum(y[a] + h[a], y[b] + h[b]) - np.maximum(y[a], y[b])
    common = np.maximum(wide, 0) * np.maximum(high, 0)
    found: Floats = common / (w[a] * h[a] + w[b] * h[b] - common)
    return found


def similar_pictures(images: pa.Table, near_bits: int, most: int) -> tuple[Rows, Rows]:
    """For each picture an earlier one that looks alike (-1 for none), and the bits their hashes differ in.

    Nothing is searched among more than `most` pictures: the time grows with the square of their number.
    """
    count = len(images)
    partner, bits = np.full(count, -1, np.int64), np.full(count, 65, np.int64)
    rows = np.flatnonzero(images["perceptual_hash"].is_valid().to_numpy(zero_copy_only=False))
    if len(rows) > most:
        return partner, bits
    hashes = images["perceptual_hash"].take(pa.array(rows)).to_numpy()
    at_once = max(1, COMPARED_AT_ONCE // max(len(rows), 1))
    for first in range(0, len(rows), at_once):
        last = min(first + at_once, len(rows))
        distances = np.bitwise_count(hashes[first:last, None] ^ hashes[None, :last])
        own = distances[:, first:]
        own[np.triu_indices(last - first)] = 65  # itself and later ones
        nearest = distances.argmin(axis=1)
        bits[rows[first:last]] = distances[np.arange(last - first), nearest]
        partner[rows[first:last]] = rows[nearest]
    partner[bits > near_bits] = -1
    return partner, bits


def conflicting_copies(images: pa.Table, boxes: pa.Table) -> Rows:
    """For each picture an earlier one of the same file content whose boxes are others, -1 for none."""
    partner = np.full(len(images), -1, np.int64)
    content = pc.dictionary_encode(images["sha256"]).combine_chunks().indices.fill_null(-1)
    codes = content.to_numpy(zero_copy_only=False)
    counts = np.bincount(codes[codes >= 0], minlength=1)
    repeated = np.flatnonzero((codes >= 0) & (counts[codes] > 1))
    if not len(repeated):
        return partner
    described = _boxes_of(boxes, set(repeated.tolist()))
    first: dict[int, int] = {}
    for row in repeated.tolist():
        earlier = first.setdefault(int(codes[row]), row)
        if described.get(earlier, []) != described.get(row, []):
            partner[row] = earlier
    return partner


def _boxes_of(boxes: pa.Table, images: set[int]) -> dict[int, list[Any]]:
    """Sorted (class, x, y, w, h) of each of the images."""
    wanted = boxes.filter(pc.is_in(boxes["image_id"], value_set=pa.array(sorted(images), pa.int64())))
    found: dict[int, list[Any]] = {}
    for image, *box in zip(*(wanted[n].to_pylist() for n in ("image_id", "category_reference", *"xywh")), strict=True):
        found.setdefault(image, []).append(tuple(str(value) for value in box))
    return {image: sorted(those) for image, those in found.items()}
