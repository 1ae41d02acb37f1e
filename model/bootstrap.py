"""How sure a difference between two detectors is: the paired bootstrap over images.

Efron & Tibshirani 1993, chapter 16. Images are drawn with replacement, as many as there are, and both detectors are
measured on the same draw, so what makes a draw easy or hard cancels out. Detections are matched with the ground truth
once: a draw only changes how often an image counts.

Legend: R resamples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from model.average_precision import mean_of_known, precision_recall
from model.data.image_set import ImageSet
from model.detections import Detections, check_fits
from model.matching import Matches, match

RESAMPLES = 500


@dataclass(frozen=True)
class PairedDifference:
    """mAP50-95 of two detectors on the same images, and the first minus the second in every resample (R,)."""

    first: float
    second: float
    resampled: NDArray[np.float64]

    @property
    def share_below_zero(self) -> float:
        """Share of the resamples in which the first is worse."""
        return float((self.resampled < 0).mean())

    def interval(self, confidence: float = 0.95) -> tuple[float, float]:
        """The percentile interval of the difference."""
        tail = 50 * (1 - confidence)
        low, high = np.percentile(self.resampled, [tail, 100 - tail])
        return float(low), float(high)


def paired_difference(
    first: Detections,
    second: Detections,
    image_set: ImageSet,
    class_names: Sequence[str],
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> PairedDifference:
    """Mean AP50-95 over the named classes, measured and resampled.

    A class without boxes, in the set or in a draw, does not count in it; 0 where no class is left. Raises
    ``ValueError`` for a class the set does not know, or a set without images.
    """
    if not len(image_set):
        raise ValueError("there are no images to compare two detectors on")
    if unknown := [name for name in class_names if name not in image_set.class_names]:
        raise ValueError(f"the set has no class {unknown[0]!r}; it has {', '.join(image_set.class_names)}")
    matches = [_matches(found, image_set) for found in (first, second)]
    labels = np.array([image_set.class_names.index(name) for name in class_names], np.int64)
    random, count = np.random.default_rng(seed), len(image_set)
    differences = np.empty(resamples)
    for sample in range(resamples):
        drawn = np.bincount(random.integers(0, count, count), minlength=count)
        ours, theirs = (_mean_ap(one, labels, image_set, drawn) for one in matches)
        differences[sample] = ours - theirs
    measured = [_mean_ap(one, labels, image_set, None) for one in matches]
    return PairedDifference(measured[0], measured[1], differences)


def _matches(found: Detections, image_set: ImageSet) -> Matches:
    check_fits(found, image_set)
    return match(found, image_set.all_boxes())


def _mean_ap(
    matches: Matches, labels: NDArray[np.int64], image_set: ImageSet, image_counts: NDArray[np.int64] | None
) -> float:
    curves = precision_recall(matches, len(image_set.class_names), image_counts)
    mean = mean_of_known(curves.precision[:, :, labels])
    return 0.0 if np.isnan(mean) else mean
