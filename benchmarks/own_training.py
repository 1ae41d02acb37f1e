"""Trains a YOLO-NAS from scratch on one of the real sets with the product's own training step.

A process of its own, one thread and no loader processes, so that CPU time is all the time there is. A recipe is a
section of params.yaml (``pretrain``, ``teach``, ``distill``) in which only what differs from the defaults is named.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import model
from benchmarks import photo_sets
from model.detections import Detections
from model.evaluation import detect, torch_predictor
from model.preprocessing import Preprocessing
from pipeline_tasks.params import StartParameters
from pipeline_tasks.training_parameters import TrainingParameters
from pipeline_tasks.training_task import TrainingTask, detection_loss, run_training

# as the peer validates
SCORE_THRESHOLD, IOU_THRESHOLD, MAX_DETECTIONS = 0.001, 0.7, 300


class _NeverStopped:
    requested = staticmethod(lambda: False)

    @contextlib.contextmanager
    def cooperative(self) -> Iterator[None]:
        yield


@dataclass(frozen=True)
class _Parameters:
    start: StartParameters


@dataclass(frozen=True)
class BenchmarkContext:
    """What ``run_training`` needs of a step, without a workspace: folders, shared parameters, image roots."""

    parameters: _Parameters
    output: Path
    roots: dict[str, Path]
    stopper: _NeverStopped = field(default_factory=_NeverStopped)

    @property
    def state(self) -> Path:
        """Where the training keeps its checkpoints, so that a killed benchmark goes on."""
        return self.output / "state"

    def dataset_roots(self) -> dict[str, Path]:
        """Folder of each image root."""
        return self.roots

    def on_epoch_end(self, row: dict[str, Any]) -> None:
        """Nothing to mirror."""


def context(output: Path, roots: dict[str, Path], **shared: Any) -> Any:
    """A context for ``run_training``; ``shared`` are fields of the start section."""
    output.mkdir(parents=True, exist_ok=True)
    (output / "state").mkdir(exist_ok=True)
    return BenchmarkContext(_Parameters(StartParameters(threads=1, **shared)), output, roots)


def find(network: torch.nn.Module, images: Any, open_image: Any, image_size: int) -> Detections:
    """Detections with the thresholds that the peer validates with."""
    return detect(
        torch_predictor(network),
        images,
        open_image,
        Preprocessing(image_size),
        score_threshold=SCORE_THRESHOLD,
        iou_threshold=IOU_THRESHOLD,
        max_detections=MAX_DETECTIONS,
    )


def save(found: Detections, path: Path) -> None:
    """Columns of the detections as a file."""
    np.savez_compressed(path, image=found.image_index, box=found.boxes_xyxy, score=found.scores, label=found.labels)


def read(path: Path) -> Detections:
    """The columns back."""
    columns = np.load(path)
    return Detections(columns["image"], columns["box"], columns["score"], columns["label"])


def main() -> None:
    """Train, detect on validation and test images, write val.npz, test.npz and run.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("dataset", help="name of the set")
    parser.add_argument("output", type=Path)
    parser.add_argument("--variant", default="t")
    parser.add_argument("--image-size", type=int, default=320)
    parser.add_argument("--precision", default="bfloat16")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--recipe", type=json.loads, default={})
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(1)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    photos = photo_sets.load(arguments.dataset)
    torch.manual_seed(arguments.seed)
    task = TrainingTask(
        model=model.build(arguments.variant, len(photos.train.class_names)),
        training_set=photos.train,
        validation_set=photos.validation,
        compute_loss=detection_loss(len(photos.train.class_names)),
        parameters=TrainingParameters(**arguments.recipe),
        preprocessing=Preprocessing(arguments.image_size),
    )
    shared = {"image_size": arguments.image_size, "precision": arguments.precision, "seed": arguments.seed}
    began = time.process_time()
    result = run_training(context(arguments.output, {"target": photos.folder}, **shared), task)
    seconds = time.process_time() - began
    for name, images in {"val": photos.validation, "test": photos.test}.items():
        found = find(task.model, images, photos.open_image, arguments.image_size)
        save(found, arguments.output / f"{name}.npz")
    summary = {"cpu_seconds": seconds, "steps": result.total_steps, "best_epoch": result.best_epoch}
    (arguments.output / "run.json").write_text(json.dumps(summary | {"best_map50_95": result.best_metric}))


if __name__ == "__main__":
    main()
