"""How a dataset looks in few numbers, and how far two datasets are apart: classes, sizes of boxes, sizes of pictures.

The record stands in the lineage of every registered engine, so that later data can be compared with what it was trained
on when these are long gone. It holds counts only: histograms over fixed bins of a quarter octave.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    from numpy.typing import NDArray

BINS_PER_OCTAVE = 4
GROUPS = 10
"""Of about equal mass over both datasets: the usual number for a population stability index."""
SCHEMA_VERSION = 1
BOX_COLUMNS = ("image_id", "category", "w", "h", "iscrowd")
"""What of the boxes is looked at."""

Histogram = dict[int, int]
"""Counts by bin; bin n holds values from 2^(n / 4) to 2^((n + 1) / 4)."""


@dataclass(frozen=True)
class DatasetStatistics:
    """The training split of a published dataset; crowd regions are left out.

    box_sides: square root of a box's share of its picture's area. image_sides: square root of width times height,
    pixels.
    """

    images: int
    class_boxes: dict[str, int]
    box_sides: Histogram
    image_sides: Histogram

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        histograms = {"box_sides": _texts(self.box_sides), "image_sides": _texts(self.image_sides)}
        return {"schema_version": SCHEMA_VERSION, **asdict(self), **histograms}


@dataclass(frozen=True)
class Distance:
    """How far two distributions are apart, and how far two samples of one distribution would be on average."""

    value: float
    by_chance: float

    def beyond(self, limit: float) -> bool:
        """Whether it is more than the limit and chance together."""
        return self.value > limit + self.by_chance


def statistics_of(images: pa.Table, boxes: Iterable[pa.RecordBatch], class_names: tuple[str, ...]) -> DatasetStatistics:
    """Statistics of the training split of published tables (`model.data.tables`), the boxes batch by batch.

    `boxes`: batches with at least the `BOX_COLUMNS`; no more than one of them is held.
    """
    import numpy as np
    import pyarrow.compute as pc

    train = images.filter(pc.equal(images["split"], "train")).sort_by("image_id")
    owners, areas = train["image_id"].to_numpy(), _areas(train)
    counts, box_sides = np.zeros(len(class_names), np.int64), Counter[int]()
    for batch in boxes:
        chosen = batch.filter(pc.invert(batch["iscrowd"]))
        rows = np.searchsorted(owners, chosen["image_id"].to_numpy())
        owned = np.append(owners, -1)[rows] == chosen["image_id"].to_numpy()
        category, w, h = (chosen[name].to_numpy()[owned] for name in ("category", "w", "h"))
        counts += np.bincount(category, minlength=len(class_names))
        box_sides.update(_histogram(np.sqrt(w * h / areas[rows[owned]])))
    return DatasetStatistics(
        len(train),
        {name: int(count) for name, count in zip(class_names, counts, strict=True)},
        dict(sorted(box_sides.items())),
        _histogram(np.sqrt(areas)),
    )


def _areas(images: pa.Table) -> NDArray[np.float64]:
    """Square pixels of each picture."""
    import numpy as np

    areas: NDArray[np.float64] = images["width"].to_numpy().astype(np.float64) * images["height"].to_numpy()
    return areas


def from_json(content: Any) -> DatasetStatistics | None:
    """The record as `to_json` wrote it; None where there is none, or one of a form that this release does not know."""
    if not isinstance(content, Mapping) or content.get("schema_version") != SCHEMA_VERSION:
        return None
    sides = ({int(bin_): count for bin_, count in content[name].items()} for name in ("box_sides", "image_sides"))
    return DatasetStatistics(int(content["images"]), dict(content["class_boxes"]), *sides)


def class_distance(before: DatasetStatistics, after: DatasetStatistics) -> Distance:
    """Total variation of the class shares: the share of boxes that would have to change class, in [0, 1].

    By chance: the mean over samples of one distribution, by the normal approximation; the pictures count as the draws,
    since boxes of one picture are alike.
    """
    import numpy as np

    names = list(dict.fromkeys([*before.class_boxes, *after.class_boxes]))
    counts = np.array([[one.class_boxes.get(name, 0) for name in names] for one in (before, after)], np.float64)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    pooled = shares.mean(axis=0)
    spread = np.sqrt(pooled * (1 - pooled) * _draws(before, after))
    return Distance(float(np.abs(shares[0] - shares[1]).sum() / 2), float(spread.sum() / np.sqrt(2 * np.pi)))


def size_distance(
    before: Histogram, after: Histogram, statistics: tuple[DatasetStatistics, DatasetStatistics]
) -> Distance:
    """Population stability index of two histograms: the sum of (p - q) ln(p / q) over groups of about equal mass.

    0.1 to 0.25 is usually called a moderate shift, more a large one. Half a count is added to each group, so that an
    empty one stays finite. By chance: (groups - 1) (1/n + 1/m), the mean of its distribution under equality (Yurdakul
    and Naranjo, Statistical properties of the population stability index, 2020), with pictures as draws.
    """
    import numpy as np

    bins = sorted({*before, *after})
    counts = np.array([[one.get(bin_, 0) for bin_ in bins] for one in (before, after)], np.float64)
    if not counts.sum(axis=1).all():
        return Distance(0.0, 0.0)
    shares = counts / counts.sum(axis=1, keepdims=True)
    groups = _groups(shares.mean(axis=0))
    grouped = np.stack([np.bincount(groups, weights=row) for row in counts]) + 0.5
    p, q = grouped / grouped.sum(axis=1, keepdims=True)
    index = float(((p - q) * np.log(p / q)).sum())
    return Distance(index, float(grouped.shape[1] - 1) * _draws(*statistics))


def median_side(histogram: Histogram) -> float:
    """The middle of the bin that holds the median; NaN for an empty histogram."""
    total, seen = sum(histogram.values()), 0
    for bin_, count in sorted(histogram.items()):
        seen += count
        if 2 * seen >= total:
            return float(2 ** ((bin_ + 0.5) / BINS_PER_OCTAVE))
    return float("nan")


def _draws(before: DatasetStatistics, after: DatasetStatistics) -> float:
    """1/n + 1/m of the pictures."""
    return 1 / max(before.images, 1) + 1 / max(after.images, 1)


def _groups(masses: NDArray[np.float64]) -> NDArray[np.int64]:
    """Group of each bin: a group ends when it holds a tenth of the mass; the rest at the end joins the last one."""
    import numpy as np

    groups, group, held = np.zeros(len(masses), np.int64), 0, 0.0
    for index, mass in enumerate(masses):
        groups[index] = group
        held += mass
        if held >= 1 / GROUPS - 1e-12:
            group, held = group + 1, 0.0
    return np.minimum(groups, max(group - 1, 0))


def _histogram(values: NDArray[np.float64]) -> Histogram:
    import numpy as np

    positive = values[values > 0]
    bins, counts = np.unique(np.floor(np.log2(positive) * BINS_PER_OCTAVE).astype(np.int64), return_counts=True)
    return {int(bin_): int(count) for bin_, count in zip(bins, counts, strict=True)}


def _texts(histogram: Histogram) -> dict[str, int]:
    return {str(bin_): count for bin_, count in histogram.items()}
