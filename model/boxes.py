"""Box formats, overlaps and non-maximum suppression on numpy arrays.

``xyxy`` is left, top, right, bottom; ``xywh`` is left, top, width, height (COCO); both in pixels.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Integer
from numpy.typing import NDArray

FloatArray = NDArray[np.floating[Any]]

BLOCK = 128
"""Boxes that suppression judges at once: fewer mean more calls, more mean overlaps that are never asked for."""


def xywh_to_xyxy(boxes_xywh: Float[FloatArray, "*shape 4"]) -> Float[FloatArray, "*shape 4"]:
    """Convert left, top, width, height to left, top, right, bottom."""
    return np.concatenate([boxes_xywh[..., :2], boxes_xywh[..., :2] + boxes_xywh[..., 2:]], axis=-1)


def xyxy_to_xywh(boxes_xyxy: Float[FloatArray, "*shape 4"]) -> Float[FloatArray, "*shape 4"]:
    """Convert left, top, right, bottom to left, top, width, height."""
    return np.concatenate([boxes_xyxy[..., :2], boxes_xyxy[..., 2:] - boxes_xyxy[..., :2]], axis=-1)


def clip_boxes(boxes_xyxy: Float[FloatArray, "*shape 4"], width: int, height: int) -> Float[FloatArray, "*shape 4"]:
    """Cut boxes at the borders of an image of ``width`` x ``height`` pixels; boxes outside become empty."""
    limits = np.array([width, height, width, height], dtype=boxes_xyxy.dtype)
    return np.clip(boxes_xyxy, np.zeros(4, dtype=boxes_xyxy.dtype), limits)


def box_area(boxes_xyxy: Float[FloatArray, "*shape 4"]) -> Float[FloatArray, " *shape"]:
    """Area in square pixels; 0 where right is left of left or bottom above top."""
    sides = np.clip(boxes_xyxy[..., 2:] - boxes_xyxy[..., :2], 0, None)
    area: FloatArray = sides[..., 0] * sides[..., 1]
    return area


def box_iou(first_xyxy: Float[FloatArray, "n 4"], second_xyxy: Float[FloatArray, "m 4"]) -> Float[FloatArray, "n m"]:
    """Intersection over union of every pair; 0 where both boxes are empty."""
    # side by side and in place: arrays (n, m) stay in the cache where (n, m, 2) would not
    (left, top, right, bottom), other = first_xyxy.T[:, :, None], second_xyxy.T
    intersection = np.minimum(right, other[2])
    intersection -= np.maximum(left, other[0])
    np.maximum(intersection, 0, out=intersection)
    height = np.minimum(bottom, other[3])
    height -= np.maximum(top, other[1])
    intersection *= np.maximum(height, 0, out=height)
    union = box_area(first_xyxy)[:, None] + box_area(second_xyxy)
    union -= intersection
    overlap: FloatArray = np.divide(intersection, union, out=np.zeros_like(intersection), where=union > 0)
    return overlap


def non_maximum_suppression(
    boxes_xyxy: Float[FloatArray, "n 4"],
    scores: Float[FloatArray, " n"],
    labels: Integer[NDArray[np.int64], " n"],
    iou_threshold: float,
    most: int | None = None,
) -> Integer[NDArray[np.int64], " kept"]:
    """Indices of the boxes to keep, best first and no more than ``most``; only boxes of one label suppress each other.

    A box falls when its IoU with a better kept box is above the threshold.  Equal scores keep their order.  Boxes are
    judged block by block, so that what comes after the last one wanted costs nothing.
    """
    order = np.argsort(-scores, kind="stable")
    limit = len(order) if most is None else most
    kept = np.empty(0, dtype=np.int64)
    for start in range(0, len(order), BLOCK):
        block = order[start : start + BLOCK]
        block = block[~_overlaps(boxes_xyxy, labels, kept, block, iou_threshold).any(axis=0)]
        kept = np.concatenate([kept, block[_keep_best(_overlaps(boxes_xyxy, labels, block, block, iou_threshold))]])
        if len(kept) >= limit:
            break
    return kept[:limit]


def _overlaps(
    boxes_xyxy: Float[FloatArray, "n 4"],
    labels: Integer[NDArray[np.int64], " n"],
    first: Integer[NDArray[np.int64], " a"],
    second: Integer[NDArray[np.int64], " b"],
    iou_threshold: float,
) -> Bool[NDArray[np.bool_], "a b"]:
    """Which of these boxes have one label and an IoU above the threshold."""
    same_label: NDArray[np.bool_] = labels[first][:, None] == labels[second]
    return same_label & (box_iou(boxes_xyxy[first], boxes_xyxy[second]) > iou_threshold)


def _keep_best(overlaps: Bool[NDArray[np.bool_], "n n"]) -> Bool[NDArray[np.bool_], " n"]:
    """Greedy suppression of boxes that come in falling score order, without a loop over boxes.

    A box is kept when no kept better box overlaps it.  Starting from "all kept" and applying that rule to all boxes at
    once reaches the greedy result after as many rounds as the longest chain of suppressions, usually three or four.
    """
    suppresses = np.triu(overlaps, k=1).astype(np.float32)
    kept = np.ones(len(overlaps), dtype=np.bool_)
    while True:
        updated = (kept.astype(np.float32) @ suppresses) == 0
        if np.array_equal(updated, kept):
            return kept
        kept = updated


def postprocess(
    boxes_xyxy: Float[FloatArray, "A 4"],
    scores: Float[FloatArray, "A C"],
    *,
    score_threshold: float,
    iou_threshold: float,
    pre_nms_top_k: int = 1000,
    max_detections: int = 300,
    multi_label: bool = True,
    class_agnostic: bool = False,
) -> Float[NDArray[np.float32], "n 6"]:
    """Detections of one image: rows x1, y1, x2, y2, score, label in falling score order.

    ``multi_label`` keeps every class of an anchor whose score is above the threshold; otherwise only its best class,
    from the threshold on.  The best ``pre_nms_top_k`` candidates enter suppression, the best ``max_detections`` leave.
    Coordinates stay in the frame of the input boxes.
    """
    candidates = _candidates(scores, score_threshold, multi_label)
    candidate_scores = scores.ravel()[candidates]
    if len(candidates) > pre_nms_top_k:
        best = np.sort(np.argpartition(-candidate_scores, pre_nms_top_k - 1)[:pre_nms_top_k])
        candidates, candidate_scores = candidates[best], candidate_scores[best]
    anchors, labels = np.divmod(candidates, max(1, scores.shape[1]))
    groups = np.zeros_like(labels) if class_agnostic else labels
    kept = non_maximum_suppression(boxes_xyxy[anchors], candidate_scores, groups, iou_threshold, max_detections)
    columns = [boxes_xyxy[anchors[kept]], candidate_scores[kept, None], labels[kept, None]]
    return np.concatenate(columns, axis=1).astype(np.float32)


def _candidates(
    scores: Float[FloatArray, "A C"], score_threshold: float, multi_label: bool
) -> Integer[NDArray[np.int64], " n"]:
    """Places in the flattened scores that pass the threshold: every class of an anchor, or only its best one."""
    if multi_label:
        return np.flatnonzero(scores > score_threshold)
    best: NDArray[np.int64] = np.arange(len(scores)) * scores.shape[1] + scores.argmax(axis=1)
    return best[scores.ravel()[best] >= score_threshold]
