"""The training loop: every step of the pipeline that changes weights runs through ``train``.

A run is a number of optimiser steps, decided once. It may be ended at any moment, even by a power cut, and
the next call with the same state directory goes on from the last saved step; on one CPU configuration the
resumed run equals the unbroken one bit for bit.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import logging
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.utils.deterministic
from torch import Tensor, nn

from model import processes
from model.progress import EpochProgress
from model.schedule import WarmupCosine, fitting_warmup_steps
from model.training_length import Cost, Length, decide_length, record_length, recorded_length
from model.training_state import Position, StateDirectory
from model.training_step import ComputeLoss, Learner

if TYPE_CHECKING:
    from model.data.loader import Batch

logger = logging.getLogger(__name__)

# averaged network in eval mode -> metrics of the validation images, by name
Evaluate = Callable[[nn.Module], dict[str, float]]

SHOWN_METRICS = ("step", "learning_rate", "map50_95", "map50")  # of an epoch's line; metrics.jsonl has all
UNMEASURED_STEPS = 2  # the first steps allocate memory and choose kernels
MEASURED_STEPS = 8


class Stopped(Exception):
    """Training was told to stop; its state is saved and the same call goes on from there."""


class BatchSource(Protocol):
    """What ``train`` asks of a loader: the same batches for the same epoch, from any batch on."""

    @property
    def batches_per_epoch(self) -> int:
        """Batches in every epoch."""

    def epoch(self, epoch: int, start_batch: int = 0, mosaic_enabled: bool = True) -> Iterator[Batch]:
        """Batches ``start_batch``, ``start_batch + 1``, ... of ``epoch`` (both counted from 0)."""


@dataclass(frozen=True)
class TrainingConfig:
    """Settings of one training.

    Attributes:
        epochs: passes over the training set; an upper bound where ``budget_minutes`` is set.
        batch_size: images per optimiser step in one process.
        learning_rate: peak rate of AdamW.
        final_learning_rate_ratio: rate at the end, as a share of the peak.
        weight_decay: decay of kernels (see ``optimizer.build_optimizer``).
        warmup_steps: optimiser steps of linear warm-up; shortened for runs that are too short for it.
        warmup_initial_learning_rate: rate of the very first step.
        ema_decay: long-run decay of the averaged weights, in [0, 1); 0 evaluates the weights themselves.
        gradient_clip_norm: largest gradient norm, 0 for no limit.
        close_mosaic_epochs: last epochs, which are trained without mosaic.
        evaluate_every_epochs: epochs between evaluations; the last epoch is always evaluated.
        checkpoint_every_steps: steps between saves inside an epoch, 0 to save at the end of epochs only.
        best_metric: name of the evaluated number, higher is better, by which the best weights are chosen.
        seed: seed of torch's random generator.
        device: "cpu", "cuda" or "cuda:<index>".
        precision: "float32" or "bfloat16" (mixed); on a CPU with bfloat16 instructions the latter takes 10 to
            45 % less time.
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
    gradient_clip_norm: float = 0.0
    close_mosaic_epochs: int = 0
    evaluate_every_epochs: int = 1
    checkpoint_every_steps: int = 0
    best_metric: str = "map50_95"
    seed: int = 0
    device: str = "cpu"
    precision: str = "float32"
    budget_minutes: float | None = None

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "evaluate_every_epochs"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("warmup_steps", "gradient_clip_norm", "close_mosaic_epochs", "checkpoint_every_steps"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.budget_minutes is not None and self.budget_minutes <= 0:
            raise ValueError(f"budget_minutes must be positive, got {self.budget_minutes}")

    def settings(self) -> dict[str, object]:
        """What a resumed run must agree with."""
        free = ("checkpoint_every_steps", "device", "budget_minutes")
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
    """

    best_model_state: dict[str, Tensor]
    best_metric: float | None
    best_epoch: int
    history: list[dict[str, Any]]
    total_steps: int


def train(
    model: nn.Module,
    loader: BatchSource,
    compute_loss: ComputeLoss,
    config: TrainingConfig,
    state_directory: Path,
    *,
    evaluate: Evaluate | None = None,
    on_epoch_end: Callable[[dict[str, Any]], None] = lambda row: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> TrainingResult:
    """Train ``model`` in place, from the last saved step of ``state_directory`` or from the beginning.

    Under torchrun every process calls this with its own share of the batches; the first one evaluates and
    writes, and its random states are the ones saved.

    Args:
        model: network to train; its weights are the start of a new run.
        loader: source of batches.
        compute_loss: loss of one batch; it calls the network it is handed, which may wrap ``model``.
        config: settings.
        state_directory: folder for checkpoint and metrics; a finished run found there is returned at once.
        evaluate: metrics of the averaged network (eval mode), which choose the best weights.
        on_epoch_end: told of every finished epoch after it is saved: its row and ``images_per_second``.
        should_stop: asked after every optimiser step.

    Raises:
        Stopped: when ``should_stop`` said so, after saving.
        ValueError: for settings that cannot work, a damaged or foreign state directory, or a loss that is not
            finite.
    """
    run = _Run(model, loader, compute_loss, config, state_directory, evaluate, on_epoch_end, should_stop)
    with _repeatable(run.device):
        run.begin()
        while run.position.epoch < run.length.epochs:
            run.train_epoch()
        return run.result()


class _Run:
    """One call of ``train``: the loop with everything it needs at hand."""

    def __init__(
        self,
        model: nn.Module,
        loader: BatchSource,
        compute_loss: ComputeLoss,
        config: TrainingConfig,
        state_directory: Path,
        evaluate: Evaluate | None,
        on_epoch_end: Callable[[dict[str, Any]], None],
        should_stop: Callable[[], bool],
    ) -> None:
        self.loader, self.compute_loss, self.config = loader, compute_loss, config
        self.evaluate, self.on_epoch_end, self.should_stop = evaluate, on_epoch_end, should_stop
        self.device = torch.device(config.device)
        self.state = StateDirectory(state_directory)
        self.learner = self._learner(model)
        self.is_first = processes.rank() == 0

    def begin(self) -> None:
        """Decide the length and go to the last saved step."""
        self.length = processes.from_first(self._length())
        self.schedule = self._schedule()
        torch.manual_seed(self.config.seed + processes.rank())
        self.position = self.state.load(self.learner.parts, self._settings()) or Position()
        if self.position.step > 0:
            logger.info("training goes on from step %d of %d", self.position.step, self.length.total_steps)
        if self.position.step > 0 and not self.is_first:
            torch.manual_seed(self.config.seed + processes.rank() + self.position.step * processes.count())
        processes.wait_for_all()

    def train_epoch(self) -> None:
        """Train what is left of the running epoch, evaluate, save and tell."""
        self.learner.network.train()
        with self._progress() as progress, contextlib.closing(self._remaining_batches()) as batches:
            for batch in batches:
                step = self.position.step
                share = step / self.length.total_steps
                losses = self.learner.step(batch, self.schedule.at(step), update=step + 1, progress=share)
                self.position.advance(losses)
                progress.step(losses)
                self._save_or_stop()
        row = self._close_epoch()
        if self.is_first:
            self._tell(row, progress.images_per_second)

    def result(self) -> TrainingResult:
        """The result of the finished run, read back from its files."""
        processes.wait_for_all()
        best = processes.from_first(self.position.best)
        average = self.learner.average.network.state_dict()
        return TrainingResult(
            best_model_state=self.state.load_best(best)
            if best
            else {name: tensor.detach().cpu().clone() for name, tensor in average.items()},
            best_metric=best.metric if best else None,
            best_epoch=best.epoch if best else self.position.epoch,
            history=self.state.history(),
            total_steps=self.position.step,
        )

    def _learner(self, model: nn.Module) -> Learner:
        return Learner(
            model,
            self.compute_loss,
            weight_decay=self.config.weight_decay,
            ema_decay=self.config.ema_decay,
            gradient_clip_norm=self.config.gradient_clip_norm,
            precision=self.config.precision,
            device=self.device,
        )

    def _length(self) -> Length:
        recorded = recorded_length(self.state.path, self.loader.batches_per_epoch)
        if recorded is not None:
            return recorded
        length = decide_length(
            self.config.epochs,
            self.loader.batches_per_epoch,
            self.config.evaluate_every_epochs,
            self.config.budget_minutes,
            self._measure,
        )
        if self.is_first:
            record_length(self.state.path, length)
        return length

    def _measure(self) -> Cost:
        """Time steps and one evaluation on a copy that is thrown away."""
        learner = self._learner(copy.deepcopy(self.learner.network))
        learner.network.train()
        batches = itertools.chain.from_iterable(self.loader.epoch(epoch) for epoch in itertools.count())
        times = [time.perf_counter()]
        for update, batch in enumerate(itertools.islice(batches, UNMEASURED_STEPS + MEASURED_STEPS), start=1):
            learner.step(batch, self.config.warmup_initial_learning_rate, update)
            times.append(time.perf_counter())
        if self.evaluate is not None and self.is_first:
            self.evaluate(learner.average.network)
        evaluation_seconds = time.perf_counter() - times[-1]
        return Cost((times[-1] - times[UNMEASURED_STEPS]) / MEASURED_STEPS, evaluation_seconds)

    def _schedule(self) -> WarmupCosine:
        total, wanted = self.length.total_steps, self.config.warmup_steps
        warmup_steps = fitting_warmup_steps(wanted, total)
        if warmup_steps != wanted and self.is_first:
            logger.info("warmup_steps %d is too long for %d steps; %d are used", wanted, total, warmup_steps)
        return WarmupCosine(
            learning_rate=self.config.learning_rate,
            total_steps=total,
            warmup_steps=warmup_steps,
            initial_learning_rate=self.config.warmup_initial_learning_rate,
            final_ratio=self.config.final_learning_rate_ratio,
        )

    def _settings(self) -> dict[str, object]:
        return {**self.config.settings(), **asdict(self.length), "processes": processes.count()}

    @property
    def _batches_in_epoch(self) -> int:
        begun = self.position.epoch * self.length.batches_per_epoch
        return min(self.length.batches_per_epoch, self.length.total_steps - begun)

    def _remaining_batches(self) -> Generator[Batch]:
        epoch, left = self.position.epoch, self._batches_in_epoch - self.position.batch
        mosaic_enabled = epoch < self.length.epochs - self.config.close_mosaic_epochs
        if left > 0:
            yield from itertools.islice(self.loader.epoch(epoch, self.position.batch, mosaic_enabled), left)

    def _progress(self) -> EpochProgress:
        batches = self._batches_in_epoch
        return EpochProgress(
            f"epoch {self.position.epoch + 1}/{self.length.epochs}",
            done=self.position.batch,
            batches=batches,
            steps_after=self.length.total_steps - self.position.step + self.position.batch - batches,
            batch_size=self.config.batch_size * processes.count(),
            quiet=not self.is_first,
        )

    def _save_or_stop(self) -> None:
        every, position = self.config.checkpoint_every_steps, self.position
        due = every > 0 and position.step % every == 0 and position.batch < self._batches_in_epoch
        stop = processes.any_says(self.should_stop(), self.device)
        if stop or due:
            self._save()
        if stop:
            raise Stopped(f"stopped and saved after step {self.position.step} of {self.length.total_steps}")

    def _save(self) -> None:
        if self.is_first:
            self.state.save(self.learner.parts, self.position, self._settings())
        processes.wait_for_all()

    def _close_epoch(self) -> dict[str, Any]:
        row: dict[str, Any] = {
            "epoch": self.position.epoch + 1,
            "step": self.position.step,
            "learning_rate": self.schedule.at(self.position.step - 1),
            **self.position.mean_losses(),
        }
        if self.is_first:
            row |= self._evaluate_if_due()
            self.state.append_metrics(row)
        self.position.next_epoch()
        self._save()
        return row

    def _evaluate_if_due(self) -> dict[str, float]:
        epoch = self.position.epoch + 1
        due = epoch % self.config.evaluate_every_epochs == 0 or epoch == self.length.epochs
        if self.evaluate is None or not due:
            return {}
        with torch.no_grad():
            metrics = self.evaluate(self.learner.average.network)
        name = self.config.best_metric
        if name not in metrics:
            raise ValueError(f"best_metric {name!r} is not measured; choose one of {', '.join(sorted(metrics))}")
        value = float(metrics[name])
        if self.position.best is None or value > self.position.best.metric:
            self.position.best = self.state.save_best(self.learner.average.network, value, self.position)
        return metrics

    def _tell(self, row: dict[str, Any], images_per_second: float) -> None:
        shown = {name: value for name, value in row.items() if name in SHOWN_METRICS or name.startswith("loss")}
        values = " ".join(f"{name} {value:.4g}" for name, value in shown.items())
        logger.info("epoch %d/%d %s images/s %.1f", row["epoch"], self.length.epochs, values, images_per_second)
        self.on_epoch_end({**row, "images_per_second": images_per_second})


@contextlib.contextmanager
def _repeatable(device: torch.device) -> Iterator[None]:
    """On the CPU, have torch choose the kernels whose result does not depend on the order of its threads."""
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    memory: Any = torch.utils.deterministic
    fill = memory.fill_uninitialized_memory
    if device.type == "cpu":
        torch.use_deterministic_algorithms(True, warn_only=True)
        memory.fill_uninitialized_memory = False  # costs time, and nothing here reads such memory
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
        memory.fill_uninitialized_memory = fill
