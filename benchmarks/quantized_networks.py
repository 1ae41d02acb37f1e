"""Float networks of the quantization benchmarks, made again from recipe and seed, and their quantized engines.

Each float network is trained once on one core, at most six minutes of CPU time, and kept in the benchmarks' cache;
quantization is the pipeline's own step.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

import model
from benchmarks import own_training, photo_sets
from benchmarks.photo_sets import PhotoSet
from model.checkpoint import CheckpointMetadata, load_checkpoint, save_checkpoint
from model.data.image_set import ImageSet
from model.detections import Detections
from model.engines.openvino_engine import OpenVINOEngine
from model.evaluation import detect
from model.export import export_onnx
from model.preprocessing import Preprocessing
from model.quantization.storage import load_quantized, read_report
from model.quantization.uneven_channels import spread_channels
from model.repvgg import use_repvgg_blocks
from model.yolo_nas import YoloNAS
from pipeline_tasks.digests import of_json
from pipeline_tasks.params import Parameters, resolve
from pipeline_tasks.quantize import quantize
from pipeline_tasks.training_parameters import TrainingParameters
from pipeline_tasks.training_task import TrainingTask, detection_loss, run_training

CACHE = photo_sets.CACHE / "quantized_networks"
IMAGE_SIZE = 224
EPOCHS = {
    ("bccd", "pico"): 54, ("aquarium", "pico"): 30, ("playing_cards", "pico"): 50, ("bccd", "n"): 26, ("bccd", "s"): 13,
}  # fmt: skip
"""As many as six minutes of one core allow."""
RECIPE: dict[str, Any] = {
    "batch_size": 8, "learning_rate": 0.003, "weight_decay": 0.001, "warmup_steps": 100, "ema_decay": 0.998,
    "mosaic": 0.3, "scale": 0.3, "color_jitter": 0.7,
}  # fmt: skip
QUANTIZE: dict[str, Any] = {"calibration_images": 128, "sensitivity_images": 32, "map_budget": 0.3}
TRAINING: dict[str, Any] = {
    "epochs": 4, "batch_size": 8, "learning_rate": 0.0001, "warmup_steps": 20, "ema_decay": 0.98, "scale": 0.3,
    "color_jitter": 0.7,
}  # fmt: skip
"""Of quantization-aware training."""


HOSTILE = "qarepvgg, a hostile layer"
HOSTILE_BOTTLENECK, HOSTILE_OCTAVES = "backbone.stage2.blocks.bottlenecks.0", 12.0


@dataclass(frozen=True)
class FloatNetwork:
    """What is trained: the set, the network, its seed; for trials in seconds another size or number of epochs.

    blocks: qarepvgg, repvgg, or HOSTILE: the trained qarepvgg network with channels of uneven scale in one bottleneck,
    which computes the same in float.
    """

    dataset: str
    variant: str = "pico"
    seed: int = 0
    blocks: str = "qarepvgg"
    image_size: int = IMAGE_SIZE
    epochs: int | None = None

    @property
    def recipe(self) -> dict[str, Any]:
        """The section of params.yaml it is trained with."""
        epochs = self.epochs or EPOCHS[self.dataset, self.variant]
        every, last = max(1, epochs // 5), max(1, epochs // 5)
        return {**RECIPE, "epochs": epochs, "evaluate_every_epochs": every, "close_mosaic_epochs": last}

    @property
    def folder(self) -> Path:
        """Where its checkpoint is kept; another recipe has another folder."""
        named = {**self.__dict__, "recipe": self.recipe}
        return CACHE / f"{self.dataset}-{self.variant}-{self.blocks}-{self.seed}-{of_json(named)[:8]}"


def trained(wanted: FloatNetwork) -> tuple[Path, float]:
    """Checkpoint of the folded network, and the CPU minutes its training took."""
    checkpoint, record = wanted.folder / "checkpoint", wanted.folder / "minutes.json"
    if not record.exists():
        minutes = _spread(wanted, checkpoint) if wanted.blocks == HOSTILE else _train(wanted, checkpoint)
        record.write_text(json.dumps(minutes))
    return checkpoint, float(json.loads(record.read_text()))


def _spread(wanted: FloatNetwork, checkpoint: Path) -> float:
    even, minutes = trained(replace(wanted, blocks="qarepvgg"))
    network, metadata = load_checkpoint(even)
    spread_channels(network, HOSTILE_BOTTLENECK, HOSTILE_OCTAVES)
    wanted.folder.mkdir(parents=True, exist_ok=True)
    save_checkpoint(checkpoint, network, metadata)
    return minutes


def _train(wanted: FloatNetwork, checkpoint: Path) -> float:
    photos = photo_sets.load(wanted.dataset)
    class_names = photos.train.class_names
    torch.manual_seed(wanted.seed)
    network = model.build(wanted.variant, len(class_names))
    if wanted.blocks == "repvgg":
        use_repvgg_blocks(network)
    task = TrainingTask(
        model=network,
        training_set=photos.train,
        validation_set=photos.validation,
        compute_loss=detection_loss(len(class_names)),
        parameters=TrainingParameters(**wanted.recipe),
        preprocessing=Preprocessing(wanted.image_size),
    )
    shared = {"image_size": wanted.image_size, "precision": "bfloat16", "seed": wanted.seed}
    began = time.process_time()
    result = run_training(own_training.context(wanted.folder, {"target": photos.folder}, **shared), task)
    metadata = CheckpointMetadata(wanted.variant, class_names, task.preprocessing, result.total_steps)
    save_checkpoint(checkpoint, network.eval().fuse(), metadata)
    return (time.process_time() - began) / 60


@dataclass(frozen=True)
class QuantizeContext:
    """What the step ``quantize`` needs of a context, without a workspace."""

    parameters: Parameters
    inputs: dict[str, Path]
    output: Path
    state: Path
    roots: dict[str, Path]
    save_state: Callable[[], None] = lambda: None
    stopper: own_training._NeverStopped = field(default_factory=own_training._NeverStopped)

    def dataset_roots(self) -> dict[str, Path]:
        """Folder of each image root."""
        return self.roots

    def on_epoch_end(self, row: dict[str, Any]) -> None:
        """Nothing to mirror."""


@contextlib.contextmanager
def quantized(
    wanted: FloatNetwork, checkpoint: Path, given: dict[str, Any]
) -> Iterator[tuple[YoloNAS, dict[str, Any]]]:
    """The network that the step publishes with these parameters of its section, and what it says of it."""
    photos = photo_sets.load(wanted.dataset)
    training = {**TRAINING, **given.get("training", {})}
    options = {f"quantize.{name}": value for name, value in {**QUANTIZE, **given, "training": training}.items()}
    options |= {"start.threads": 1, "start.seed": wanted.seed, "gate.latency_threads": 1}
    with tempfile.TemporaryDirectory() as folder:
        output, state = Path(folder) / "output", Path(folder) / "state"
        output.mkdir()
        state.mkdir()
        inputs = {"target": photo_sets.CACHE / "tables" / wanted.dataset / "target", "student": checkpoint}
        context: Any = QuantizeContext(resolve(None, options), inputs, output, state, {"target": photos.folder})
        quantize(context)
        network, _ = load_quantized(output / "checkpoint")
        yield network, read_report(output / "checkpoint")


def float_network(checkpoint: Path) -> YoloNAS:
    """The folded float network of a checkpoint."""
    network, _ = load_checkpoint(checkpoint)
    return network


def engine_figures(network: YoloNAS, photos: PhotoSet, image_size: int) -> dict[str, Any]:
    """COCO figures of the network as an OpenVINO engine on the test split, with resamples."""
    folder = Path(tempfile.mkdtemp())
    try:
        path = folder / "model.onnx"
        names = photos.train.class_names
        export_onnx(network, path, preprocessing=Preprocessing(image_size), class_names=names)
        found = _find(OpenVINOEngine.from_file(path, threads=1), photos.test, photos, image_size)
    finally:
        shutil.rmtree(folder)
    return photo_sets.figures(found, photos.test)


def _find(engine: OpenVINOEngine, images: ImageSet, photos: PhotoSet, image_size: int) -> Detections:
    return detect(
        engine.run,
        images,
        photos.open_image,
        Preprocessing(image_size),
        batch_size=1,
        score_threshold=own_training.SCORE_THRESHOLD,
        iou_threshold=own_training.IOU_THRESHOLD,
        max_detections=own_training.MAX_DETECTIONS,
    )


def quiet_logs() -> None:
    """Progress of the steps on the terminal, without the exporter's."""
    import logging

    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    for name in ("pipeline_tasks", "model"):
        logging.getLogger(name).setLevel(logging.INFO)
