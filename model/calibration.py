"""Whether a score says how often a detection is right.

Legend: N detections, K classes, J score bins.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from model.data.image_set import ImageSet
from model.detections import Detections, check_fits
from model.json_values import without_nan
from model.matching import Floats, match, row_iou
from model.score_thresholds import IOU_HALF

BINS = 20
"""Bins of equal width from score 0 to 1, as many as Küppers et al. take."""


@dataclass(frozen=True)
class Reliability:
    """Detections by score in J bins of equal width from 0 to 1; NaN for an empty bin.

    ``d_ece`` is the detection expected calibration error (arXiv:2004.13546): the mean distance between score and
    precision, bins weighted by their detections.  ``la_ece`` is the localization-aware one (arXiv:2307.00934), where
    a right detection counts as much as its IoU.  Both regard bins from the score threshold on alone, and are NaN
    where nothing was detected there.
    """

    detections: tuple[int, ...]
    score: tuple[float, ...]  # mean
    precision: tuple[float, ...]  # part that matches a box with IoU 0.5
    localized_precision: tuple[float, ...]  # the same, each match counted with its IoU
    d_ece: float
    la_ece: float


@dataclass(frozen=True)
class Calibration:
    """Reliability of a detector's scores on one image set.

    ``d_ece`` is of all detections together; ``la_ece`` is the mean over the classes with detections from the threshold
    on, as its paper defines it.
    """

    overall: Reliability
    per_class: dict[str, Reliability]  # only classes with detections
    d_ece: float
    la_ece: float
    score_threshold: float

    def scalars(self) -> dict[str, float]:
        """The numbers to log; those the set cannot show are left out."""
        values = {"d_ece": self.d_ece, "la_ece": self.la_ece}
        return {name: value for name, value in values.items() if not math.isnan(value)}

    def to_json(self) -> dict[str, Any]:
        """Everything, ready for ``json.dumps``; NaN becomes None."""
        content: dict[str, Any] = without_nan(asdict(self))
        return content


def calibration(
    detections: Detections, image_set: ImageSet, *, score_threshold: float = 0.25, bins: int = BINS
) -> Calibration:
    """Compare scores with what became of the detections, matched greedily at IoU 0.5; those on crowds do not count.

    The bins hold every detection given; the errors regard those a user of ``score_threshold`` sees, for the many below
    hide everything else.  The threshold is moved down to the edge of its bin.
    """
    if bins < 1 or not 0 <= score_threshold < 1:
        raise ValueError(f"bins must be at least 1 and score_threshold from 0 to 1, got {bins} and {score_threshold}")
    check_fits(detections, image_set)
    sums = _sums(detections, image_set, bins)
    first = math.floor(score_threshold * bins + 1e-9)
    present = np.flatnonzero(sums[0].any(axis=1))
    per_class = {image_set.class_names[label]: _reliability(sums[:, label], first) for label in present}
    overall = _reliability(sums.sum(axis=1), first)
    known = [entry.la_ece for entry in per_class.values() if not math.isnan(entry.la_ece)]
    la_ece = float(np.mean(known)) if known else math.nan
    return Calibration(overall, per_class, overall.d_ece, la_ece, first / bins)


def _sums(detections: Detections, image_set: ImageSet, bins: int) -> Floats:
    """(4, K, J) number of detections, and sums of their scores, matches and IoUs of the matches."""
    truth, class_count = image_set.all_boxes(), len(image_set.class_names)
    matches = match(detections, truth, iou_thresholds=IOU_HALF, max_detections=len(detections) + 1)
    counted = np.flatnonzero(~matches.ignored[0])
    scores, correct = detections.scores[counted], matches.correct[0, counted]
    iou = np.zeros(len(counted))
    right, box = counted[correct], matches.truth[0, counted[correct]]
    iou[correct] = row_iou(detections.boxes_xywh[right], truth.boxes_xywh[box], truth.is_crowd[box])
    place = np.minimum((scores * np.float32(bins)).astype(np.int64), bins - 1)  # float32: 0.9 is of the bin from 0.9
    cell = detections.labels[counted] * bins + place
    columns = (np.ones(len(counted)), scores, correct, iou)
    sums = [np.bincount(cell, column, class_count * bins).astype(np.float64) for column in columns]
    return np.stack(sums).reshape(4, class_count, bins)


def _reliability(sums: Floats, first: int) -> Reliability:
    """From sums (4, J); the errors regard bins from ``first`` on."""
    count = sums[0]
    score, precision, localized = np.divide(sums[1:], count, out=np.full(sums[1:].shape, np.nan), where=count > 0)
    return Reliability(
        detections=tuple(int(value) for value in count),
        score=tuple(score.tolist()),
        precision=tuple(precision.tolist()),
        localized_precision=tuple(localized.tolist()),
        d_ece=_distance(score[first:], precision[first:], count[first:]),
        la_ece=_distance(score[first:], localized[first:], count[first:]),
    )


def _distance(score: Floats, frequency: Floats, count: Floats) -> float:
    """Mean distance over the detections of all bins."""
    there = count > 0
    if not there.any():
        return math.nan
    return float(np.average(np.abs(score - frequency)[there], weights=count[there]))
