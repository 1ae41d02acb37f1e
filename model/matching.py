"""Detections matched with ground truth by COCO's rules and in columns.

Equal to pycocotools (the tests compare), but without its Python object per box and per (image, class) pair,
of which Objects365's validation set has 29 million; and the matches stay available for curves, thresholds and
bootstraps.

Legend: N detections, M ground-truth boxes, P overlapping pairs of the two, T IoU thresholds.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from model.data.image_set import BoxColumns, index_ranges
from model.detections import Detections

COCO_IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)
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
    ranks: Indices  # (N,) place among the detections of the same image and class, best score 0
    by_score: Indices  # (N,) rows class by class in falling score order, equal scores image by image
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


@dataclass(frozen=True)
class Pairs:
    """Detections and ground-truth boxes that overlap enough to meet, in the order of their rows."""

    detection: Indices  # (P,)
    truth: Indices  # (P,)
    iou: Floats  # (P,)

    def select(self, rows: Indices | Mask) -> Pairs:
        """The pairs at these places, given as a mask or as indices."""
        return Pairs(self.detection[rows], self.truth[rows], self.iou[rows])


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
    (matches,) = match_by_area(
        detections,
        truth,
        (area_range,),
        iou_thresholds=iou_thresholds,
        max_detections=max_detections,
        within_class=within_class,
    )
    return matches


def match_by_area(
    detections: Detections,
    truth: BoxColumns,
    area_ranges: Sequence[tuple[float, float]],
    *,
    iou_thresholds: Floats = COCO_IOU_THRESHOLDS,
    max_detections: int = 100,
    within_class: bool = True,
) -> Iterator[Matches]:
    """``match`` for one area range after the other; what does not depend on areas is done once."""
    meeting = meet(
        detections,
        truth,
        minimum_iou=float(iou_thresholds.min()),
        max_detections=max_detections,
        within_class=within_class,
    )
    by_score = np.lexsort((detections.image_index, -detections.scores, detections.labels))
    for area_range in area_ranges:
        yield _match_one(meeting, by_score, iou_thresholds, area_range)


@dataclass(frozen=True)
class Meeting:
    """Detections, ground truth, and which of them overlap."""

    detections: Detections
    truth: BoxColumns
    ranks: Indices  # (N,) place of each detection in its group, best score 0
    counted: Mask  # (N,) among the best of its group
    pairs: Pairs


def meet(
    detections: Detections, truth: BoxColumns, *, minimum_iou: float, max_detections: int, within_class: bool
) -> Meeting:
    """The pairs with at least ``minimum_iou`` (overlap with a crowd region: as part of the detection).

    Groups are the detections of an image and class, or of an image; the best ``max_detections`` of each take part.
    """
    class_count = 1 + int(max(detections.labels.max(initial=0), truth.labels.max(initial=0))) if within_class else 1
    groups = detections.image_index * class_count + detections.labels * within_class
    truth_groups = truth.image_index * class_count + truth.labels * within_class
    ranks = _ranks(groups, detections.scores)
    counted = ranks < max_detections
    boxes_xywh = detections.boxes_xywh
    pairs = _overlapping_pairs(boxes_xywh, groups, counted, truth, truth_groups, minimum_iou)
    return Meeting(detections, truth, ranks, counted, pairs)


def _match_one(meeting: Meeting, by_score: Indices, iou_thresholds: Floats, area_range: tuple[float, float]) -> Matches:
    detections, truth = meeting.detections, meeting.truth
    truth_ignored = truth.is_crowd | ~_inside(truth.area, area_range)
    matched = _greedy(meeting.pairs, meeting.ranks, truth_ignored, truth.is_crowd, iou_thresholds)
    sides = detections.boxes_xywh[:, 2:]
    outside = ~_inside(sides[:, 0] * sides[:, 1], area_range)
    ignored = np.where(matched >= 0, np.append(truth_ignored, False)[matched], outside)
    return Matches(
        iou_thresholds=iou_thresholds,
        image_index=detections.image_index,
        labels=detections.labels,
        scores=detections.scores,
        ranks=meeting.ranks,
        by_score=by_score,
        truth=matched,
        ignored=ignored | ~meeting.counted,
        truth_image_index=truth.image_index,
        truth_labels=truth.labels,
        truth_ignored=truth_ignored,
    )


def _inside(area: Floats, area_range: tuple[float, float]) -> Mask:
    inside: Mask = (area >= area_range[0]) & (area <= area_range[1])
    return inside


def _ranks(groups: Indices, scores: NDArray[np.float32]) -> Indices:
    """Place of each detection in its group, best score 0; equal scores keep their order."""
    order = np.lexsort((-scores, groups))
    _, first, counts = np.unique(groups[order], return_index=True, return_counts=True)
    ranks = np.empty(len(groups), np.int64)
    ranks[order] = np.arange(len(groups)) - np.repeat(first, counts)
    return ranks


def _overlapping_pairs(
    boxes_xywh: Floats,
    groups: Indices,
    counted: Mask,
    truth: BoxColumns,
    truth_groups: Indices,
    minimum_iou: float,
) -> Pairs:
    truth_order = np.argsort(truth_groups, kind="stable")
    sorted_groups = truth_groups[truth_order]
    rows = np.flatnonzero(counted)
    first = np.searchsorted(sorted_groups, groups[rows], side="left")
    counts = np.searchsorted(sorted_groups, groups[rows], side="right") - first
    parts = [Pairs(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0))]
    ends = np.cumsum(counts)
    cuts = np.searchsorted(ends, np.arange(PAIRS_AT_ONCE, ends[-1] if len(ends) else 0, PAIRS_AT_ONCE))
    for chunk in np.split(np.arange(len(rows)), cuts):
        detection = np.repeat(rows[chunk], counts[chunk])
        other = truth_order[index_ranges(first[chunk], counts[chunk])]
        iou = row_iou(boxes_xywh[detection], truth.boxes_xywh[other], truth.is_crowd[other])
        near = iou >= min(minimum_iou, 1 - 1e-10)
        parts.append(Pairs(detection[near], other[near], iou[near]))
    return Pairs(*(np.concatenate([getattr(part, name) for part in parts]) for name in ("detection", "truth", "iou")))


def row_iou(first_xywh: Floats, second_xywh: Floats, second_is_crowd: Mask) -> Floats:
    """Intersection over union, row by row; over the first box's area where the second is a crowd region."""
    ends = np.minimum(first_xywh[:, :2] + first_xywh[:, 2:], second_xywh[:, :2] + second_xywh[:, 2:])
    sides = ends - np.maximum(first_xywh[:, :2], second_xywh[:, :2])
    intersection = np.where((sides > 0).all(axis=1), sides[:, 0] * sides[:, 1], 0.0)
    first_area, second_area = first_xywh[:, 2] * first_xywh[:, 3], second_xywh[:, 2] * second_xywh[:, 3]
    union = np.where(second_is_crowd, first_area, first_area + second_area - intersection)
    return np.divide(intersection, union, out=np.zeros_like(union), where=union > 0)


def _greedy(pairs: Pairs, ranks: Indices, ignored: Mask, is_crowd: Mask, iou_thresholds: Floats) -> Indices:
    """(T, N) matched ground truth, all thresholds together and without a loop over detections.

    Every detection asks for the best box left to it. Of those that ask for the same box the best ranked keeps it for
    now and all worse ranked lose it for good, since whoever takes it later ranks even better. When nobody loses
    anything, everybody has what taking turns would have given: deferred acceptance (Gale and Shapley 1962) where all
    boxes agree whom they prefer. Crowd regions take everybody.
    """
    order = np.lexsort((-pairs.truth, -pairs.iou, ignored[pairs.truth], pairs.detection))
    thresholds = np.minimum(iou_thresholds, 1 - 1e-10)
    row, place = np.nonzero(pairs.iou[order] >= thresholds[:, None])
    detection, truth = pairs.detection[order][place], pairs.truth[order][place]
    asker, asked, rank = row * len(ranks) + detection, row * len(ignored) + truth, ranks[detection]
    exclusive = ~is_crowd[truth]
    best_rank = np.full(len(thresholds) * len(ignored), len(ranks))
    while True:
        first = np.append(True, asker[1:] != asker[:-1])[: len(asker)]
        claims = first & exclusive
        np.minimum.at(best_rank, asked[claims], rank[claims])
        left = (rank <= best_rank[asked]) | ~exclusive
        if left.all():
            break
        asker, asked, rank, exclusive = asker[left], asked[left], rank[left], exclusive[left]
    matched = np.full(len(thresholds) * len(ranks), -1, np.int64)
    matched[asker[first]] = asked[first] % max(1, len(ignored))
    return matched.reshape(len(thresholds), len(ranks))
