"""Settings and result of a training."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from model.blocks import BATCH_NORM_MOMENTUM


@dataclass(frozen=True)
class TrainingConfig:
    """Settings of one training.

    Attributes:
        epochs: passes over the training set; an upper bound where ``budget_minutes`` is set.
        batch_size: images per forward pass, shared by all processes: as many as a batch of the loader really has.
        learning_rate: peak rate of AdamW.
        final_learning_rate_ratio: rate at the end, as a share of the peak.
        weight_decay: decay of kernels (see ``optimizer.build_optimizer``).
        warmup_steps: optimiser steps of linear warm-up; shortened for runs that are too short for it.
        warmup_initial_learning_rate: rate of the very first step.
        ema_decay: long-run decay of the averaged weights, in [0, 1); 0 evaluates the weights themselves.
        norm_momentum: share of a batch's mean and variance in the statistics of the batch norms, in (0, 1].
        gradient_clip_norm: largest gradient norm, 0 for no limit.
        accumulate_steps: batches that one optimiser step learns from as if they were one (but for batch norm, which
            sees each on its own).
        freeze: patterns of layers that stay as they are (see ``freezing.frozen_layers``).
        layer_decay: factor on the rate for each stage away from the heads, in (0, 1] (see
            ``optimizer.rate_factors``).
        fresh_parameters: names of parameters that start from random values and so keep the full rate.
        close_mosaic_epochs: last epochs, which are trained without mosaic.
        evaluate_every_epochs: epochs between evaluations; the last epoch is always evaluated.
        early_stop_epochs: evaluations in a row without a better ``best_metric`` that end the training, 0 for never.
            Counted from the first that is not 0, and after ``early_stop_from``. The schedule falls over ``epochs`` all
            the same: a run that stops early never sees its low rates.
        early_stop_from: share of the training, in [0, 1), whose evaluations try no patience: what it learns from
            changes after that.
        checkpoint_every_steps: steps between saves inside an epoch, 0 to save at the end of epochs only.
        best_metric: name of the evaluated number, higher is better, by which the best weights are chosen.
        seed: seed of torch's random generator.
        device: "cpu", "cuda" or "cuda:<index>".
        precision: "float32", "bfloat16" (mixed) or "auto", which is bfloat16 where the device has instructions for it
            (on a CPU 20 to 45 % less time); a training that goes on elsewhere goes on in what is best there.
        budget_minutes: time for steps and evaluations; turned into steps once, after a measurement.
    """

    epochs: int
    batch_size: int
    learning_rate: float
    final_learning_rate_ratio: float = 0.1
    weight_decay: float = 1e-5
    warmup_steps: int = 1000
    warmup_initial_learning_rate: float = 1e-6
    ema_decay: float = 0.9997
    norm_momentum: float = BATCH_NORM_MOMENTUM
    gradient_clip_norm: float = 0.0
    accumulate_steps: int = 1
    freeze: tuple[str, ...] = ()
    layer_decay: float = 1.0
    fresh_parameters: tuple[str, ...] = ()
    close_mosaic_epochs: int = 0
    evaluate_every_epochs: int = 1
    early_stop_epochs: int = 0
    early_stop_from: float = 0.0
    checkpoint_every_steps: int = 0
    best_metric: str = "map50_95"
    seed: int = 0
    device: str = "cpu"
    precision: str = "float32"
    budget_minutes: float | None = None

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "evaluate_every_epochs", "accumulate_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in (
            *("warmup_steps", "gradient_clip_norm", "close_mosaic_epochs", "checkpoint_every_steps"),
            "early_stop_epochs",
        ):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if not 0 < self.norm_momentum <= 1:
            raise ValueError(f"norm_momentum must lie in (0, 1], got {self.norm_momentum}")
        if not 0 < self.layer_decay <= 1:
            raise ValueError(f"layer_decay must lie in (0, 1], got {self.layer_decay}")
        if not 0 <= self.early_stop_from < 1:
            raise ValueError(f"early_stop_from must lie in [0, 1), got {self.early_stop_from}")
        if self.budget_minutes is not None and self.budget_minutes <= 0:
            raise ValueError(f"budget_minutes must be positive, got {self.budget_minutes}")

    def settings(self) -> dict[str, object]:
        """What a resumed run must agree with."""
        free = ("checkpoint_every_steps", "device", "budget_minutes", "early_stop_from")
        return {name: value for name, value in asdict(self).items() if name not in free}


@dataclass(frozen=True)
class TrainingResult:
    """What a finished training gives.

    Attributes:
        best_model_state: state dict of the averaged network at the best evaluation (without evaluation: at
            the end), on CPU.
        best_metric: value of that evaluation, None without evaluation.
        best_epoch: epoch it closed, counted from 1.
        history: one row per epoch, as in metrics.jsonl.
        total_steps: optimiser steps done.
        images_per_step: images an optimiser step learned from, over all processes.
        precision: arithmetic of its last steps, "float32" or "bfloat16".
        stopped_early: whether it ended before its time because the metric got no better.
    """

    best_model_state: dict[str, Tensor]
    best_metric: float | None
    best_epoch: int
    history: list[dict[str, Any]]
    total_steps: int
    images_per_step: int
    precision: str
    stopped_early: bool
