"""What the training steps share: loader, loop, evaluation and the files they publish."""

from __future__ import annotations

import csv
import json
import logging
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline_tasks import digests
from pipeline_tasks.errors import ConfigurationError, TemporaryError
from pipeline_tasks.execution import StepContext
from pipeline_tasks.idle_settings import warn_of_batch, warn_of_closed_mosaic, warn_of_scale
from pipeline_tasks.params import StartParameters
from pipeline_tasks.team import end_of_training
from pipeline_tasks.training_parameters import TrainingParameters
from pipeline_tasks.transfer import Transfer
from pipeline_tasks.workspace import write_json

if TYPE_CHECKING:
    import torch

    from model.batch_source import BatchSource
    from model.checkpoint import CheckpointMetadata
    from model.data.image_set import ImageSet
    from model.data.loader import TrainingLoader
    from model.preprocessing import Preprocessing
    from model.training import TrainingConfig, TrainingResult
    from model.training_length import Length
    from model.training_step import ComputeLoss
    from model.yolo_nas import YoloNAS
    from pipeline_tasks.images import FolderImages

log = logging.getLogger(__name__)

TRANSFER = "transfer.json"


@dataclass(frozen=True)
class TrainingTask:
    """One training: a network, what it learns from, and what it is measured on."""

    model: YoloNAS
    training_set: ImageSet
    validation_set: ImageSet | None
    compute_loss: ComputeLoss
    parameters: TrainingParameters
    preprocessing: Preprocessing
    reduced_precision: bool = True
    """Whether `start.precision` holds; rounding to INT8 needs exact scales and is always simulated in float32."""
    transfer: Transfer | None = None
    """What the network took over from a checkpoint; None for one that starts as a whole, or from random weights."""
    phases: Phases | None = None
    """Parts of `training_set` to learn from one after the other, in as many steps as the whole set takes."""


@dataclass(frozen=True)
class Phases:
    """Images for the first share of a training's optimiser steps, and for the rest."""

    first: ImageSet
    rest: ImageSet
    first_share: float


def prepare_torch(shared: StartParameters) -> torch.device:
    """Set threads and seed, and return the device that `start.device` names.

    Raises:
        ConfigurationError: CUDA was asked for and is not there.
    """
    import torch

    if shared.threads:
        torch.set_num_threads(shared.threads)
    torch.manual_seed(shared.seed)
    if shared.device.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigurationError(f"start.device is {shared.device!r}, but torch finds no CUDA device; use cpu")
    return torch.device(shared.device)


def open_images(context: StepContext) -> FolderImages:
    """Reader of the run's images by the paths in the dataset tables."""
    from pipeline_tasks.images import make_open_image

    return make_open_image(context.dataset_roots())


def run_training(context: StepContext, task: TrainingTask) -> TrainingResult:
    """Train until the end, or until told to stop, and write metrics.jsonl and the curves.

    Raises:
        Helped: in every process but the first, at the end of the training they share.
        TemporaryError: told to stop; the state is saved and the same command goes on from it.
    """
    from model.plots import training_curves
    from model.training import Stopped, train

    shared = context.parameters.start
    device = prepare_torch(shared)
    task = _with_fitting_batch(context, task)
    warn_of_scale(task.parameters, task.preprocessing.input_size)
    loader, plan, batch_size = _batch_source(context, task)
    warn_of_batch(task.parameters, batch_size)

    def tell_length(length: Length) -> None:
        plan(length)
        warn_of_closed_mosaic(task.parameters, length.epochs)

    evaluate = _evaluation(context, task, device) if task.validation_set is not None else None
    try:
        with context.stopper.cooperative():
            result = train(
                task.model,
                loader,
                task.compute_loss,
                replace(training_config(task, shared), batch_size=batch_size),
                context.state,
                evaluate=evaluate,
                on_epoch_end=context.on_epoch_end,
                should_stop=context.stopper.requested,
                on_length=tell_length,
            )
    except Stopped as stopped:
        raise TemporaryError(f"told to stop: {stopped}; run the same command again to go on") from None
    except RuntimeError as error:
        _raise_lost_loader(error)
        raise
    end_of_training()
    task.model.load_state_dict(result.best_model_state)
    task.model.eval()
    shutil.copyfile(context.state / "metrics.jsonl", context.output / "metrics.jsonl")
    _write_history(context.output / "history.csv", result.history)
    training_curves(result.history, _plots(context) / "curves.png")
    return result


def _raise_lost_loader(error: RuntimeError) -> None:
    """TemporaryError where a loader process was killed, as the kernel does for want of memory; torch raises that
    wherever the training stands at that moment.
    """
    if str(error).startswith("DataLoader worker"):
        reason = " ".join(str(error).split()).rstrip(".")
        raise TemporaryError(
            f"a loader process of the training was lost ({reason}); what was saved last is kept: see that there is "
            "memory for start.loader_workers processes, then run the same command again to go on"
        ) from None


def _with_fitting_batch(context: StepContext, task: TrainingTask) -> TrainingTask:
    """The task with the batch size that fits the device, where its parameters ask for that."""
    from model.batch_size import Trial, fitting_batch_size
    from model.data.sampling import input_sizes

    given = task.parameters
    if not given.auto_batch_size:
        return task
    largest_size = input_sizes(task.preprocessing.input_size, given.multi_scale)[-1]
    # mosaic and mixup join images, but hardly ever several as full as the fullest
    boxes = int(task.training_set.box_counts.max()) * (2 if given.mosaic or given.mixup else 1)
    config = training_config(task, context.parameters.start)
    trial = Trial(task.model, task.compute_loss, config, largest_size, boxes)
    batch_size = fitting_batch_size(context.state, trial, len(task.training_set))
    return replace(task, parameters=given.model_copy(update={"batch_size": batch_size}))


def _write_history(path: Path, history: list[dict[str, Any]]) -> None:
    """The epochs as a table, for `dvc plots diff`."""
    names = list(dict.fromkeys(name for row in history for name in row))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names, restval="")
        writer.writeheader()
        writer.writerows(history)


def training_config(task: TrainingTask, shared: StartParameters) -> TrainingConfig:
    """The model package's settings from a section of params.yaml."""
    from model.training import TrainingConfig

    parameters = task.parameters
    return TrainingConfig(
        epochs=parameters.epochs,
        batch_size=parameters.batch_size,
        learning_rate=parameters.learning_rate,
        final_learning_rate_ratio=parameters.final_learning_rate_ratio,
        weight_decay=parameters.weight_decay,
        warmup_steps=parameters.warmup_steps,
        ema_decay=parameters.ema_decay,
        norm_momentum=parameters.norm_momentum,
        gradient_clip_norm=parameters.gradient_clip_norm or 0.0,
        accumulate_steps=parameters.accumulate_steps,
        freeze=tuple(parameters.freeze),
        layer_decay=parameters.layer_decay,
        fresh_parameters=_fresh_parameters(task),
        close_mosaic_epochs=parameters.close_mosaic_epochs,
        evaluate_every_epochs=parameters.evaluate_every_epochs,
        early_stop_epochs=parameters.early_stop_epochs,
        early_stop_from=task.phases.first_share if task.phases else 0.0,
        checkpoint_every_steps=parameters.checkpoint_every_steps,
        seed=shared.seed,
        device=shared.device,
        precision=shared.precision if task.reduced_precision else "float32",
        budget_minutes=parameters.budget_minutes,
    )


def _fresh_parameters(task: TrainingTask) -> tuple[str, ...]:
    """Parameters that no checkpoint filled; they matter to layer-wise rates only."""
    if task.transfer is None or task.parameters.layer_decay == 1:
        return ()
    fresh = set(task.transfer.report.reinitialised)
    return tuple(name for name, _ in task.model.named_parameters() if name in fresh)


def _batch_source(context: StepContext, task: TrainingTask) -> tuple[BatchSource, Callable[[Length], None], int]:
    """The task's batches, what must be told the training's length, and the images of a batch."""
    from model.data.phases import PhasedLoader

    whole, phases = _loader(context, task), task.phases
    if phases is None:
        return whole, lambda length: None, whole.batch_size
    parts = [replace(task, training_set=images) for images in (phases.first, phases.rest)]
    first, rest = (partial(_loader, context, part) for part in parts)
    loader = PhasedLoader((first, rest), whole.batches_per_epoch, phases.first_share)
    return loader, lambda length: loader.plan(length.total_steps / length.batches_per_epoch), whole.batch_size


def _loader(context: StepContext, task: TrainingTask) -> TrainingLoader:
    from model.data.augmentation import AugmentationConfig
    from model.data.loader import TrainingLoader

    shared, given = context.parameters.start, task.parameters
    augmentation = AugmentationConfig(
        mosaic_probability=given.mosaic,
        mixup_probability=given.mixup,
        minimum_scale=1 - given.scale,
        maximum_scale=1 + given.scale,
        translation=given.translate,
        rotation_degrees=given.rotate_degrees,
        horizontal_flip_probability=given.flip,
        hsv_probability=1.0 if given.color_jitter else 0.0,
        hue_degrees=10.0 * given.color_jitter,
        saturation=min(1.0, 0.4 * given.color_jitter),
        value=min(1.0, 0.3 * given.color_jitter),
    )
    return TrainingLoader(
        task.training_set,
        open_images(context),
        task.preprocessing,
        given.batch_size,
        augmentation,
        shared.seed,
        workers=shared.loader_workers,
        cache_megabytes=shared.cache_megabytes,
        open_reduced=open_images(context).reduced if shared.reduced_decoding else None,
        class_balance=given.class_balance,
        multi_scale=given.multi_scale,
    )


def _evaluation(
    context: StepContext, task: TrainingTask, device: torch.device
) -> Callable[[torch.nn.Module], dict[str, float]]:
    from model.evaluation import detect, evaluate, torch_predictor

    validation_set, open_image = task.validation_set, open_images(context)
    assert validation_set is not None

    def measure(model: torch.nn.Module) -> dict[str, float]:
        found = detect(torch_predictor(model, device), validation_set, open_image, task.preprocessing)
        return evaluate(found, validation_set).scalars()

    return measure


def detection_loss(num_classes: int) -> ComputeLoss:
    """The plain detection loss as a function of network, images, targets and progress (unused)."""
    from model.loss import DetectionLoss

    criterion = DetectionLoss(num_classes)

    def compute(model: Any, images: Any, targets: Any, progress: float) -> tuple[Any, dict[str, Any]]:
        (boxes_xyxy, scores), raw = model(images)
        parts = criterion(raw, boxes_xyxy, scores, targets)
        return parts.total, {
            "classification": parts.classification, "iou": parts.iou, "distribution": parts.distribution
        }  # fmt: skip

    return compute


def write_checkpoint(
    context: StepContext, model: YoloNAS, class_names: tuple[str, ...], step: int, lineage: Mapping[str, Any]
) -> CheckpointMetadata:
    """Publish the network as `checkpoint/`, with its parents' digests and its lineage."""
    from model.checkpoint import CheckpointMetadata, save_checkpoint
    from model.preprocessing import Preprocessing

    metadata = CheckpointMetadata(
        variant=model.architecture.variant,
        class_names=class_names,
        preprocessing=Preprocessing(context.parameters.start.image_size),
        step=step,
        parents=dict(context.input_digests),
        lineage=dict(lineage),
    )
    save_checkpoint(context.output / "checkpoint", model, metadata)
    return metadata


def start_network(
    context: StepContext, variant: str, class_names: tuple[str, ...], source: Path
) -> tuple[YoloNAS, dict[str, Any], Transfer]:
    """A network of the step's own classes with the weights of a checkpoint, as far as they fit, its lineage, and what
    fitted, which is also written to `transfer.json`.
    """
    import model
    from model.checkpoint import load_checkpoint, transfer_weights

    prepare_torch(context.parameters.start)
    network = model.build(variant, len(class_names))
    parent, metadata = load_checkpoint(source)
    report = transfer_weights(network, parent.state_dict(), metadata.class_names, class_names)
    transfer = Transfer(metadata.variant, class_names, report)
    transfer.tell(variant)
    write_json(context.output / TRANSFER, transfer.to_json())
    return network, dict(metadata.lineage), transfer


def merge_lineage(*lineages: Mapping[str, Any]) -> dict[str, Any]:
    """Union of lineages: weights and annotations by licence; images by dataset, so that none is counted twice."""
    merged: dict[str, Any] = {"weights": [], "annotations": [], "images": {}}
    for lineage in lineages:
        for kind in ("weights", "annotations"):
            merged[kind] = sorted({*merged[kind], *lineage.get(kind, [])})
        merged["images"] |= lineage.get("images", {})
    return merged


def dataset_lineage(folder: Path) -> dict[str, Any]:
    """Licences of a dataset's annotations and images, each apart."""
    metadata = json.loads((folder / "dataset.json").read_text(encoding="utf-8"))
    licences, digest = metadata["licences"], digests.of_file(folder / "images.parquet")
    images = {f"{', '.join(metadata['roots'])} {digest[:8]}": licences["images"]}
    return {"weights": [], "annotations": [licences["annotations"]], "images": images}


def _plots(context: StepContext) -> Path:
    folder = context.output / "plots"
    folder.mkdir(exist_ok=True)
    return folder


def training_summary(result: TrainingResult, images: int, transfer: Transfer | None = None) -> dict[str, Any]:
    """The numbers of a training that its manifest and MLflow carry."""
    best = next((row for row in result.history if row["epoch"] == result.best_epoch), result.history[-1])
    scores: dict[str, Any] = {name: best[name] for name in ("map50_95", "map50", "map75") if name in best}
    summary = {"images": images, "steps": result.total_steps, "best_epoch": result.best_epoch, **scores}
    summary |= {"images_per_step": result.images_per_step, "precision": result.precision}
    if result.stopped_early:
        summary["stopped_early_after_epoch"] = len(result.history)
    return {**summary, "transfer": transfer.summary()} if transfer else summary
