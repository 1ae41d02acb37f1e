"""`nasline plan`: images, optimiser steps, hours, memory and disk of a run, before it is started."""

from __future__ import annotations

import math
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pipeline_tasks.data.leaks import fingerprints
from pipeline_tasks.data.sets import open_set, usable_images
from pipeline_tasks.errors import DataError, TemporaryError
from pipeline_tasks.params import Parameters
from pipeline_tasks.plan import Plan
from pipeline_tasks.probe import STEPS, Measured, Training, probe
from pipeline_tasks.training_parameters import TrainingParameters
from pipeline_tasks.workspace import Workspace

TABLE_BYTES_PER_IMAGE, TABLE_BYTES_PER_BOX = 200, 60
"""Of the published Parquet tables, measured on the five sets in use; compressed, so no more than a guess."""
STATES = 2
"""A new state is written beside the old one before it takes its place."""
ENGINE_COPIES = 8
"""Quantized and float engine, both again for the target, the registered networks: in weights of the student."""
RESERVE = 1.2
READ_PICTURES = 64
UNPROBED = "not probed"


@dataclass(frozen=True)
class SetSize:
    """What a set holds, as far as training asks."""

    images: dict[str, int]
    """By split."""
    boxes: int


@dataclass(frozen=True)
class StepEstimate:
    """One step; None where nothing is known before."""

    reference: str
    images: int | None
    steps: int | None
    hours: float | None
    memory_bytes: int | None
    disk_bytes: int
    basis: str
    """What the numbers rest on."""


@dataclass(frozen=True)
class Estimate:
    """The whole run."""

    steps: list[StepEstimate]
    probe_steps: int
    device: str
    free_bytes: int
    place: Path

    @property
    def hours(self) -> float:
        """Of the steps that have an estimate."""
        return sum(step.hours or 0.0 for step in self.steps)

    @property
    def disk_bytes(self) -> int:
        """All of it, with a reserve."""
        return int(RESERVE * sum(step.disk_bytes for step in self.steps))

    def require_disk(self) -> None:
        """Refuse a run that would fill the disk.

        Raises:
            TemporaryError: there is not enough room.
        """
        if self.disk_bytes > self.free_bytes:
            raise TemporaryError(
                f"the run needs about {size_text(self.disk_bytes)} below {self.place}, which has "
                f"{size_text(self.free_bytes)} free; make room or choose another --workspace"
            )


def estimate(workspace: Workspace, parameters: Parameters, planned: Plan, probe_steps: int = STEPS) -> Estimate:
    """Estimate every step of a plan. Without `probe_steps` (0) nothing is measured, and there are no hours.

    Raises:
        DataError: the target set is missing or too small for a batch.
    """
    sets = {role: _size_of(folder) for role, folder in _folders(parameters).items()}
    if "target" not in sets:
        raise DataError("start.dataset names no folder that is there; the estimate rests on its pictures")
    finished = {step.reference: step.finished for step in planned.steps}
    measured = _measure(parameters, finished, sets, probe_steps) if probe_steps else {}
    reading = _reading_seconds(parameters.start.dataset) if probe_steps else None
    steps = [
        _validation(sets, reading)
        if name == "validate_data" and not done
        else _step(name, done, parameters, sets, measured)
        for name, done in finished.items()
    ]
    place = next(folder for folder in (workspace.root, *workspace.root.parents) if folder.is_dir())
    return Estimate(steps, probe_steps, parameters.start.device, shutil.disk_usage(place).free, place)


def _folders(parameters: Parameters) -> dict[str, Path]:
    given = parameters.start
    named = {"target": given.dataset, "pretrain": given.pretrain_dataset, "unlabeled": given.unlabeled_dataset}
    folders = {role: Path(folder).expanduser() for role, folder in named.items() if folder}
    return {role: folder for role, folder in folders.items() if folder.is_dir()}


def _size_of(folder: Path) -> SetSize:
    with open_set(str(folder)) as opened:
        return SetSize(dict(Counter(usable_images(opened.raw)["split"].to_pylist())), len(opened.raw.boxes))


def _shared(parameters: Parameters) -> bool:
    """Whether the student's pretraining is the teacher's too: equal work has one key."""
    return parameters.start.student_variant == parameters.start.teacher_variant


def _trainings(parameters: Parameters, sets: dict[str, SetSize]) -> dict[str, Training]:
    """The steps that train for certain; quantization-aware training is decided by what quantization costs."""
    start = parameters.start
    found = {}
    if "pretrain" in sets and not start.from_champion:
        for part, variant in (("student", start.student_variant), ("teacher", start.teacher_variant)):
            if part == "student" or (parameters.teach.source == "train" and not _shared(parameters)):
                found[f"pretrain/{part}"] = Training(variant, None, parameters.pretrain.of_variant(variant))
    if parameters.teach.source == "train":
        found["teach"] = Training(start.teacher_variant, None, parameters.teach)
    found["distill"] = Training(start.student_variant, start.teacher_variant, parameters.distill)
    return found


def _measure(
    parameters: Parameters, finished: dict[str, bool], sets: dict[str, SetSize], probe_steps: int
) -> dict[str, Measured]:
    """One probe for each training that is to do; trainings that cost the same share it."""
    measured: dict[str, Measured] = {}
    known: dict[tuple[object, ...], Measured] = {}
    with open_set(parameters.start.dataset) as opened:
        for name, training in _trainings(parameters, sets).items():
            if finished.get(name):
                continue
            key = (training.variant, training.teacher, *_cost_settings(training.parameters))
            if key not in known:
                known[key] = probe(opened, parameters, training, probe_steps)
            measured[name] = known[key]
    return measured


def _cost_settings(given: TrainingParameters) -> tuple[object, ...]:
    names = ("batch_size", "auto_batch_size", "accumulate_steps", "mosaic", "mixup", "multi_scale", "freeze")
    return tuple(str(getattr(given, name)) for name in names)


def _step(
    name: str, done: bool, parameters: Parameters, sets: dict[str, SetSize], measured: dict[str, Measured]
) -> StepEstimate:
    if done:
        return StepEstimate(name, None, 0, 0.0, None, 0, "finished: reused")
    training = _trainings(parameters, sets).get(name)
    if training is not None:
        return _training(name, training, parameters, sets, measured.get(name))
    if name == "pseudo_label":
        return _pseudo_label(sets, measured)
    if name.startswith("pretrain/") or name == "teach":
        basis = "that of pretrain/student" if name == "pretrain/teacher" and "pretrain" in sets else "nothing to train"
        return StepEstimate(name, 0, 0, 0.0, None, 0, basis)
    student = measured.get("distill")
    copies = ENGINE_COPIES * student.weights_bytes if student and name in ("export", "gate", "register") else 0
    return StepEstimate(name, None, None, None, None, copies, UNPROBED)


def _training(
    name: str, training: Training, parameters: Parameters, sets: dict[str, SetSize], measured: Measured | None
) -> StepEstimate:
    given = training.parameters
    images, held_out = _images(name, sets)
    per_epoch = max(1, images // (given.batch_size * given.accumulate_steps))
    steps, epochs = given.epochs * per_epoch, given.epochs
    if measured is None:
        return StepEstimate(name, images, steps, None, None, 0, UNPROBED)
    evaluation_seconds = held_out * measured.seconds_per_image
    basis = f"{measured.seconds_per_step:.3g} s/step"
    affordable = _affordable_steps(given, measured.seconds_per_step, evaluation_seconds, per_epoch)
    if affordable is not None and affordable < steps:
        steps, epochs = affordable, math.ceil(affordable / per_epoch)
        basis += ", time budget"
    evaluations = math.ceil(epochs / given.evaluate_every_epochs)
    seconds = steps * measured.seconds_per_step + evaluations * evaluation_seconds
    disk = STATES * measured.state_bytes + 2 * measured.weights_bytes
    memory = measured.memory_bytes + parameters.start.cache_megabytes * 1_000_000 * (parameters.start.device == "cpu")
    return StepEstimate(name, images, steps, seconds / 3600, memory, disk, basis)


def _affordable_steps(
    given: TrainingParameters, step_seconds: float, evaluation_seconds: float, steps_per_epoch: int
) -> int | None:
    """Steps of the time budget, as the training will count them; None without one."""
    from model.training_length import Cost, affordable_steps

    if given.budget_minutes is None:
        return None
    cost = Cost(step_seconds, evaluation_seconds)
    return affordable_steps(60 * given.budget_minutes, cost, steps_per_epoch * given.evaluate_every_epochs)


def _images(name: str, sets: dict[str, SetSize]) -> tuple[int, int]:
    """Images that a training learns from in an epoch, at most, and those it is measured on."""
    own = sets["pretrain" if name.startswith("pretrain/") else "target"].images
    unlabeled = sum(sets["unlabeled"].images.values()) if name == "distill" and "unlabeled" in sets else 0
    return own.get("train", 0) + unlabeled, own.get("val", 0)


def _reading_seconds(folder: str) -> float:
    """Of one picture, with every core at work: read, decode, hash."""
    with open_set(folder) as opened:
        paths = usable_images(opened.raw)["path"].to_pylist()[:READ_PICTURES]
        began = time.perf_counter()
        fingerprints(opened.folder, paths)
        return (time.perf_counter() - began) / max(1, len(paths))


def _validation(sets: dict[str, SetSize], reading: float | None) -> StepEstimate:
    images = sum(sum(one.images.values()) for one in sets.values())
    boxes = sum(one.boxes for one in sets.values())
    disk = images * TABLE_BYTES_PER_IMAGE + boxes * TABLE_BYTES_PER_BOX
    if reading is None:
        return StepEstimate("validate_data", images, None, None, None, disk, UNPROBED)
    basis = f"{1 / reading:.0f} images/s read"
    return StepEstimate("validate_data", images, None, images * reading / 3600, None, disk, basis)


def _pseudo_label(sets: dict[str, SetSize], measured: dict[str, Measured]) -> StepEstimate:
    images = sum(sets["unlabeled"].images.values()) if "unlabeled" in sets else 0
    teacher = measured.get("teach")
    hours = images * teacher.seconds_per_image / 3600 if teacher else None if images else 0.0
    basis = f"{teacher.seconds_per_image:.3g} s/image" if teacher else UNPROBED if images else "no unlabelled set"
    return StepEstimate("pseudo_label", images, None, hours, None, images * 10 * TABLE_BYTES_PER_BOX, basis)


def text(found: Estimate, parameters: Parameters) -> str:
    """The estimate for a reader."""
    return "\n".join([*_head(found, parameters), *_table(found), *_foot(found)])


def _head(found: Estimate, parameters: Parameters) -> Iterator[str]:
    if not found.probe_steps:
        yield "estimate without a probe: no hours"
        return
    yield f"estimate, from {found.probe_steps} optimiser steps of each training on {found.device}; not a promise"
    if parameters.start.processes > 1:
        yield f"measured with one process; {parameters.start.processes} of them divide the hours by less than that"


def _table(found: Estimate) -> Iterator[str]:
    row = "  {:<17}{:>10}{:>10}{:>9}{:>10}{:>10}  {}".format
    yield row("step", "images", "steps", "hours", "memory", "disk", "").rstrip()
    for step in found.steps:
        numbers = (_or_dash(step.images, "{:,}"), _or_dash(step.steps, "{:,}"), _or_dash(step.hours, "{:.2f}"))
        memory = "-" if step.memory_bytes is None else size_text(step.memory_bytes)
        yield row(step.reference, *numbers, memory, size_text(step.disk_bytes), step.basis)


def _foot(found: Estimate) -> Iterator[str]:
    unknown = [step.reference for step in found.steps if step.hours is None]
    hours = f"together about {found.hours:.2f} hours" if found.probe_steps else ""
    yield f"{hours}, without {', '.join(unknown)}" if unknown and hours else hours or "hours: not measured"
    needed, free = size_text(found.disk_bytes), size_text(found.free_bytes)
    yield f"disk: about {needed} with a reserve, {free} are free below {found.place}"


def _or_dash(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def size_text(count: float) -> str:
    """Bytes for a reader."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count / 1e3:.0f} kB" if count else "-"
