"""What is counted for the page: splits, classes, sizes, shapes and places of the boxes."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline_tasks.data.raw import SPLITS, RawDataset
from pipeline_tasks.data.sets import distinct, usable_boxes, usable_images

HEAT_CELLS = 48
SIZE_EDGES = 2.0 ** np.arange(0, 11.5, 0.5)
"""Pixels: side of a square of the box's area."""
ASPECT_EDGES = 2.0 ** np.arange(-4, 4.25, 0.25)
"""Width divided by height."""
SHARE_EDGES = 10.0 ** np.arange(-5, 0.25, 0.25)
"""Area of the box divided by that of its picture."""


@dataclass(frozen=True)
class Histogram:
    """Counts between edges; what lies outside is counted in the outermost bins."""

    edges: NDArray[np.float64]  # (B + 1,)
    counts: NDArray[np.int64]  # (B,)


@dataclass(frozen=True)
class SplitCounts:
    """One line of the first table."""

    name: str
    images: int
    boxes: int
    empty_images: int
    most_boxes: int


@dataclass(frozen=True)
class Statistics:
    """Everything the page shows besides the pictures."""

    splits: list[SplitCounts]
    class_names: tuple[str, ...]
    class_counts: dict[str, NDArray[np.int64]]
    """By split: boxes of each class, crowd regions included."""
    class_images: NDArray[np.int64]
    """Images that show the class, of all splits."""
    class_side_px: NDArray[np.float64]
    """Median side of the class's boxes; NaN where there are none."""
    sizes: Histogram
    shares: Histogram
    aspects: Histogram
    boxes_per_image: Histogram
    centres: NDArray[np.int64]
    """(HEAT_CELLS, HEAT_CELLS), rows from the top: boxes by where their centre lies in the picture."""
    picture_sizes: list[tuple[str, int]]
    licences: list[tuple[str, int]]
    crowd_boxes: int
    left_out: int
    """Records with a fault, which are in none of the numbers."""


def statistics(raw: RawDataset) -> Statistics:
    """Count what the page shows."""
    images, boxes = usable_images(raw), usable_boxes(raw)
    classes = boxes["category"].to_numpy()
    names = raw.metadata.class_names
    width, height = (np.abs(boxes[side].to_numpy()) for side in "wh")
    side = np.sqrt(width * height)
    of_picture = _picture_sizes(raw, boxes["image_id"].to_numpy())
    per_image = np.bincount(boxes["image_id"].to_numpy(), minlength=len(raw.images))[images["image_id"].to_numpy()]
    splits = _in_order(images["split"].to_pylist())
    with np.errstate(divide="ignore", invalid="ignore"):
        shares = width * height / of_picture.prod(axis=1)
        aspects = width / height
    return Statistics(
        splits=[_split(name, _is(images, name), per_image) for name in splits],
        class_names=names,
        class_counts={name: np.bincount(classes[_is(boxes, name)], minlength=len(names)) for name in splits},
        class_images=_images_by_class(boxes, len(names)),
        class_side_px=np.array(
            [np.median(part) if len(part) else np.nan for part in by_class(side, classes, len(names))]
        ),
        sizes=_histogram(side, SIZE_EDGES),
        shares=_histogram(shares, SHARE_EDGES),
        aspects=_histogram(aspects, ASPECT_EDGES),
        boxes_per_image=_boxes_per_image(per_image),
        centres=_centres(boxes, of_picture),
        picture_sizes=_picture_size_counts(images),
        licences=_counted(images["licence"].to_pylist()),
        crowd_boxes=int(pc.sum(boxes["iscrowd"]).as_py() or 0),
        left_out=len(raw.images) - len(images) + len(raw.boxes) - len(boxes),
    )


def by_class(values: NDArray[Any], classes: NDArray[np.int32], count: int) -> list[NDArray[Any]]:
    """The values of each class, in their order; one sort, where 365 masks of 25 million boxes would take minutes."""
    ends = np.cumsum(np.bincount(classes, minlength=count))[:-1]
    return np.split(values[np.argsort(classes, kind="stable")], ends) if count else []


def _is(table: Any, split: str) -> NDArray[np.bool_]:
    """The rows of a split."""
    chosen: NDArray[np.bool_] = pc.equal(table["split"], split).to_numpy()
    return chosen


def _in_order(splits: list[str]) -> list[str]:
    present = set(splits)
    return [*(name for name in SPLITS if name in present), *sorted(present - set(SPLITS))]


def _split(name: str, chosen: NDArray[np.bool_], per_image: NDArray[np.int64]) -> SplitCounts:
    counts = per_image[chosen]
    return SplitCounts(name, len(counts), int(counts.sum()), int((counts == 0).sum()), int(counts.max(initial=0)))


def _picture_sizes(raw: RawDataset, image_ids: NDArray[np.int64]) -> NDArray[np.float64]:
    """(N, 2) width and height of each box's picture; NaN where the set does not record it."""
    sides = [raw.images[name].cast("float64").fill_null(np.nan).to_numpy() for name in ("width", "height")]
    return np.stack(sides, axis=1)[image_ids]


def _images_by_class(boxes: Any, classes: int) -> NDArray[np.int64]:
    pairs = boxes["image_id"].to_numpy() * classes + boxes["category"].to_numpy()
    found: NDArray[np.int64] = np.bincount(distinct(pairs) % max(classes, 1), minlength=classes)
    return found


def _histogram(values: NDArray[np.float64], edges: NDArray[np.float64]) -> Histogram:
    kept = np.clip(values[np.isfinite(values)], edges[0], edges[-1])
    return Histogram(edges, np.histogram(kept, edges)[0])


def _boxes_per_image(per_image: NDArray[np.int64]) -> Histogram:
    """At most 40 bins of whole numbers."""
    most = int(per_image.max(initial=0))
    step = max(1, -(-(most + 1) // 40))
    edges = np.arange(0, most + step + 1, step, dtype=np.float64)
    return Histogram(edges, np.histogram(per_image, edges)[0])


def _centres(boxes: Any, of_picture: NDArray[np.float64]) -> NDArray[np.int64]:
    x = (boxes["x"].to_numpy() + boxes["w"].to_numpy() / 2) / of_picture[:, 0]
    y = (boxes["y"].to_numpy() + boxes["h"].to_numpy() / 2) / of_picture[:, 1]
    known = np.isfinite(x) & np.isfinite(y)
    edges = np.linspace(0, 1, HEAT_CELLS + 1)
    found, _, _ = np.histogram2d(np.clip(y[known], 0, 1), np.clip(x[known], 0, 1), bins=(edges, edges))
    cells: NDArray[np.int64] = found.astype(np.int64)
    return cells


def _picture_size_counts(images: Any) -> list[tuple[str, int]]:
    sizes = zip(images["width"].to_pylist(), images["height"].to_pylist(), strict=True)
    return _counted([None if None in size else f"{size[0]} x {size[1]}" for size in sizes])


def _counted(values: list[str | None]) -> list[tuple[str, int]]:
    return Counter("not recorded" if value is None else value for value in values).most_common()
