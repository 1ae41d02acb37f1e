"""Classes that look misspelt, and boxes whose size is that of another class."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline_tasks.validation.columns import by_parts, floats

LARGEST_COMPARED = 2000  # classes; beyond that the pairs are too many
RARE_BOXES, RARE_SHARE = 20, 0.1
LARGEST_SPREAD = 0.25
"""Median deviation of the logarithm of the side: sizes of a class tell something only where they are alike."""
LARGEST_SPREAD_OF_OTHER = 0.3
FEWEST_OF_OTHER = 3  # boxes of a class that says what its size is
EXACT_BELOW = 200  # boxes of a class
BORDER_PX = 2.0
_DIGITS = re.compile(r"\d+")

Floats = NDArray[np.float64]


def likely_misspelt(class_names: Sequence[str], counts: Sequence[int]) -> dict[int, int]:
    """Classes, by index, that are rare and differ from another one by few letters; the values are these others.

    Of names that differ by few letters the one that is nearest to all others is taken for right, then the one with
    most boxes. `counts` are the boxes of each class.
    """
    if len(class_names) > LARGEST_COMPARED:
        return {}
    plain = [" ".join(name.lower().replace("_", " ").replace("-", " ").split()) for name in class_names]
    near: dict[int, dict[int, int]] = {}
    for one in range(len(plain)):
        for other in range(one):
            if (distance := _near(plain[one], plain[other])) is not None:
                near.setdefault(one, {})[other] = near.setdefault(other, {})[one] = distance
    found: dict[int, int] = {}
    for group in _groups(near):
        cost = {one: sum(near[one].get(other, 9) for other in group if other != one) for one in group}
        right = min(group, key=lambda one: (cost[one], -counts[one], one))
        found |= {
            one: right
            for one in group
            if one != right and 0 < counts[one] <= max(RARE_BOXES, RARE_SHARE * counts[right]) and counts[right]
        }
    return found


def _near(one: str, other: str) -> int | None:
    """The edit distance of two names if it is at most one in five letters, None for names further apart.

    Names with other digits in them are numbered, not misspelt.
    """
    allowed = min(len(one), len(other)) // 5
    if _DIGITS.findall(one) != _DIGITS.findall(other) or abs(len(one) - len(other)) > allowed:
        return None
    distance = edit_distance(one, other)
    return distance if distance <= allowed else None


def edit_distance(one: str, other: str) -> int:
    """Letters to insert, remove, replace or exchange with the next one (optimal string alignment)."""
    above: list[int] = []
    row = list(range(len(other) + 1))
    for i, left in enumerate(one, 1):
        above, row, before = row, [i], above
        for j, right in enumerate(other, 1):
            best = min(above[j] + 1, row[j - 1] + 1, above[j - 1] + (left != right))
            if i > 1 and j > 1 and left == other[j - 2] and right == one[i - 2]:
                best = min(best, before[j - 2] + 1)
            row.append(best)
    return row[-1]


def _groups(near: Mapping[int, Mapping[int, int]]) -> list[list[int]]:
    """Classes that are connected by pairs of similar names."""
    groups, left = [], set(near)
    while left:
        group, waiting = [], [min(left)]
        while waiting:
            one = waiting.pop()
            if one in left:
                left.remove(one)
                group.append(one)
                waiting += near[one]
        groups.append(sorted(group))
    return groups


def sizes_of_other_classes(boxes: pa.Table, ratio: float) -> tuple[NDArray[np.int64], Floats]:
    """For each box the class it has the size of, if it is not its own (-1 for none); and the usual side of its own.

    A box is told of when its side (square root of the area) is `ratio` times larger or smaller than the median of
    the other boxes of its class, these are alike in size, and another class's median is less than half as far away
    (in logarithms). Small boxes at the border of a picture are left out, where objects are cut off.
    """
    sides, usual = by_parts(_log_sides, boxes), np.full(len(boxes), np.nan)
    categories = boxes["category"].fill_null(-1).to_numpy()
    medians: dict[int, float] = {}
    odd = []
    at_border = by_parts(_at_border, boxes)
    for category, rows in _rows_of_each(categories, np.isfinite(sides)):
        median = float(np.median(sides[rows]))
        if len(rows) >= FEWEST_OF_OTHER and np.median(np.abs(sides[rows] - median)) <= LARGEST_SPREAD_OF_OTHER:
            medians[category] = median
        others, spread = _without_each(sides[rows])
        usual[rows] = np.exp(others)
        far = np.abs(sides[rows] - others) >= np.log(ratio)
        far &= (spread <= LARGEST_SPREAD) & ~((sides[rows] < others) & at_border[rows])
        odd.append(rows[far])
    looks_like = np.full(len(boxes), -1, np.int64)
    for row in np.concatenate(odd).tolist() if odd else []:
        away = {c: abs(m - sides[row]) for c, m in medians.items() if c != categories[row]}
        nearest = min(away, key=away.__getitem__, default=None)
        if nearest is not None and away[nearest] < abs(sides[row] - np.log(usual[row])) / 2:
            looks_like[row] = nearest
    return looks_like, usual


def _rows_of_each(categories: NDArray[np.int64], judged: NDArray[np.bool_]) -> Iterator[tuple[int, NDArray[np.int64]]]:
    """Each class with the rows of its judged boxes, rising; one sort for all classes."""
    rows = np.flatnonzero(judged & (categories >= 0))
    rows = rows[np.argsort(categories[rows], kind="stable")]
    found, first = np.unique(categories[rows], return_index=True)
    yield from zip(found.tolist(), np.split(rows, first[1:]), strict=False)


def _log_sides(boxes: pa.Table) -> Floats:
    """Logarithm of the square root of the area; not a number for crowd regions and boxes without area."""
    w, h = floats(boxes["w"]), floats(boxes["h"])
    with np.errstate(all="ignore"):
        sides: Floats = np.where((w > 0) & (h > 0), 0.5 * np.log(w * h), np.nan)
    sides[boxes["iscrowd"].fill_null(False).to_numpy()] = np.nan
    sides[~np.isfinite(sides)] = np.nan
    return sides


def _at_border(boxes: pa.Table) -> NDArray[np.bool_]:
    x, y, w, h, width, height = (floats(boxes[name]) for name in (*"xywh", "image_width", "image_height"))
    with np.errstate(invalid="ignore"):
        inner = (x > BORDER_PX) & (y > BORDER_PX) & (x + w < width - BORDER_PX) & (y + h < height - BORDER_PX)
    return ~inner


def _without_each(values: Floats) -> tuple[Floats, Floats]:
    """For each value the median of the others, and the median of their deviations from it."""
    if len(values) < 3:
        return np.full(len(values), np.nan), np.full(len(values), np.inf)
    if len(values) >= EXACT_BELOW:
        median = np.median(values)
        return np.full(len(values), median), np.full(len(values), np.median(np.abs(values - median)))
    others = np.array([np.delete(values, row) for row in range(len(values))])
    medians: Floats = np.median(others, axis=1)
    return medians, np.median(np.abs(others - medians[:, None]), axis=1)
