"""Warnings of training settings that have no effect, or another one than they say."""

from __future__ import annotations

import logging
import math

from pipeline_tasks import launch
from pipeline_tasks.training_parameters import TrainingParameters

log = logging.getLogger(__name__)

_SMALLEST_SHARE_DIGITS = 1000


def warn_of_batch(given: TrainingParameters, batch_size: int) -> None:
    """Say that an epoch has only `batch_size` images, fewer than a batch was to have."""
    if batch_size < given.batch_size and launch.rank() == 0:
        log.warning(
            "batch_size %d is more than the %d images of an epoch, which are one batch instead; set it to %d or less, "
            "or add images",
            *(given.batch_size, batch_size, batch_size),
        )


def warn_of_scale(given: TrainingParameters, input_size: int) -> None:
    """Say that `multi_scale` allows no other input size (pixels)."""
    from model.data.sampling import SIZE_STEP, input_sizes

    if given.multi_scale and len(input_sizes(input_size, given.multi_scale)) == 1 and launch.rank() == 0:
        least = math.ceil(SIZE_STEP / input_size * _SMALLEST_SHARE_DIGITS) / _SMALLEST_SHARE_DIGITS
        log.warning(
            "multi_scale %g has no effect: the next size is %d pixels from image_size %d; set it to at least %g, or 0",
            *(given.multi_scale, SIZE_STEP, input_size, least),
        )


def warn_of_closed_mosaic(given: TrainingParameters, epochs: int) -> None:
    """Say that a training of so many epochs ends before it begins to join images or change their size."""
    idle = [name for name in ("mosaic", "mixup", "multi_scale") if getattr(given, name)]
    if idle and given.close_mosaic_epochs >= epochs and launch.rank() == 0:
        log.warning(
            "close_mosaic_epochs %d leaves none of %d epochs to %s, which have no effect; set it to less than %d",
            *(given.close_mosaic_epochs, epochs, ", ".join(idle), epochs),
        )
