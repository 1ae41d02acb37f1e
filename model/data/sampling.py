"""Which images an epoch shows, in which order and at which size: each a function of seed, epoch and position."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from model.data.image_set import ImageSet

SHUFFLE_STREAM, SIZE_STREAM = 2, 3  # first word of each seed, so that no two generators share one
SIZE_STEP = 32  # pixels; the network's largest stride


@dataclass(frozen=True)
class EpochImages:
    """The images of one epoch.

    ``listed`` holds their positions in the set, (M,), ascending; an image that comes more than once stands there more
    than once. ``order`` is the permutation of 0 … M - 1 in which the list is walked.
    """

    listed: NDArray[np.int64]
    order: NDArray[np.int64]


def repeat_factors(image_set: ImageSet, rare_share: float) -> NDArray[np.float64]:
    """How often each image is to come in an epoch on average, (images,), at least 1.

    A class in a share f of the images has the factor max(1, sqrt(rare_share / f)), an image the largest factor of its
    classes (LVIS, arXiv 1908.03195). Crowd regions do not count.
    """
    if not 0 < rare_share <= 1:
        raise ValueError(f"class_balance must be in (0, 1], got {rare_share}")
    boxes = image_set.all_boxes()
    targets = ~boxes.is_crowd
    pairs = np.unique(np.stack([boxes.image_index[targets], boxes.labels[targets]]), axis=1)  # (2, pairs)
    images_with_class = np.bincount(pairs[1], minlength=len(image_set.class_names))
    share = np.maximum(images_with_class, 1) / max(1, len(image_set))
    class_factors = np.maximum(1.0, np.sqrt(rare_share / share))
    factors = np.ones(len(image_set))
    np.maximum.at(factors, pairs[0], class_factors[pairs[1]])
    return factors


def images_per_epoch(factors: NDArray[np.float64]) -> int:
    """Length of every epoch with these factors; rounded up, so that no image is left out."""
    return math.ceil(round(float(factors.sum()), 6))


def epoch_images(factors: NDArray[np.float64], seed: int, epoch: int) -> EpochImages:
    """The images of ``epoch``: factors of 1 (images,) give every image once.

    Systematic sampling: an image of factor r comes floor(r) or ceil(r) times, and every epoch has the same length.
    """
    random = np.random.default_rng([SHUFFLE_STREAM, seed, epoch])
    count = images_per_epoch(factors)
    if count == len(factors):
        return EpochImages(np.arange(count), random.permutation(count))
    ends = np.cumsum(factors * (count / factors.sum()))
    ends[-1] = count  # whatever the sum was rounded to
    listed = np.searchsorted(ends, random.random() + np.arange(count), side="right")
    return EpochImages(listed.astype(np.int64), random.permutation(count))


def input_sizes(input_size: int, spread: float) -> tuple[int, ...]:
    """The multiples of 32 within ``input_size`` * (1 ± ``spread``), ascending."""
    if not 0 <= spread <= 0.5:
        raise ValueError(f"multi_scale must be from 0 to 0.5, got {spread}")
    steps = int(input_size * spread // SIZE_STEP)
    return tuple(range(input_size - steps * SIZE_STEP, input_size + steps * SIZE_STEP + 1, SIZE_STEP))


def batch_input_size(sizes: tuple[int, ...], seed: int, epoch: int, batch: int) -> int:
    """The size of one batch. Of every ``len(sizes)`` batches in a row each has another, in random order: epochs then
    cost the same, and a few steps tell what a step costs."""
    block, place = divmod(batch, len(sizes))
    return int(np.random.default_rng([SIZE_STREAM, seed, epoch, block]).permutation(sizes)[place])
