"""Box formats, overlaps and non-maximum suppression on numpy arrays.

``xyxy`` is left, top, right, bottom; ``xywh`` is left, top, width, height (COCO); both in pixels.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Integer
from numpy.typing import NDArray

FloatArray = NDArray[np.floating[Any]]


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
    left_top = np.maximum(first_xyxy[:, None, :2], second_xyxy[None, :, :2])
    right_bottom = np.minimum(first_xyxy[:, None, 2:], second_xyxy[None, :, 2:])
    sides = np.clip(right_bottom - left_top, 0, None)
    intersection = sides[..., 0] * sides[..., 1]
    union = box_area(first_xyxy)[:, None] + box_area(second_xyxy)[None, :] - intersection
    overlap: FloatArray = np.divide(intersection, union, out=np.zeros_like(intersection), where=union > 0)
    return overlap


def _keep_best(boxes_xyxy: Float[FloatArray, "n 4"], iou_threshold: float) -> Bool[NDArray[np.bool_], " n"]:
    """Greedy suppression of boxes that come in falling score order, without a loop over boxes.

    A box is kept when no kept better box overlaps it.  Starting from "all kept" and applying that rule to all boxes at
    once reaches the greedy result after as many rounds as the longest chain of suppressions, usually three or four.
    """
    suppresses = np.triu(box_iou(boxes_xyxy, boxes_xyxy) > iou_threshold, k=1).astype(np.float32)
    kept = np.ones(len(boxes_xyxy), dtype=np.bool_)
    while True:
        updated = (kept.astype(np.float32) @ suppresses) == 0
        if np.array_equal(updated, kept):
            return kept
        kept = updated


def non_maximum_suppression(
    boxes_xyxy: Float[FloatArray, "n 4"],
    scores: Float[FloatArray, " n"],
    labels: Integer[NDArray[np.int64], " n"],
    iou_threshold: float,
) -> Integer[NDArray[np.int64], " kept"]:
    """Indices of the boxes to keep, best first; only boxes of the same label suppress each other.

    A box falls when its IoU with a better kept box is above the threshold.  Equal scores keep their order.
    """
    order = np.argsort(-scores, kind="stable")
    kept = np.zeros(len(order), dtype=np.bool_)
    sorted_labels = labels[order]
    for label in np.unique(sorted_labels):
        members = np.flatnonzero(sorted_labels == label)
        kept[members] = _keep_best(boxes_xyxy[order[members]], iou_threshold)
    return order[kept]


def _candidates(
    scores: Float[FloatArray, "A C"], score_threshold: float, multi_label: bool
) -> tuple[Integer[NDArray[np.int64], " n"], Integer[NDArray[np.int64], " n"]]:
    """Anchor and class indices that pass the threshold: every class of an anchor, or only its best one."""
    if multi_label:
        anchors, labels = np.nonzero(scores > score_threshold)
        return anchors, labels
    best = scores.argmax(axis=1)
    anchors = np.flatnonzero(scores[np.arange(len(best)), best] >= score_threshold)
    return anchors, best[anchors]


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
    anchors, labels = _candidates(scores, score_threshold, multi_label)
    candidate_scores = scores[anchors, labels]
    if len(anchors) > pre_nms_top_k:
        best = np.sort(np.argpartition(-candidate_scores, pre_nms_top_k - 1)[:pre_nms_top_k])
        anchors, labels, candidate_scores = anchors[best], labels[best], candidate_scores[best]
    groups = np.zeros_like(labels) if class_agnostic else labels
    kept = non_maximum_suppression(boxes_xyxy[anchors], candidate_scores, groups, iou_threshold)[:max_detections]
    columns = [boxes_xyxy[anchors[kept]], candidate_scores[kept, None], labels[kept, None]]
    return np.concatenate(columns, axis=1).astype(np.float32)
