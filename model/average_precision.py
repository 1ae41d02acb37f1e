"""COCO's precision-recall curves, average precision and average recall, from matches.

Equal to pycocotools to the last digit (the tests compare): the same float64 numbers are added in the same order.

Legend: N detections, T IoU thresholds, K classes, R = 101 recall points, C correct detections of all thresholds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from model.matching import Floats, Indices, Matches

RECALL_POINTS = np.linspace(0.0, 1.0, 101)


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


def mean_of_known(values: Floats) -> float:
    """Mean over classes with ground truth, in pycocotools' order of addition; NaN where there is none."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else math.nan


def precision_recall(
    matches: Matches, class_count: int, image_counts: NDArray[np.int64] | None = None
) -> PrecisionRecall:
    """COCO's precision-recall curves of each class and threshold.

    ``image_counts`` says how often each image counts (a bootstrap sample); default: once.
    """
    correct = _correct_detections(matches, class_count, image_counts)
    totals = _truth_totals(matches, class_count, image_counts)
    needed = np.stack([_correct_needed(int(total)) for total in totals]).reshape(class_count, len(RECALL_POINTS))
    place = correct.place_of(needed)  # (T, K, R)
    reached = place < correct.ends[:, :, None]
    place = np.where(reached, place, len(correct.precision))
    precision = np.append(correct.best_precision_from_here(), 0.0)[place]
    score = np.append(correct.score, np.float32(0.0))[place].astype(np.float64)
    score[:, :, 0] = _highest_scores(matches, class_count)  # recall 0 is reached by any detection
    known = np.where(totals > 0, 1.0, np.nan)
    return PrecisionRecall(
        (precision * known[:, None]).transpose(0, 2, 1),
        (score * known[:, None]).transpose(0, 2, 1),
        _ratio(correct.counts, totals),
    )


def recall_at(matches: Matches, class_count: int, max_detections: int) -> Floats:
    """(T, K) largest recall of the best ``max_detections`` of each class in each image; NaN without ground truth."""
    rows, places = np.nonzero(matches.correct & (matches.ranks < max_detections))
    curves = rows * class_count + matches.labels[places]
    counts = np.bincount(curves, minlength=len(matches.iou_thresholds) * class_count)
    return _ratio(counts.reshape(-1, class_count), _truth_totals(matches, class_count, None))


@dataclass(frozen=True)
class _CorrectDetections:
    """The correct detections, threshold after threshold, class after class, best score first.

    Precision rises only at these, so curves need no other point.
    """

    begins: Indices  # (T, K) first row of each curve
    ends: Indices  # (T, K) row after its last one
    running: Indices  # (C + 1,) how many correct ones came before, over all curves, counted as often as their image
    precision: Floats  # (C,) up to and including this one
    score: NDArray[np.float32]  # (C,)
    every_image_once: bool

    @property
    def counts(self) -> Indices:
        """(T, K) correct detections of each curve."""
        return self.running[self.ends] - self.running[self.begins]

    def place_of(self, needed: Indices) -> Indices:
        """(T, K, R) the first row at which ``needed`` (K, R) detections of the curve are correct."""
        begins, wanted = self.begins[:, :, None], np.maximum(needed, 1)
        if self.every_image_once:
            return begins + wanted - 1
        return np.searchsorted(self.running[1:], self.running[begins] + wanted, side="left")

    def best_precision_from_here(self) -> Floats:
        """(C,) the largest precision at this or any later row of the same curve.

        By doubling: after k rounds each row knows the best of the next 2^k.
        """
        best, rows = self.precision.copy(), np.arange(len(self.precision))
        room = np.repeat(self.ends.ravel(), (self.ends - self.begins).ravel()) - rows
        step, longest = 1, int(room.max(initial=0))
        while step < longest:
            np.maximum(best[:-step], best[step:], out=best[:-step], where=room[:-step] > step)
            step *= 2
        return best


def _correct_detections(
    matches: Matches, class_count: int, image_counts: NDArray[np.int64] | None
) -> _CorrectDetections:
    order = matches.by_score
    labels = matches.labels[order]
    row, place = np.nonzero(matches.correct[:, order])
    curve = row * class_count + labels[place]
    shape = (len(matches.iou_thresholds), class_count)
    ends = np.searchsorted(curve, np.arange(shape[0] * shape[1]), side="right")
    begins = np.append(0, ends)[:-1]
    counts = np.ones(len(order), np.int64) if image_counts is None else image_counts[matches.image_index[order]]
    running = np.append(0, np.cumsum(counts[place]))
    wrong = matches.wrong[:, order]
    wrong_so_far = (
        np.cumsum(wrong, axis=1, dtype=np.int32) if image_counts is None else np.cumsum(wrong * counts, axis=1)
    )
    class_start = np.searchsorted(labels, labels[place], side="left")
    wrong_before_class = np.where(class_start > 0, wrong_so_far[row, class_start - 1], 0)
    true_positives = running[1:] - running[begins[curve]]
    false_positives = wrong_so_far[row, place] - wrong_before_class
    return _CorrectDetections(
        begins.reshape(shape),
        ends.reshape(shape),
        running,
        true_positives / (false_positives + true_positives + np.spacing(1)),
        matches.scores[order][place],
        image_counts is None,
    )


def _correct_needed(total: int) -> Indices:
    """(R,) how many of ``total`` boxes must be found for each recall point, by comparing as COCO does."""
    return np.searchsorted(np.arange(total + 1) / max(1, total), RECALL_POINTS, side="left")


def _truth_totals(matches: Matches, class_count: int, image_counts: NDArray[np.int64] | None) -> Indices:
    """(K,) ground-truth boxes that count."""
    counts = 1 if image_counts is None else image_counts[matches.truth_image_index]
    totals = np.bincount(matches.truth_labels, ~matches.truth_ignored * counts, class_count)
    return totals.astype(np.int64)


def _highest_scores(matches: Matches, class_count: int) -> Floats:
    """(K,) best score of each class, 0 where nothing was detected."""
    order = matches.by_score
    first = np.searchsorted(matches.labels[order], np.arange(class_count + 1))
    best = np.append(matches.scores[order], np.float32(0.0))[first[:-1]]
    return np.where(first[1:] > first[:-1], best, 0.0).astype(np.float64)


def _ratio(counts: Indices, totals: Indices) -> Floats:
    """Counts as parts of totals, NaN where the total is 0."""
    ratio: Floats = np.divide(counts, totals, out=np.full(counts.shape, np.nan), where=totals > 0)
    return ratio
