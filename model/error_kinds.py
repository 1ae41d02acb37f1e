"""What kinds of mistakes a detector makes, and how much accuracy each costs: TIDE (arXiv:2008.08115).

Legend: N detections, M ground-truth boxes, K classes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from model.average_precision import mean_of_known, precision_recall
from model.data.image_set import BoxColumns, ImageSet
from model.detections import Detections, check_fits
from model.json_values import without_nan
from model.matching import Floats, Indices, Mask, Matches, Pairs, match, meet

FOREGROUND_IOU = 0.5
BACKGROUND_IOU = 0.1
KINDS = ("classification", "localization", "both", "duplicate", "background", "missed")
MEANINGS = {
    "classification": "on an object of another class",
    "localization": "right class, IoU 0.1 to 0.5",
    "both": "wrong class, IoU 0.1 to 0.5",
    "duplicate": "object was found already",
    "background": "IoU below 0.1 with all",
    "missed": "object not found at all",
}
"""In a few words; IoU is that with the best fitting box."""


@dataclass(frozen=True)
class ErrorKinds:
    """Errors at IoU 0.5 by kind (``KINDS``), over all classes and for each.

    A wrong detection counts for the class that was detected, a missed box for its own.  ``counts`` are of detections
    of at least ``score_threshold``.  ``gains`` weigh all detections: the AP50 (fraction, mean over classes with ground
    truth) that the evaluation would gain if all errors of one kind were put right and nothing else changed.
    """

    counts: dict[str, int]
    counts_per_class: dict[str, dict[str, int]]
    gains: dict[str, float]
    gains_per_class: dict[str, dict[str, float]]  # only classes with ground truth
    gain_without_false_positives: float  # all wrong detections gone
    gain_without_false_negatives: float  # all boxes found that were not
    map50: float
    box_count: int
    score_threshold: float

    def to_json(self) -> dict[str, Any]:
        """Everything, ready for ``json.dumps``; NaN becomes None."""
        content: dict[str, Any] = without_nan(asdict(self))
        return content


def error_kinds(detections: Detections, image_set: ImageSet, *, score_threshold: float = 0.25) -> ErrorKinds:
    """Sort a detector's errors into kinds and measure what each costs.

    As in the paper's section 2.2 and its authors' program: localization goes before classification, that before
    duplicate; putting right turns the best scored error on a box that nobody found into a hit and drops the others.
    Other than there, at most 100 detections of a class in an image count, and what lies on a crowd region is no
    error: the metric is COCO's, so that gains add to ``DetectionMetrics.map50``.
    """
    check_fits(detections, image_set)
    truth, names = image_set.all_boxes(), image_set.class_names
    errors = _find_errors(detections, truth)
    curves = precision_recall(errors.matches, len(names))
    average = curves.average_precision()[0]  # (K,)
    fixes: dict[str, Callable[[_Errors], Matches]] = {kind: partial(_fixed, kind=kind) for kind in KINDS}
    fixes |= {"false_positives": _without_false_positives, "false_negatives": _without_false_negatives}
    known = ~np.isnan(average)
    gains = {
        kind: np.where(known, np.nan_to_num(_average_precision(fix(errors), len(names))), np.nan) - average
        for kind, fix in fixes.items()
    }
    confident = _find_errors(detections.select(detections.scores >= score_threshold), truth)
    counts = {kind: confident.count(kind, len(names)) for kind in KINDS}
    return ErrorKinds(
        counts={kind: int(counts[kind].sum()) for kind in KINDS},
        counts_per_class={name: {k: int(counts[k][label]) for k in KINDS} for label, name in enumerate(names)},
        gains={kind: mean_of_known(gains[kind]) for kind in KINDS},
        gains_per_class={
            name: {k: float(gains[k][label]) for k in KINDS} for label, name in enumerate(names) if known[label]
        },
        gain_without_false_positives=mean_of_known(gains["false_positives"]),
        gain_without_false_negatives=mean_of_known(gains["false_negatives"]),
        map50=mean_of_known(curves.precision[0]),
        box_count=int((~truth.is_crowd).sum()),
        score_threshold=score_threshold,
    )


@dataclass(frozen=True)
class _Errors:
    """The kind of each wrong detection, and the box it should have been of."""

    matches: Matches  # at IoU 0.5
    kind: Indices  # (N,) place in KINDS, -1: no error
    meant: Indices  # (N,) box that a classification or localization error is about, else -1
    truth_labels: Indices  # (M,)

    @property
    def not_found(self) -> Mask:
        """(M,) boxes that no detection matched."""
        open_boxes = ~self.matches.truth_ignored
        matched = self.matches.truth[0]
        open_boxes[matched[matched >= 0]] = False
        return open_boxes

    @property
    def missed(self) -> Mask:
        """(M,) those of them that no other error is about."""
        missed = self.not_found
        missed[self.meant[self.meant >= 0]] = False
        return missed

    @property
    def repairing(self) -> Mask:
        """(N,) the best scored error about each box that was not found."""
        rows = np.flatnonzero((self.meant >= 0) & np.append(self.not_found, False)[self.meant])
        rows = rows[np.lexsort((-self.matches.scores[rows], self.meant[rows]))]
        best = np.zeros(len(self.kind), np.bool_)
        best[rows[np.diff(self.meant[rows], prepend=-1) != 0]] = True
        return best

    def count(self, kind: str, class_count: int) -> Indices:
        """(K,) errors of a kind."""
        labels = self.matches.labels[self.kind == KINDS.index(kind)]
        return np.bincount(self.truth_labels[self.missed] if kind == "missed" else labels, minlength=class_count)


def _find_errors(detections: Detections, truth: BoxColumns) -> _Errors:
    matches = match(detections, truth, iou_thresholds=np.array([FOREGROUND_IOU]))
    wrong = np.flatnonzero(matches.wrong[0])
    candidates = detections.select(wrong)
    boxes = np.flatnonzero(~truth.is_crowd)
    meeting = meet(
        candidates, truth.select(boxes), minimum_iou=BACKGROUND_IOU, max_detections=len(wrong) + 1, within_class=False
    )
    pairs = Pairs(meeting.pairs.detection, boxes[meeting.pairs.truth], meeting.pairs.iou)
    same = truth.labels[pairs.truth] == candidates.labels[pairs.detection]
    same_iou, same_box = _best_overlap(pairs.select(same), len(wrong))
    other_iou, other_box = _best_overlap(pairs.select(~same), len(wrong))
    localization = (same_iou >= BACKGROUND_IOU) & (same_iou < FOREGROUND_IOU)
    classification = ~localization & (other_iou >= FOREGROUND_IOU)
    rest = [same_iou >= FOREGROUND_IOU, other_iou > BACKGROUND_IOU]  # of the right class and yet wrong: found before
    names = ("localization", "classification", "duplicate", "both")
    kind, meant = np.full(len(detections), -1), np.full(len(detections), -1)
    kind[wrong] = np.select(
        [localization, classification, *rest], [KINDS.index(name) for name in names], KINDS.index("background")
    )
    meant[wrong] = np.select([localization, classification], [same_box, other_box], -1)
    return _Errors(matches, kind, meant, truth.labels)


def _best_overlap(pairs: Pairs, count: int) -> tuple[Floats, Indices]:
    """(n,) largest IoU of each detection, 0 where it overlaps nothing, and (n,) the box, -1 for none."""
    order = np.lexsort((pairs.truth, -pairs.iou, pairs.detection))
    first = order[np.diff(pairs.detection[order], prepend=-1) != 0]
    iou, box = np.zeros(count), np.full(count, -1)
    iou[pairs.detection[first]], box[pairs.detection[first]] = pairs.iou[first], pairs.truth[first]
    return iou, box


def _average_precision(matches: Matches, class_count: int) -> Floats:
    """(K,) AP50, NaN for classes without ground truth."""
    average: Floats = precision_recall(matches, class_count).average_precision()[0]
    return average


def _fixed(errors: _Errors, kind: str) -> Matches:
    """The matches if all errors of this kind were put right."""
    matches = errors.matches
    if kind == "missed":
        return replace(matches, truth_ignored=matches.truth_ignored | errors.missed)
    chosen = errors.kind == KINDS.index(kind)
    repaired = chosen & errors.repairing
    truth = np.where(repaired, errors.meant, matches.truth)
    labels = np.where(repaired, np.append(errors.truth_labels, 0)[errors.meant], matches.labels)
    by_score = np.lexsort((matches.image_index, -matches.scores, labels))
    ignored = matches.ignored | (chosen & ~repaired)
    return replace(matches, truth=truth, labels=labels, by_score=by_score, ignored=ignored)


def _without_false_positives(errors: _Errors) -> Matches:
    return replace(errors.matches, ignored=errors.matches.ignored | errors.matches.wrong)


def _without_false_negatives(errors: _Errors) -> Matches:
    return replace(errors.matches, truth_ignored=errors.matches.truth_ignored | errors.not_found)
