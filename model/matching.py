"""Detections matched with ground truth, and average precision, by COCO's rules and in columns.

Equal to pycocotools (the tests compare), but without its Python object per box and per (image, class) pair,
of which Objects365's validation set has 29 million; and the matches stay available for curves, thresholds and
bootstraps.

Legend: N detections, M ground-truth boxes, T IoU thresholds, K classes, R = 101 recall points.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from model.data.image_set import BoxColumns, index_ranges
from model.detections import Detections

COCO_IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)
RECALL_POINTS = np.linspace(0.0, 1.0, 101)
ALL_AREAS = (0.0, 1e10)
PAIRS_AT_ONCE = 2_000_000  # bounds the memory for overlaps, about 100 bytes each

Floats = NDArray[np.float64]
Indices = NDArray[np.int64]
Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Matches:
    """What each detection met.  Rows keep the order of the detections that were matched."""

    iou_thresholds: Floats  # (T,)
    image_index: Indices  # (N,)
    labels: Indices  # (N,)
    scores: NDArray[np.float32]  # (N,)
    truth: Indices  # (T, N) row of the matched ground-truth box, -1: none
    ignored: Mask  # (T, N) neither right nor wrong: on a crowd, or outside the area range, or beyond the maximum
    truth_image_index: Indices  # (M,)
    truth_labels: Indices  # (M,)
    truth_ignored: Mask  # (M,)

    @property
    def correct(self) -> Mask:
        """(T, N) true positives."""
        return (self.truth >= 0) & ~self.ignored

    @property
    def wrong(self) -> Mask:
        """(T, N) false positives."""
        return (self.truth < 0) & ~self.ignored


def match(
    detections: Detections,
    truth: BoxColumns,
    *,
    iou_thresholds: Floats = COCO_IOU_THRESHOLDS,
    area_range: tuple[float, float] = ALL_AREAS,
    max_detections: int = 100,
    within_class: bool = True,
) -> Matches:
    """Greedy matching, best score first: a detection takes the free ground-truth box that it overlaps most.

    The rules of COCO: only boxes of the same image and class meet (``within_class=False``: of the same
    image); the best ``max_detections`` of such a group count; crowd regions and boxes outside ``area_range``
    (square pixels) are taken only when no other box is free, and then the detection is ignored. IoU
    thresholds are at least 0.1.
    """
    class_count = 1 + int(max(detections.labels.max(initial=0), truth.labels.max(initial=0))) if within_class else 1
    detection_groups = detections.image_index * class_count + detections.labels * within_class
    truth_groups = truth.image_index * class_count + truth.labels * within_class
    ranks = _ranks(detection_groups, detections.scores)
    truth_ignored = truth.is_crowd | ~_inside(truth.area, area_range)
    pairs = _overlapping_pairs(
        _xywh(detections.boxes_xyxy),
        detection_groups,
        ranks < max_detections,
        truth,
        truth_groups,
        float(iou_thresholds.min()),
    )
    matched = _greedy(pairs, ranks, truth_ignored, truth.is_crowd, iou_thresholds)
    outside = ~_inside(_xywh(detections.boxes_xyxy)[:, 2:].prod(axis=1), area_range)
    ignored = np.where(matched >= 0, np.append(truth_ignored, False)[matched], outside)
    return Matches(
        iou_thresholds,
        detections.image_index,
        detections.labels,
        detections.scores,
        matched,
        ignored | (ranks >= max_detections),
        truth.image_index,
        truth.labels,
        truth_ignored,
    )


def _inside(area: Floats, area_range: tuple[float, float]) -> Mask:
    inside: Mask = (area >= area_range[0]) & (area <= area_range[1])
    return inside


def _xywh(boxes_xyxy: NDArray[np.float32]) -> Floats:
    boxes = boxes_xyxy.astype(np.float64)
    boxes[:, 2:] -= boxes[:, :2]
    return boxes


def _ranks(groups: Indices, scores: NDArray[np.float32]) -> Indices:
    """Place of each detection in its group, best score 0; equal scores keep their order."""
    order = np.lexsort((-scores, groups))
    _, first, counts = np.unique(groups[order], return_index=True, return_counts=True)
    ranks = np.empty(len(groups), np.int64)
    ranks[order] = np.arange(len(groups)) - np.repeat(first, counts)
    return ranks


@dataclass(frozen=True)
class _Pairs:
    """Detections and ground-truth boxes of one group that overlap at least as the lowest threshold asks."""

    detection: Indices
    truth: Indices
    iou: Floats


def _overlapping_pairs(
    boxes_xywh: Floats,
    groups: Indices,
    counted: Mask,
    truth: BoxColumns,
    truth_groups: Indices,
    minimum_iou: float,
) -> _Pairs:
    truth_order = np.argsort(truth_groups, kind="stable")
    sorted_groups = truth_groups[truth_order]
    rows = np.flatnonzero(counted)
    first = np.searchsorted(sorted_groups, groups[rows], side="left")
    counts = np.searchsorted(sorted_groups, groups[rows], side="right") - first
    parts = [_Pairs(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0))]
    ends = np.cumsum(counts)
    cuts = np.searchsorted(ends, np.arange(PAIRS_AT_ONCE, ends[-1] if len(ends) else 0, PAIRS_AT_ONCE))
    for chunk in np.split(np.arange(len(rows)), cuts):
        detection = np.repeat(rows[chunk], counts[chunk])
        other = truth_order[index_ranges(first[chunk], counts[chunk])]
        iou = _iou(boxes_xywh[detection], truth.boxes_xywh[other], truth.is_crowd[other])
        near = iou >= min(minimum_iou, 1 - 1e-10)
        parts.append(_Pairs(detection[near], other[near], iou[near]))
    return _Pairs(*(np.concatenate([getattr(part, name) for part in parts]) for name in ("detection", "truth", "iou")))


def _iou(first_xywh: Floats, second_xywh: Floats, second_is_crowd: Mask) -> Floats:
    """Intersection over union, row by row; over the first box's area where the second is a crowd region."""
    ends = np.minimum(first_xywh[:, :2] + first_xywh[:, 2:], second_xywh[:, :2] + second_xywh[:, 2:])
    sides = ends - np.maximum(first_xywh[:, :2], second_xywh[:, :2])
    intersection = np.where((sides > 0).all(axis=1), sides[:, 0] * sides[:, 1], 0.0)
    first_area, second_area = first_xywh[:, 2] * first_xywh[:, 3], second_xywh[:, 2] * second_xywh[:, 3]
    union = np.where(second_is_crowd, first_area, first_area + second_area - intersection)
    return np.divide(intersection, union, out=np.zeros_like(union), where=union > 0)


def _greedy(pairs: _Pairs, ranks: Indices, ignored: Mask, is_crowd: Mask, iou_thresholds: Floats) -> Indices:
    """(T, N) matched ground truth. All groups advance together, one rank a round: in a round every detection
    is of another group, so no two want the same box.
    """
    order = np.lexsort((pairs.truth, pairs.iou, ~ignored[pairs.truth], pairs.detection, ranks[pairs.detection]))
    detection, truth, iou = pairs.detection[order], pairs.truth[order], pairs.iou[order]
    rounds = np.flatnonzero(np.diff(ranks[detection], prepend=-1, append=-1)) if len(detection) else np.zeros(1, int)
    matched = np.full((len(iou_thresholds), len(ranks)), -1, np.int64)
    for row, threshold in enumerate(np.minimum(iou_thresholds, 1 - 1e-10)):
        taken = np.zeros(len(ignored), np.bool_)
        for start, stop in pairwise(rounds):
            free = start + np.flatnonzero((iou[start:stop] >= threshold) & ~taken[truth[start:stop]])
            best = free[np.append(detection[free][1:] != detection[free][:-1], True)] if len(free) else free
            matched[row, detection[best]] = truth[best]
            taken[truth[best]] = ~is_crowd[truth[best]]
    return matched


@dataclass(frozen=True)
class PrecisionRecall:
    """Interpolated precision at 101 recalls; classes without ground truth hold NaN."""

    precision: Floats  # (T, R, K)
    score: Floats  # (T, R, K) score at which that recall is reached, 0 where it never is
    recall: Floats  # (T, K) largest recall

    def average_precision(self) -> Floats:
        """(T, K)."""
        average: Floats = self.precision.mean(axis=1)
        return average


def precision_recall(
    matches: Matches, class_count: int, image_counts: NDArray[np.int64] | None = None
) -> PrecisionRecall:
    """COCO's precision-recall curves of each class and threshold.

    ``image_counts`` says how often each image counts (a bootstrap sample); default: once.
    """
    counts = np.ones(1 + _last(matches), np.int64) if image_counts is None else image_counts
    correct = matches.correct * counts[matches.image_index]
    wrong = matches.wrong * counts[matches.image_index]
    totals = np.bincount(matches.truth_labels, ~matches.truth_ignored * counts[matches.truth_image_index], class_count)
    shape = (len(matches.iou_thresholds), len(RECALL_POINTS), class_count)
    precision, score = np.full(shape, np.nan), np.full(shape, np.nan)
    recall = np.full((shape[0], class_count), np.nan)
    order = np.lexsort((matches.image_index, -matches.scores, matches.labels))
    bounds = np.searchsorted(matches.labels[order], np.arange(class_count + 1))
    for label in np.flatnonzero(totals > 0):
        rows = order[bounds[label] : bounds[label + 1]]
        curves = _interpolate(
            np.cumsum(correct[:, rows], axis=1, dtype=np.float64),
            np.cumsum(wrong[:, rows], axis=1, dtype=np.float64),
            float(totals[label]),
            matches.scores[rows],
        )
        precision[:, :, label], score[:, :, label], recall[:, label] = curves
    return PrecisionRecall(precision, score, recall)


def _last(matches: Matches) -> int:
    return int(max(matches.image_index.max(initial=0), matches.truth_image_index.max(initial=0)))


def _interpolate(
    correct: Floats, wrong: Floats, total: float, scores: NDArray[np.float32]
) -> tuple[Floats, Floats, Floats]:
    """Precision (T, R), score (T, R) and largest recall (T,) from running counts (T, n)."""
    threshold_count, count = correct.shape
    recall = correct / total
    precision = correct / (correct + wrong + np.spacing(1))
    envelope = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
    places = np.stack([np.searchsorted(row, RECALL_POINTS, side="left") for row in recall])
    padded = np.concatenate([envelope, np.zeros((threshold_count, 1))], axis=1)
    largest = recall[:, -1] if count else np.zeros(threshold_count)
    return np.take_along_axis(padded, places, axis=1), np.append(scores, 0.0)[places], largest
