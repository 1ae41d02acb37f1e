"""Scores from which on detections are worth keeping, and what the kept ones are worth as labels."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from model.data.image_set import ImageSet
from model.detections import Detections, check_fits
from model.json_values import without_nan
from model.matching import Matches, match

IOU_HALF = np.array([0.5])
LOWEST_THRESHOLD = 0.05


def class_thresholds(
    detections: Detections,
    image_set: ImageSet,
    minimum_precision: float = 0.0,
    *,
    iou_threshold: float = 0.5,
    lowest: float = LOWEST_THRESHOLD,
    without_truth: float = 1.0,
) -> dict[str, float]:
    """For each class the score from which on detections have the best F1 with at least ``minimum_precision``.

    Precision counts detections that match a box with ``iou_threshold``. No threshold is below ``lowest``. A
    class that never reaches the precision gets 1.0, which lets nothing through; one without boxes in this set
    gets ``without_truth``. Choose them on a validation split: on training images the detector is too sure.
    """
    for name, value in (("minimum_precision", minimum_precision), ("lowest", lowest)):
        if not 0 <= value <= 1:
            raise ValueError(f"{name} must be between 0 and 1, got {value}")
    check_fits(detections, image_set)
    confident = detections.select(detections.scores >= lowest)
    matches = match(confident, image_set.all_boxes(), iou_thresholds=np.array([iou_threshold]))
    totals = np.bincount(matches.truth_labels[~matches.truth_ignored], minlength=len(image_set.class_names))
    return {
        name: _best_threshold(matches, label, int(totals[label]), minimum_precision, lowest)
        if totals[label]
        else without_truth
        for label, name in enumerate(image_set.class_names)
    }


def _best_threshold(matches: Matches, label: int, total: int, minimum_precision: float, lowest: float) -> float:
    """Between the last score that is worth keeping and the next lower one."""
    rows = np.flatnonzero((matches.labels == label) & ~matches.ignored[0])
    rows = rows[np.argsort(-matches.scores[rows], kind="stable")]
    scores = matches.scores[rows].astype(np.float64)
    correct = np.cumsum(matches.correct[0, rows])
    precision = correct / np.arange(1, len(rows) + 1)
    f1 = 2 * correct / (np.arange(1, len(rows) + 1) + total)
    last_of_score = np.append(scores[1:] < scores[:-1], True)[: len(rows)]
    allowed = last_of_score & (precision >= minimum_precision) & (correct > 0)
    if not allowed.any():
        return 1.0
    best = int(np.argmax(np.where(allowed, f1, -1.0)))
    below = scores[best + 1] if best + 1 < len(scores) else lowest
    return float((scores[best] + below) / 2)


@dataclass(frozen=True)
class PseudoLabelQuality:
    """Boxes above the thresholds compared with true boxes at IoU 0.5; NaN where nothing was kept or is
    there.
    """

    precision: float
    recall: float
    kept: int
    correct: int
    truth: int
    per_class: dict[str, dict[str, float]]  # class -> precision, recall, kept, truth

    def to_json(self) -> dict[str, Any]:
        content: dict[str, Any] = without_nan(asdict(self))
        return content


def pseudo_label_quality(
    detections: Detections, image_set: ImageSet, thresholds: dict[str, float]
) -> PseudoLabelQuality:
    """What the detections above ``thresholds`` (one per class) are worth as labels of this set."""
    check_fits(detections, image_set)
    kept = detections.select(above_thresholds(detections, image_set.class_names, thresholds))
    matches = match(kept, image_set.all_boxes(), iou_thresholds=IOU_HALF, max_detections=len(kept) + 1)
    class_count = len(image_set.class_names)
    counted = np.bincount(matches.labels[~matches.ignored[0]], minlength=class_count)
    correct = np.bincount(matches.labels[matches.correct[0]], minlength=class_count)
    truth = np.bincount(matches.truth_labels[~matches.truth_ignored], minlength=class_count)
    per_class = {
        name: {
            "precision": _ratio(correct[label], counted[label]),
            "recall": _ratio(correct[label], truth[label]),
            "kept": float(counted[label]),
            "truth": float(truth[label]),
        }
        for label, name in enumerate(image_set.class_names)
    }
    return PseudoLabelQuality(
        precision=_ratio(correct.sum(), counted.sum()),
        recall=_ratio(correct.sum(), truth.sum()),
        kept=int(counted.sum()),
        correct=int(correct.sum()),
        truth=int(truth.sum()),
        per_class=per_class,
    )


def above_thresholds(
    detections: Detections, class_names: tuple[str, ...], thresholds: dict[str, float]
) -> NDArray[np.bool_]:
    """(N,) detections whose score is at least their class's threshold; ``ValueError`` for a class without
    one.
    """
    if missing := [name for name in class_names if name not in thresholds]:
        raise ValueError(f"no score threshold for the classes {missing}; thresholds exist for {sorted(thresholds)}")
    limits = np.array([thresholds[name] for name in class_names])
    above: NDArray[np.bool_] = detections.scores >= limits[detections.labels]
    return above


def _ratio(part: Any, whole: Any) -> float:
    return float(part / whole) if whole else math.nan
