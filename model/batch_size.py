"""The largest batch that fits in a GPU's memory: tried out once, written down, never tried again."""

from __future__ import annotations

import copy
import gc
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from model import processes
from model.loss import Targets
from model.training_config import TrainingConfig
from model.training_state import read_json, write_json
from model.training_step import ComputeLoss, Learner

if TYPE_CHECKING:
    from model.data.loader import Batch

logger = logging.getLogger(__name__)

BATCH_SIZE_FILE = "batch_size.json"
MEMORY_SHARE = 0.9  # of the memory that is free; batches differ in their boxes, and memory gets fragmented
STEPS_OF_A_TRIAL = 2  # the second one has the optimiser's moments beside the activations


@dataclass(frozen=True)
class Trial:
    """What is tried: optimiser steps on a copy of ``network``, with inputs of ``input_size`` pixels that have
    ``boxes`` boxes each, the most that is to be expected.
    """

    network: nn.Module
    compute_loss: ComputeLoss
    config: TrainingConfig
    input_size: int
    boxes: int


def fitting_batch_size(state_directory: Path, trial: Trial, images: int) -> int:
    """Images of a batch: on each GPU the largest power of two that fits in memory, at most ``images`` over all GPUs.

    What an earlier call wrote to the state directory is returned without a trial. On a CPU there is no such limit to
    find, and ``trial.config.batch_size`` is kept with a warning. All processes call it; the first one tries.

    Raises:
        ValueError: when not even one image fits, or the file is damaged.
    """
    given = trial.config.batch_size
    if torch.device(trial.config.device).type != "cuda":
        if processes.rank() == 0:
            logger.warning("auto_batch_size needs a GPU; on the CPU batch_size %d is kept", given)
        return given
    return processes.made_by_first(lambda: recorded_or_tried(state_directory, trial, images, fits_in_memory))


def recorded_or_tried(directory: Path, trial: Trial, images: int, fits: Callable[[Trial, int], bool]) -> int:
    """The number that ``directory`` holds; else the result of a trial, which is written there."""
    path = directory / BATCH_SIZE_FILE
    if path.exists():
        return int(read_json(path)["batch_size"])
    devices = processes.count()
    with processes.alone():
        size = largest_power_of_two(lambda size: fits(trial, size), max(1, images // devices))
    if size == 0:
        raise ValueError(
            f"not even one image of {trial.input_size} pixels with {trial.boxes} boxes fits in the memory of "
            f"{trial.config.device}; choose a smaller image_size, multi_scale or variant"
        )
    logger.info("auto_batch_size: %d images fit on a device, a batch has %d", size, size * devices)
    directory.mkdir(parents=True, exist_ok=True)
    write_json(path, {"batch_size": size * devices})
    return size * devices


def largest_power_of_two(fits: Callable[[int], bool], most: int) -> int:
    """The largest power of two up to ``most`` that fits, tried from 1 upwards; 0 when 1 does not."""
    size = 0
    while (larger := max(1, 2 * size)) <= most and fits(larger):
        size = larger
    return size


def fits_in_memory(trial: Trial, size: int) -> bool:
    """Whether optimiser steps on batches of ``size`` images leave a tenth of the GPU's free memory unused."""
    device = torch.device(trial.config.device)
    torch.cuda.reset_peak_memory_stats(device)
    available = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    fits = _survives(trial, size) and torch.cuda.max_memory_reserved(device) <= MEMORY_SHARE * available
    gc.collect()  # the failed attempt's tensors are in cycles with its exception
    torch.cuda.empty_cache()
    return fits


def _survives(trial: Trial, size: int) -> bool:
    try:
        take_steps(trial, size)
    except torch.OutOfMemoryError:
        return False
    except RuntimeError as error:
        if "ALLOC_FAILED" in str(error):  # how cuDNN and cuBLAS say it
            return False
        raise
    return True


def take_steps(trial: Trial, size: int) -> None:
    """Optimiser steps on a copy of the network and made-up batches of ``size`` images."""
    config = trial.config
    learner = Learner(
        copy.deepcopy(trial.network),
        trial.compute_loss,
        weight_decay=config.weight_decay,
        ema_decay=config.ema_decay,
        gradient_clip_norm=config.gradient_clip_norm,
        precision=config.precision,
        device=torch.device(config.device),
    )
    learner.train_mode()
    batches = [made_up_batch(trial, size)] * min(2, config.accumulate_steps)  # more need no more memory than two
    for update in range(1, STEPS_OF_A_TRIAL + 1):
        learner.step(batches, config.warmup_initial_learning_rate, update)


def made_up_batch(trial: Trial, size: int) -> Batch:
    """Grey noise with boxes of every size, all of class 0."""
    from model.data.loader import Batch

    random = np.random.default_rng(0)
    images = random.integers(0, 256, (size, 3, trial.input_size, trial.input_size), np.uint8)
    corners = np.sort(random.uniform(0, trial.input_size, (size, max(1, trial.boxes), 2, 2)), axis=2)
    targets = Targets(
        boxes_xyxy=torch.from_numpy(corners.reshape(size, -1, 4).astype(np.float32)),
        labels=torch.zeros(corners.shape[:2], dtype=torch.int64),
        weights=torch.ones(corners.shape[:2]),
        mask=torch.full(corners.shape[:2], trial.boxes > 0),
    )
    return Batch(torch.from_numpy(images), targets, np.zeros(size, np.int64))
