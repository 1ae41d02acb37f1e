"""How many optimiser steps a run has: decided once, written down, never measured again."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from model.training_state import read_json, write_json

logger = logging.getLogger(__name__)

LENGTH_FILE = "length.json"


@dataclass(frozen=True)
class Cost:
    """Measured seconds of one optimiser step and of one evaluation."""

    step_seconds: float
    evaluation_seconds: float


@dataclass(frozen=True)
class Length:
    """Length of a run in optimiser steps, and what decided it ("epochs" or "budget").

    A batch is what one optimiser step learns from: with gradient accumulation, all it accumulates.
    """

    total_steps: int
    batches_per_epoch: int
    decided_by: str

    @property
    def epochs(self) -> int:
        """Epochs begun; a budget may cut the last one short."""
        return math.ceil(self.total_steps / self.batches_per_epoch)


def recorded_length(directory: Path, batches_per_epoch: int) -> Length | None:
    """The length an earlier call wrote to ``directory``, None if there was none.

    Raises:
        ValueError: when the file is damaged or the number of batches per epoch has changed since.
    """
    path = directory / LENGTH_FILE
    if not path.exists():
        return None
    length = Length(**read_json(path))
    if length.batches_per_epoch != batches_per_epoch:
        raise ValueError(
            f"{path} was written for {length.batches_per_epoch} batches per epoch, the loader now has "
            f"{batches_per_epoch}; restore data, batch_size and accumulate_steps, or delete {directory} to train anew"
        )
    return length


def record_length(directory: Path, length: Length) -> None:
    """Write the decision down."""
    write_json(directory / LENGTH_FILE, asdict(length))


def decide_length(
    epochs: int,
    batches_per_epoch: int,
    evaluate_every_epochs: int,
    budget_minutes: float | None,
    measure: Callable[[], Cost],
) -> Length:
    """``epochs`` whole epochs, or fewer steps where ``budget_minutes`` ends before them.

    ``measure`` is called only when there is a budget.
    """
    steps = epochs * batches_per_epoch
    if budget_minutes is None:
        return Length(steps, batches_per_epoch, "epochs")
    cost = measure()
    affordable = affordable_steps(60.0 * budget_minutes, cost, batches_per_epoch * evaluate_every_epochs)
    logger.info(
        "a step takes %.3f s, an evaluation %.1f s: %g minutes are %d steps, %d epochs are %d",
        *(cost.step_seconds, cost.evaluation_seconds, budget_minutes, affordable, epochs, steps),
    )
    if affordable < steps:
        return Length(affordable, batches_per_epoch, "budget")
    return Length(steps, batches_per_epoch, "epochs")


def affordable_steps(seconds: float, cost: Cost, steps_per_evaluation: int) -> int:
    """Steps that fit together with their evaluations, of which one always closes the run; at least one."""
    mean_cost = cost.step_seconds + cost.evaluation_seconds / steps_per_evaluation
    steps = min(seconds / mean_cost, (seconds - cost.evaluation_seconds) / cost.step_seconds)
    if steps < 1:
        logger.warning(
            "budget_minutes is too short for a step of %.2f s and an evaluation of %.1f s; one step is done",
            *(cost.step_seconds, cost.evaluation_seconds),
        )
    return max(1, math.floor(steps))
