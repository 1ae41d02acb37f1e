"""An ordered selection of labelled images, kept as columns.

Objects365 has 1.7 million images and 25 million boxes: they live in a few flat arrays, shared by every subset
and, after a fork, by every loader process.  Nothing here is a list with one Python object per box.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
from numpy.typing import ArrayLike, NDArray

OpenImage: TypeAlias = Callable[[str], NDArray[np.uint8]]
"""Takes ``ImageSet.path(i)``, returns the picture as RGB uint8 (height, width, 3)."""


@dataclass(frozen=True)
class Annotations:
    """The boxes of one image, in pixels of the original image.

    ``weights`` is 1 for a human label and the teacher's score for a pseudo-label. Crowd regions
    (``is_crowd``) mark areas that the metric ignores; they are no training targets.
    """

    boxes_xyxy: NDArray[np.float32]  # (N, 4)
    labels: NDArray[np.int64]  # (N,) index into class_names
    weights: NDArray[np.float32]  # (N,)
    is_crowd: NDArray[np.bool_]  # (N,)
    area: NDArray[np.float64]  # (N,) COCO's area, which differs from w * h where masks exist
    annotation_id: list[str]

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class BoxColumns:
    """All boxes of an image set, image after image; ``image_index`` counts within that set."""

    image_index: NDArray[np.int64]  # (N,)
    boxes_xywh: NDArray[np.float64]  # (N, 4) pixels of the original image, at full precision
    labels: NDArray[np.int64]  # (N,)
    scores: NDArray[np.float32]  # (N,)
    is_crowd: NDArray[np.bool_]  # (N,)
    area: NDArray[np.float64]  # (N,)

    @property
    def boxes_xyxy(self) -> NDArray[np.float64]:
        corners = self.boxes_xywh.copy()
        corners[:, 2:] += corners[:, :2]
        return corners

    def select(self, rows: ArrayLike) -> BoxColumns:
        """The boxes at these rows, given as a mask or as indices."""
        chosen = as_rows(rows)
        return BoxColumns(
            self.image_index[chosen],
            self.boxes_xywh[chosen],
            self.labels[chosen],
            self.scores[chosen],
            self.is_crowd[chosen],
            self.area[chosen],
        )


@dataclass(frozen=True)
class Columns:
    """The arrays behind image sets: one row an image, one row a box, boxes in the order of their images."""

    image_ids: NDArray[np.int64]
    paths: pa.ChunkedArray
    sha256: pa.ChunkedArray
    sizes: NDArray[np.int32]  # (images, 2) width, height
    first_box: NDArray[np.int64]  # (images + 1,) boxes of image i are rows first_box[i] : first_box[i + 1]
    boxes_xywh: NDArray[np.float64]
    labels: NDArray[np.int32]
    scores: NDArray[np.float32]
    is_crowd: NDArray[np.bool_]
    area: NDArray[np.float64]
    annotation_ids: pa.ChunkedArray


class ImageSet:
    """Images with their boxes, addressed by position 0 … len - 1. Cheap to subset and to send to a
    process.
    """

    def __init__(self, columns: Columns, class_names: Sequence[str], rows: NDArray[np.int64] | None = None) -> None:
        self.class_names = tuple(class_names)
        self._columns = columns
        self._rows = np.arange(len(columns.image_ids)) if rows is None else rows

    @classmethod
    def from_arrays(
        cls,
        class_names: Sequence[str],
        paths: Sequence[str],
        sizes: ArrayLike,
        image_index: ArrayLike = (),
        boxes_xywh: ArrayLike = (),
        labels: ArrayLike = (),
        *,
        scores: ArrayLike = 1.0,
        is_crowd: ArrayLike = False,
    ) -> ImageSet:
        """A set without a table behind it: I images, N boxes in any order; ids count from 0.

        ``sizes`` (I, 2) width and height; ``boxes_xywh`` (N, 4) pixels; ``image_index`` and ``labels`` (N,);
        ``scores`` and ``is_crowd`` (N,) or one for all.  The area of a box is w * h.
        """
        owners = np.asarray(image_index, np.int64)
        order = np.argsort(owners, kind="stable")
        boxes = np.asarray(boxes_xywh, np.float64).reshape(-1, 4)[order]
        columns = Columns(
            image_ids=np.arange(len(paths)),
            paths=pa.chunked_array([pa.array(paths, pa.string())]),
            sha256=pa.chunked_array([pa.nulls(len(paths), pa.string())]),
            sizes=np.asarray(sizes, np.int32).reshape(-1, 2),
            first_box=np.searchsorted(owners[order], np.arange(len(paths) + 1)).astype(np.int64),
            boxes_xywh=boxes,
            labels=np.asarray(labels, np.int32)[order],
            scores=np.broadcast_to(np.asarray(scores, np.float32), owners.shape)[order],
            is_crowd=np.broadcast_to(np.asarray(is_crowd, np.bool_), owners.shape)[order],
            area=boxes[:, 2] * boxes[:, 3],
            annotation_ids=pa.chunked_array([pa.array([str(row) for row in order], pa.string())]),
        )
        return cls(columns, class_names)

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def image_ids(self) -> NDArray[np.int64]:
        """The table's image ids, (images,).  After ``concatenate`` an id may occur once per source set."""
        return self._columns.image_ids[self._rows]

    @property
    def sizes(self) -> NDArray[np.int32]:
        """Widths and heights in pixels, (images, 2)."""
        return self._columns.sizes[self._rows]

    @property
    def box_counts(self) -> NDArray[np.int64]:
        """Boxes of each image, crowd regions included, (images,)."""
        first_box = self._columns.first_box
        return first_box[self._rows + 1] - first_box[self._rows]

    def path(self, index: int) -> str:
        """``root/relative/path.jpg`` with a symbolic root; an ``OpenImage`` knows the folder behind it."""
        return str(self._columns.paths[self._rows[index]].as_py())

    def size(self, index: int) -> tuple[int, int]:
        """(width, height) in pixels."""
        width, height = self._columns.sizes[self._rows[index]]
        return int(width), int(height)

    def sha256(self, index: int) -> str | None:
        """Digest of the file's bytes, None where it has not been read yet."""
        value = self._columns.sha256[self._rows[index]].as_py()
        return None if value is None else str(value)

    def boxes(self, index: int) -> Annotations:
        """The boxes of one image; an image without any gives arrays of length 0."""
        columns, row = self._columns, self._rows[index]
        rows = slice(int(columns.first_box[row]), int(columns.first_box[row + 1]))
        corners = columns.boxes_xywh[rows].copy()
        corners[:, 2:] += corners[:, :2]
        return Annotations(
            boxes_xyxy=corners.astype(np.float32),
            labels=columns.labels[rows].astype(np.int64),
            weights=columns.scores[rows],
            is_crowd=columns.is_crowd[rows],
            area=columns.area[rows],
            annotation_id=columns.annotation_ids[rows].to_pylist(),
        )

    def targets(self, index: int) -> tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.float32]]:
        """``boxes_xyxy``, ``labels`` and ``weights`` of one image as ``boxes`` gives them, crowd regions left out."""
        columns, row = self._columns, self._rows[index]
        rows: Any = slice(int(columns.first_box[row]), int(columns.first_box[row + 1]))
        if columns.is_crowd[rows].any():
            rows = rows.start + np.flatnonzero(~columns.is_crowd[rows])
        corners = columns.boxes_xywh[rows].copy()
        corners[:, 2:] += corners[:, :2]
        return corners.astype(np.float32), columns.labels[rows].astype(np.int64), columns.scores[rows]

    def all_boxes(self) -> BoxColumns:
        """The boxes of every image as flat arrays."""
        columns, counts = self._columns, self.box_counts
        rows = index_ranges(columns.first_box[self._rows], counts)
        return BoxColumns(
            image_index=np.repeat(np.arange(len(self)), counts),
            boxes_xywh=columns.boxes_xywh[rows],
            labels=columns.labels[rows].astype(np.int64),
            scores=columns.scores[rows],
            is_crowd=columns.is_crowd[rows],
            area=columns.area[rows],
        )

    def with_scores(self, scores: ArrayLike) -> ImageSet:
        """The same images and boxes, the boxes with these scores, in the order of ``all_boxes``."""
        columns = _compact(self)
        values = np.broadcast_to(np.asarray(scores, np.float32), columns.scores.shape)
        return ImageSet(replace(columns, scores=values), self.class_names)

    def class_counts(self) -> dict[str, int]:
        """Boxes of each class, crowd regions left out."""
        boxes = self.all_boxes()
        counts = np.bincount(boxes.labels[~boxes.is_crowd], minlength=len(self.class_names))
        return dict(zip(self.class_names, counts.tolist(), strict=True))

    def subset(self, indices: ArrayLike) -> ImageSet:
        """The images at these positions, in this order; a boolean mask of length ``len(self)`` works too."""
        return ImageSet(self._columns, self.class_names, self._rows[as_rows(indices)])


def concatenate(image_sets: Sequence[ImageSet]) -> ImageSet:
    """The images of several sets one after the other, labels unchanged.

    Raises ``ValueError`` when the class lists differ: names must be mapped explicitly before sets may meet.
    """
    if not image_sets:
        raise ValueError("concatenate needs at least one image set, got none")
    class_names = image_sets[0].class_names
    for position, image_set in enumerate(image_sets):
        if image_set.class_names != class_names:
            raise ValueError(
                f"image set {position} has the classes {list(image_set.class_names)}, the first one has "
                f"{list(class_names)}; map the class names before joining the sets"
            )
    if len(image_sets) == 1:
        return image_sets[0]
    parts = [_compact(image_set) for image_set in image_sets]
    counts = np.concatenate([np.diff(part.first_box) for part in parts])
    return ImageSet(
        Columns(
            image_ids=np.concatenate([part.image_ids for part in parts]),
            paths=_join([part.paths for part in parts]),
            sha256=_join([part.sha256 for part in parts]),
            sizes=np.concatenate([part.sizes for part in parts]),
            first_box=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
            boxes_xywh=np.concatenate([part.boxes_xywh for part in parts]),
            labels=np.concatenate([part.labels for part in parts]),
            scores=np.concatenate([part.scores for part in parts]),
            is_crowd=np.concatenate([part.is_crowd for part in parts]),
            area=np.concatenate([part.area for part in parts]),
            annotation_ids=_join([part.annotation_ids for part in parts]),
        ),
        class_names,
    )


def _compact(image_set: ImageSet) -> Columns:
    """Columns that hold the rows of this set only, in its order."""
    columns, images = image_set._columns, image_set._rows
    rows = index_ranges(columns.first_box[images], image_set.box_counts)
    return Columns(
        image_ids=columns.image_ids[images],
        paths=columns.paths.take(pa.array(images)),
        sha256=columns.sha256.take(pa.array(images)),
        sizes=columns.sizes[images],
        first_box=np.concatenate([[0], np.cumsum(image_set.box_counts)]).astype(np.int64),
        boxes_xywh=columns.boxes_xywh[rows],
        labels=columns.labels[rows],
        scores=columns.scores[rows],
        is_crowd=columns.is_crowd[rows],
        area=columns.area[rows],
        annotation_ids=columns.annotation_ids.take(pa.array(rows)),
    )


def _join(columns: list[pa.ChunkedArray]) -> pa.ChunkedArray:
    return pa.chunked_array([chunk for column in columns for chunk in column.chunks], type=columns[0].type)


def as_rows(rows: ArrayLike) -> NDArray[Any]:
    """A mask as it is, anything else (an empty list too) as indices."""
    chosen = np.asarray(rows)
    return chosen if chosen.dtype == np.bool_ else chosen.astype(np.int64)


def index_ranges(first: NDArray[np.int64], counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """first[0] … first[0]+counts[0]-1, first[1] …: the positions of several runs in one array."""
    before = np.cumsum(counts) - counts
    return np.repeat(first - before, counts) + np.arange(int(counts.sum()))
