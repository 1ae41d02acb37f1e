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
import math
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.utils.deterministic
from torch import nn

from model import processes
from model.batch_source import BatchGroups, BatchSource
from model.blocks import set_norm_momentum
from model.finiteness import NotFinite
from model.freezing import frozen_layers
from model.memory import keep_freed_memory
from model.progress import EpochProgress, duration
from model.schedule import WarmupCosine, fitting_warmup_steps
from model.training_config import TrainingConfig, TrainingResult
from model.training_length import Cost, Length, decide_length, record_length, recorded_length
from model.training_state import Position, StateDirectory
from model.training_step import ComputeLoss, Learner

if TYPE_CHECKING:
    from model.data.loader import Batch

__all__ = ["BatchSource", "Evaluate", "Stopped", "TrainingConfig", "TrainingResult", "train"]

logger = logging.getLogger(__name__)

# averaged network in eval mode -> metrics of the validation images, by name
Evaluate = Callable[[nn.Module], dict[str, float]]

SHOWN_METRICS = ("step", "learning_rate", "map50_95", "map50")  # of an epoch's line; metrics.jsonl has all
UNMEASURED_STEPS = 2  # the first steps allocate memory and choose kernels
MEASURED_STEPS = 8


class Stopped(Exception):
    """Training was told to stop; its state is saved and the same call goes on from there."""


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
    on_length: Callable[[Length], None] = lambda length: None,
) -> TrainingResult:
    """Train ``model`` in place, from the last saved step of ``state_directory`` or from the beginning.

    Under torchrun every process calls this with its own share of each batch; the first one evaluates, reads and
    writes, and the others touch no file.

    Args:
        model: network to train; its weights are the start of a new run.
        loader: source of batches.
        compute_loss: loss of one batch; it calls the network it is handed, which may wrap ``model``.
        config: settings.
        state_directory: folder for checkpoint and metrics; a finished run found there is returned at once.
        evaluate: metrics of the averaged network (eval mode), which choose the best weights.
        on_epoch_end: told of every finished epoch after it is saved: its row and ``images_per_second``.
        should_stop: asked after every optimiser step.
        on_length: told the length before the first step that counts, in every process.

    Raises:
        Stopped: when ``should_stop`` said so, after saving.
        ValueError: for settings that cannot work, a damaged or foreign state directory, or a loss that is not
            finite; the state before that step is saved then.
    """
    callbacks = (evaluate, on_epoch_end, should_stop)
    if torch.device(config.device).type == "cpu":
        keep_freed_memory()
    with frozen_layers(model, config.freeze) as frozen, _repeatable(torch.device(config.device)):
        run = _Run(model, loader, compute_loss, config, state_directory, frozen, *callbacks)
        run.begin()
        on_length(run.length)
        while not run.is_finished():
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
        frozen: tuple[str, ...],
        evaluate: Evaluate | None,
        on_epoch_end: Callable[[dict[str, Any]], None],
        should_stop: Callable[[], bool],
    ) -> None:
        self.batches = BatchGroups(loader, config.accumulate_steps)
        self.compute_loss, self.config = compute_loss, config
        self.evaluate, self.on_epoch_end, self.should_stop = evaluate, on_epoch_end, should_stop
        self.device = torch.device(config.device)
        self.state, self.frozen = StateDirectory(state_directory), frozen
        self.learner = self._learner(model)
        self.is_first = processes.rank() == 0
        self.evaluation_seconds = 0.0  # of the last evaluation, for the time left

    def begin(self) -> None:
        """Decide the length and go to the last saved step."""
        self.length = processes.from_first(self._length())
        self.schedule = self._schedule()
        torch.manual_seed(self.config.seed + processes.rank())
        self.position = self.state.load(self.learner.parts, self._settings()) or Position()
        if self.is_first:
            logger.info("training on %s in %s", self.device, self.learner.precision)
        if self.position.step > 0:
            logger.info("training goes on from step %d of %d", self.position.step, self.length.total_steps)
        if self.is_first:
            self._warn_of_precision()
            self._warn_of_settings()
        self.position.precision = self.learner.precision
        processes.wait_for_all()

    def _warn_of_precision(self) -> None:
        """The word "auto" may mean something else on the machine that goes on."""
        before, now = self.position.precision, self.learner.precision
        if before not in ("", now):
            logger.warning(
                "the steps so far were computed in %s, the others will be in %s, so this is not the training that one "
                "machine alone would have made; for that, set precision and begin anew",
                *(before, now),
            )

    def _warn_of_settings(self) -> None:
        if self.config.early_stop_epochs and self.evaluate is None:
            logger.warning("early_stop_epochs has no effect: there is no validation set to measure on")
        if self.batches.size < self.config.accumulate_steps:
            logger.warning(
                "accumulate_steps %d is more than the %d batches of an epoch, which are used instead; lower it, or "
                "batch_size",
                *(self.config.accumulate_steps, self.batches.size),
            )

    def is_finished(self) -> bool:
        """Whether all steps are done, or as many evaluations as agreed brought nothing better."""
        if self.position.epoch >= self.length.epochs:
            return True
        stands_still = processes.from_first(self._stands_still())
        if stands_still and self.is_first:
            logger.info(
                "training ends early, after epoch %d of %d: %d evaluations in a row brought no better %s",
                *(self.position.epoch, self.length.epochs, self.config.early_stop_epochs, self.config.best_metric),
            )
        return stands_still

    def _stands_still(self) -> bool:
        """It follows from the position alone, so a resumed run decides as the unbroken one."""
        best, every, patience = self.position.best, self.config.evaluate_every_epochs, self.config.early_stop_epochs
        if not patience or best is None or best.metric == 0:  # at 0 it has not begun to learn
            return False
        counted_from = max(best.epoch, math.ceil(self.config.early_stop_from * self.length.epochs))
        return self.position.epoch // every - counted_from // every >= patience

    def train_epoch(self) -> None:
        """Train what is left of the running epoch, evaluate, save and tell."""
        self.learner.train_mode()
        with self._progress() as progress, contextlib.closing(self._remaining_batches()) as batches:
            for batch in batches:
                losses = self._step(batch)
                self.position.advance(losses)
                progress.step(losses)
                self._save_or_stop()
        row = self._close_epoch()
        if self.is_first:
            self._tell(row, progress)

    def _step(self, batch: list[Batch]) -> dict[str, float]:
        step, total = self.position.step, self.length.total_steps
        try:
            return self.learner.step(batch, self.schedule.at(step), update=step + 1, progress=step / total)
        except NotFinite as fault:
            self._save()
            place = f"epoch {self.position.epoch + 1} of {self.length.epochs}, {fault}"
            raise ValueError(f"{place}; {self.state.path} holds the state after step {step}") from fault

    def result(self) -> TrainingResult:
        """The result of the finished run, read back from its files."""
        processes.wait_for_all()
        processes.separate(self.learner.network)
        best = processes.from_first(self.position.best)
        average = self.learner.average.network.state_dict()
        return TrainingResult(
            best_model_state=self.state.load_best(best)
            if best
            else {name: tensor.clone() for name, tensor in processes.tensors_from_first(average).items()},
            best_metric=best.metric if best else None,
            best_epoch=best.epoch if best else self.position.epoch,
            history=self.state.history(),
            total_steps=self.position.step,
            images_per_step=self.config.batch_size * self.batches.size,
            precision=self.learner.precision,
            stopped_early=self.position.epoch < self.length.epochs,
        )

    def _learner(self, model: nn.Module) -> Learner:
        set_norm_momentum(model, self.config.norm_momentum)
        return Learner(
            model,
            self.compute_loss,
            weight_decay=self.config.weight_decay,
            ema_decay=self.config.ema_decay,
            gradient_clip_norm=self.config.gradient_clip_norm,
            precision=self.config.precision,
            device=self.device,
            layer_decay=self.config.layer_decay,
            fresh_parameters=self.config.fresh_parameters,
            frozen=self.frozen,
        )

    def _length(self) -> Length:
        steps = self.batches.groups_per_epoch
        recorded = processes.made_by_first(lambda: recorded_length(self.state.path, steps))
        if recorded is not None:
            return recorded
        length = decide_length(
            self.config.epochs,
            steps,
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
        learner.train_mode()
        batches = itertools.chain.from_iterable(self.batches.epoch(epoch) for epoch in itertools.count())
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
        return {**self.config.settings(), **asdict(self.length)}

    @property
    def _batches_in_epoch(self) -> int:
        begun = self.position.epoch * self.length.batches_per_epoch
        return min(self.length.batches_per_epoch, self.length.total_steps - begun)

    def _remaining_batches(self) -> Generator[list[Batch]]:
        epoch, left = self.position.epoch, self._batches_in_epoch - self.position.batch
        mosaic_enabled = epoch < self.length.epochs - self.config.close_mosaic_epochs
        if left > 0:
            yield from itertools.islice(self.batches.epoch(epoch, self.position.batch, mosaic_enabled), left)

    def _progress(self) -> EpochProgress:
        batches = self._batches_in_epoch
        return EpochProgress(
            f"epoch {self.position.epoch + 1}/{self.length.epochs}",
            done=self.position.batch,
            batches=batches,
            steps_after=self.length.total_steps - self.position.step + self.position.batch - batches,
            batch_size=self.config.batch_size * self.batches.size,
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
        began = time.perf_counter()
        with torch.no_grad():
            metrics = self.evaluate(self.learner.average.network)
        self.evaluation_seconds = time.perf_counter() - began
        value, best = _measured(metrics, self.config.best_metric), self.position.best
        # among evaluations of 0 the last one counts: it is the network that has learned most
        if best is None or value > best.metric or value == best.metric == 0:
            self.position.best = self.state.save_best(self.learner.average.network, value, self.position)
        return metrics

    def _tell(self, row: dict[str, Any], progress: EpochProgress) -> None:
        shown = {name: value for name, value in row.items() if name in SHOWN_METRICS or name.startswith("loss")}
        values = " ".join(f"{name} {value:.4g}" for name, value in shown.items())
        steps_left, epochs_left = self.length.total_steps - self.position.step, self.length.epochs - self.position.epoch
        evaluations_left = math.ceil(epochs_left / self.config.evaluate_every_epochs)
        left = steps_left * progress.seconds_per_step + evaluations_left * self.evaluation_seconds
        logger.info(
            "epoch %d/%d %s images/s %.1f %s left",
            *(row["epoch"], self.length.epochs, values, progress.images_per_second, duration(left)),
        )
        self.on_epoch_end({**row, "images_per_second": progress.images_per_second})


def _measured(metrics: dict[str, float], name: str) -> float:
    if not metrics:
        raise ValueError(
            "the evaluation measured nothing, as the validation split has no boxes that count (crowd regions do not): "
            "annotate some of its images, or train without a validation split"
        )
    if name not in metrics:
        raise ValueError(f"best_metric {name!r} is not measured; choose one of {', '.join(sorted(metrics))}")
    return float(metrics[name])


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
