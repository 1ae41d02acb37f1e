"""Detections of many images as columns, and the way from network outputs to them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike, NDArray

from model.boxes import clip_boxes, postprocess
from model.data.image_set import ImageSet, as_rows
from model.preprocessing import Letterbox


@dataclass(frozen=True)
class Detections:
    """N detections; ``image_index`` is a position in the image set they belong to.

    Within an image the rows come in falling score order. Boxes are in pixels of the original image, inside
    it.
    """

    image_index: NDArray[np.int64]  # (N,)
    boxes_xyxy: NDArray[np.float32]  # (N, 4)
    scores: NDArray[np.float32]  # (N,)
    labels: NDArray[np.int64]  # (N,)

    def __len__(self) -> int:
        return len(self.scores)

    @property
    def boxes_xywh(self) -> NDArray[np.float64]:
        """(N, 4) left, top, width, height at the precision of COCO's arithmetic."""
        boxes = self.boxes_xyxy.astype(np.float64)
        boxes[:, 2:] -= boxes[:, :2]
        return boxes

    def select(self, rows: ArrayLike) -> Detections:
        """The detections at these rows, given as a mask or as indices."""
        chosen = as_rows(rows)
        return Detections(self.image_index[chosen], self.boxes_xyxy[chosen], self.scores[chosen], self.labels[chosen])

    def of_image(self, index: int) -> Detections:
        """The detections of one image, best first."""
        rows = np.flatnonzero(self.image_index == index)
        return self.select(rows[np.argsort(-self.scores[rows], kind="stable")])

    @classmethod
    def from_rows(cls, rows: Sequence[NDArray[np.float32]], first_image: int = 0) -> Detections:
        """From one array (n, 6) an image: x1, y1, x2, y2, score, label."""
        table = np.concatenate([np.empty((0, 6), np.float32), *rows])
        counts = [len(image_rows) for image_rows in rows]
        return cls(
            np.repeat(np.arange(first_image, first_image + len(rows)), counts).astype(np.int64),
            np.ascontiguousarray(table[:, :4]),
            np.ascontiguousarray(table[:, 4]),
            table[:, 5].astype(np.int64),
        )


def check_fits(detections: Detections, image_set: ImageSet) -> None:
    """Raise ``ValueError`` for detections of an image or a class that the set does not have."""
    if len(detections) and int(detections.image_index.max()) >= len(image_set):
        raise ValueError(f"detections name image {detections.image_index.max()}, the set has {len(image_set)} images")
    if len(detections) and int(detections.labels.max()) >= len(image_set.class_names):
        raise ValueError(
            f"detections name class {detections.labels.max()}, the set has only {len(image_set.class_names)} classes"
        )


def detections_in_original_pixels(
    boxes_xyxy: Float[NDArray[np.float32], "B A 4"],
    scores: Float[NDArray[np.float32], "B A C"],
    letterboxes: Sequence[Letterbox],
    *,
    score_threshold: float,
    iou_threshold: float,
    max_detections: int,
) -> list[NDArray[np.float32]]:
    """One array (n, 6) an image, rows x1, y1, x2, y2, score, label, boxes clipped to the original image."""
    results = []
    for image_boxes, image_scores, letterbox in zip(boxes_xyxy, scores, letterboxes, strict=True):
        rows = postprocess(
            image_boxes,
            image_scores,
            score_threshold=score_threshold,
            iou_threshold=iou_threshold,
            max_detections=max_detections,
        )
        original_xyxy = letterbox.to_original(rows[:, :4])
        rows[:, :4] = clip_boxes(original_xyxy, letterbox.width, letterbox.height)
        results.append(rows)
    return results
