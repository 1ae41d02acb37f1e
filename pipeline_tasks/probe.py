"""A few optimiser steps of each training, on real pictures and the run's device, timed before a run is started."""

from __future__ import annotations

import math
import resource
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline_tasks.data.sets import OpenSet, usable_boxes, usable_images
from pipeline_tasks.errors import DataError, TemporaryError
from pipeline_tasks.execution import StepContext
from pipeline_tasks.params import Parameters
from pipeline_tasks.process import Stopper
from pipeline_tasks.tracking.mirror import Tracker
from pipeline_tasks.training_parameters import TrainingParameters
from pipeline_tasks.training_task import TrainingTask, detection_loss, prepare_torch, run_training
from pipeline_tasks.workspace import Workspace

if TYPE_CHECKING:
    from model.data.image_set import ImageSet

STEPS = 20
UNMEASURED_STEPS = 2
"""The first ones allocate memory and choose kernels."""
EVALUATED_IMAGES = 16
ROOT = "target"


@dataclass(frozen=True)
class Training:
    """What is tried: a network, its teacher if it has one, and the settings of its loop."""

    variant: str
    teacher: str | None
    parameters: TrainingParameters


@dataclass(frozen=True)
class Measured:
    """What a probe found, of one process on the run's device."""

    seconds_per_step: float
    seconds_per_image: float
    """Of evaluation or pseudo-labelling with this network: decoding, forward pass, suppression."""
    memory_bytes: int
    """Peak of the device's memory on a GPU, else of the process so far, whatever else it had loaded."""
    state_bytes: int
    """What is saved to resume from."""
    weights_bytes: int


class _CountingStopper(Stopper):
    """Asks the loop to stop after some steps, and keeps the times at which it asked."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self._steps = steps
        self.times: list[float] = []

    def requested(self) -> bool:
        """Whether enough steps are done, or the process was told to stop."""
        self.times.append(time.perf_counter())
        return len(self.times) >= self._steps or super().requested()


@dataclass(frozen=True)
class _ProbeContext(StepContext):
    """A step's context whose epochs nobody is told of."""

    def on_epoch_end(self, metrics: dict[str, Any]) -> None:
        """Nothing: a probe leaves no trace."""


def probe(opened: OpenSet, parameters: Parameters, training: Training, steps: int = STEPS) -> Measured:
    """Train `steps` optimiser steps from random weights on pictures of a set, and throw the network away.

    Raises:
        DataError: the set has too few usable pictures.
        TemporaryError: told to stop.
    """
    import model

    prepare_torch(parameters.start)
    given = training.parameters
    images = sample(opened, steps * given.batch_size * given.accumulate_steps, given.batch_size)
    epochs = math.ceil(steps / max(1, len(images) // (given.batch_size * given.accumulate_steps))) + 1
    # these few epochs are like the first of the run: none of its last ones, which go without mosaic
    changed = {"epochs": epochs, "budget_minutes": None, "close_mosaic_epochs": 0, "checkpoint_every_steps": 10**9}
    given = given.model_copy(update=changed)
    network = model.build(training.variant, len(images.class_names))
    with _context(opened, parameters, steps) as context:
        task = TrainingTask(
            model=network,
            training_set=images,
            validation_set=None,
            compute_loss=_loss(training, parameters, len(images.class_names)),
            parameters=given,
            preprocessing=_preprocessing(parameters),
        )
        times = _times(context, task)
        state_bytes = sum(file.stat().st_size for file in context.state.rglob("*") if file.is_file())
        memory = _peak_memory(parameters)
        seconds_per_image = _evaluation_seconds(context, task, images)
    measured = times[min(UNMEASURED_STEPS, len(times) - 2) :]
    weights = sum(tensor.numel() * tensor.element_size() for tensor in network.state_dict().values())
    seconds_per_step = (measured[-1] - measured[0]) / (len(measured) - 1)
    return Measured(seconds_per_step, seconds_per_image, memory, state_bytes, weights)


def _times(context: StepContext, task: TrainingTask) -> list[float]:
    stopper = context.stopper
    assert isinstance(stopper, _CountingStopper)
    stopper.times.append(time.perf_counter())
    try:
        run_training(context, task)
    except TemporaryError:
        if Stopper.requested(stopper):
            raise
    return stopper.times


@contextmanager
def _context(opened: OpenSet, parameters: Parameters, steps: int) -> Iterator[StepContext]:
    with tempfile.TemporaryDirectory(prefix="nasline-") as scratch:
        output, state = Path(scratch, "output"), Path(scratch, "state")
        output.mkdir()
        state.mkdir()
        workspace = Workspace(Path(scratch))
        yield _ProbeContext(
            parameters=parameters,
            part="",
            inputs={},
            input_digests={},
            output=output,
            state=state,
            published=output,
            workspace=workspace,
            run={"datasets": {ROOT: {"path": str(opened.folder)}}},
            champion=None,
            stopper=_CountingStopper(steps + 1),  # the first time is that of the beginning
            tracker=Tracker(workspace, "probe", "probe"),
            save_state=lambda: None,
        )


def sample(opened: OpenSet, count: int, at_least: int) -> ImageSet:
    """At most `count` pictures of the training split (or, without one, of all) with their boxes.

    Raises:
        DataError: there are less than `at_least`.
    """
    from model.data.image_set import ImageSet

    table, boxes = usable_images(opened.raw), usable_boxes(opened.raw)
    splits = table["split"].to_pylist()
    rows = [row for row, split in enumerate(splits) if split == "train"] or list(range(len(splits)))
    chosen = sorted(np.random.default_rng(0).permutation(rows)[:count].tolist())
    paths, ids = ([table[name][row].as_py() for row in chosen] for name in ("path", "image_id"))
    found = [(number, size) for number, path in enumerate(paths) if (size := _size(opened.folder, path)) is not None]
    if len(found) < max(at_least, 1):
        raise DataError(f"{opened.folder} has {len(found)} usable training pictures, a batch needs {at_least}")
    place = {ids[number]: position for position, (number, _) in enumerate(found)}
    owners = boxes["image_id"].to_numpy()
    own = np.flatnonzero(np.isin(owners, list(place)) & (boxes["w"].to_numpy() > 0) & (boxes["h"].to_numpy() > 0))
    xywh = np.stack([boxes[name].to_numpy()[own] for name in "xywh"], axis=1)
    return ImageSet.from_arrays(
        opened.class_names,
        [f"{ROOT}/{paths[number]}" for number, _ in found],
        [size for _, size in found],
        [place[owner] for owner in owners[own].tolist()],
        xywh,
        boxes["category"].to_numpy()[own],
    )


def _size(folder: Path, path: str) -> tuple[int, int] | None:
    """Width and height as the loader will see them; None for what is no picture."""
    from model.data.images import decode_image
    from pipeline_tasks.images import read_content

    try:
        height, width = decode_image(read_content(folder, path), path).shape[:2]
    except ValueError:
        return None
    return width, height


def _loss(training: Training, parameters: Parameters, num_classes: int) -> Any:
    if training.teacher is None:
        return detection_loss(num_classes)
    import model
    from model.distillation import DistillationConfig
    from pipeline_tasks.distillation_task import with_teacher

    device = prepare_torch(parameters.start)
    return with_teacher(model.build(training.teacher, num_classes).to(device), num_classes, DistillationConfig())


def _preprocessing(parameters: Parameters) -> Any:
    from model.preprocessing import Preprocessing

    return Preprocessing(parameters.start.image_size)


def _peak_memory(parameters: Parameters) -> int:
    if parameters.start.device.startswith("cuda"):
        import torch

        return int(torch.cuda.max_memory_allocated(parameters.start.device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _evaluation_seconds(context: StepContext, task: TrainingTask, images: ImageSet) -> float:
    from model.evaluation import detect, torch_predictor
    from pipeline_tasks.training_task import open_images

    few = images.subset(np.arange(min(EVALUATED_IMAGES, len(images))))
    predict = torch_predictor(task.model, context.parameters.start.device)
    began = time.perf_counter()
    detect(predict, few, open_images(context), task.preprocessing)
    return (time.perf_counter() - began) / len(few)
