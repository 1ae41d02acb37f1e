"""`nasline teach`: the teacher learns the target set, or is taken as it is, and its score thresholds are chosen."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from pipeline_tasks import pinned_files, teacher_checkpoint
from pipeline_tasks.execution import StepContext
from pipeline_tasks.team import end_of_training
from pipeline_tasks.text_table import some
from pipeline_tasks.training_task import (
    TrainingTask,
    dataset_lineage,
    detection_loss,
    merge_lineage,
    open_images,
    prepare_torch,
    run_training,
    start_network,
    training_summary,
    write_checkpoint,
)
from pipeline_tasks.workspace import write_json

if TYPE_CHECKING:
    from model.checkpoint import CheckpointMetadata
    from model.data.image_set import ImageSet
    from model.data.tables import Dataset
    from model.detections import Detections
    from model.pseudo_labels import FlipConsistency
    from model.yolo_nas import YoloNAS

    Loaded = tuple[YoloNAS, CheckpointMetadata]

log = logging.getLogger(__name__)

THRESHOLDS = "thresholds.json"
SHUT_OUT = 1.0
"""Threshold of a class that is to get no pseudo-labels."""


def teach(context: StepContext) -> dict[str, Any]:
    """Publish the teacher's checkpoint and a pseudo-label threshold per class for each mode of flip consistency.

    Raises:
        DataError: a checkpoint that is taken as it is does not know a class of the target set.
    """
    from model.data.tables import read_dataset

    dataset = read_dataset(context.inputs["target"])
    others = _extra_teachers(context, dataset.metadata.class_names)
    if context.parameters.teach.source == "train":
        metadata, summary = _train(context, dataset)
    else:
        metadata, summary, inherited = _take_champion(context, dataset.metadata.class_names)
        others = [*inherited, *others]
    teacher_checkpoint.write_members(context.output / "checkpoint", others, metadata)
    return {**summary, "teachers": 1 + len(others), **_judge(context, dataset.split("val"))}


def _extra_teachers(context: StepContext, class_names: tuple[str, ...]) -> list[Loaded]:
    """The checkpoints of `teach.extra_checkpoints`; loaded first, so that a wrong one costs no training."""
    folders = {name: path for name, path in context.inputs.items() if name.startswith(pinned_files.EXTRA_TEACHERS)}
    for name, folder in folders.items():
        pinned_files.require_unchanged("teach.extra_checkpoints", folder, context.input_digests[name])
    field: Literal["teach.extra_checkpoints"] = "teach.extra_checkpoints"
    loaded = [teacher_checkpoint.load_for_classes(folder, class_names, field) for folder in folders.values()]
    for folder, (_, found) in zip(folders.values(), loaded, strict=True):
        _tell_size(context, f"{field}: {folder}", found)
    return loaded


def _train(context: StepContext, dataset: Dataset) -> tuple[CheckpointMetadata, dict[str, Any]]:
    from model.preprocessing import Preprocessing

    class_names = dataset.metadata.class_names
    variant = context.parameters.start.teacher_variant
    network, lineage, transfer = start_network(context, variant, class_names, context.inputs["weights"])
    task = TrainingTask(
        model=network,
        training_set=dataset.split("train"),
        validation_set=dataset.split("val"),
        compute_loss=detection_loss(len(class_names)),
        parameters=context.parameters.teach,
        preprocessing=Preprocessing(context.parameters.start.image_size),
        transfer=transfer,
    )
    result = run_training(context, task)
    lineage = merge_lineage(lineage, dataset_lineage(context.inputs["target"]))
    metadata = write_checkpoint(context, network, class_names, result.total_steps, lineage)
    return metadata, training_summary(result, len(task.training_set), transfer)


def _take_champion(
    context: StepContext, class_names: tuple[str, ...]
) -> tuple[CheckpointMetadata, dict[str, Any], list[Loaded]]:
    """The champion's network as the run pinned it, and the rest of its ensemble; nothing is trained."""
    folders = teacher_checkpoint.member_folders(context.inputs["weights"])
    (network, found), *others = [
        teacher_checkpoint.load_for_classes(folder, class_names, "teach.source") for folder in folders
    ]
    end_of_training()
    _tell_size(context, "the champion", found)
    metadata = write_checkpoint(context, network, class_names, found.step, found.lineage)
    return metadata, {"steps": 0}, others


def _tell_size(context: StepContext, described: str, found: CheckpointMetadata) -> None:
    trained_size, size = found.preprocessing.input_size, context.parameters.start.image_size
    if trained_size != size:
        log.warning("%s learned at %d pixels and teaches at %d (start.image_size)", described, trained_size, size)


def _judge(context: StepContext, validation_set: ImageSet) -> dict[str, Any]:
    """Choose the thresholds on the validation split, once: shards must not choose their own."""
    from model.evaluation import evaluate, torch_predictor
    from model.label_quality_plot import draw_label_quality
    from model.pseudo_labels import detect_for_labels

    device = prepare_torch(context.parameters.start)
    teacher, metadata = teacher_checkpoint.load_teacher(context.output / "checkpoint")
    predict = torch_predictor(teacher.to(device), device)
    found = detect_for_labels(predict, validation_set, open_images(context), metadata.preprocessing, _modes(context))
    modes = {mode: _labels_of_mode(context, detections, validation_set) for mode, detections in found.items()}
    write_json(context.output / THRESHOLDS, {"flip_consistency": modes})
    _warn_of_shut_out(context, modes)
    quality = {str(mode): content["validation_quality"] for mode, content in modes.items()}
    draw_label_quality(quality, context.output / "plots" / "pseudo_labels.png")
    accuracy = evaluate(found["none"], validation_set).map50_95
    _complete_history(context, accuracy)
    return {"teacher_map50_95": accuracy, **_numbers(quality)}


def _modes(context: StepContext) -> list[FlipConsistency]:
    """All are measured, so that `pseudo_label` may take any; but one only where the teacher saw no mirrored image."""
    from model.pseudo_labels import FLIP_MODES

    return list(FLIP_MODES) if context.parameters.teach.flip else ["none"]


def _labels_of_mode(context: StepContext, found: Detections, validation_set: ImageSet) -> dict[str, Any]:
    from model.evaluation import class_thresholds, pseudo_label_quality
    from model.score_thresholds import LOWEST_THRESHOLD

    given = context.parameters.teach
    lowest = min(LOWEST_THRESHOLD, given.minimum_threshold)
    chosen = class_thresholds(found, validation_set, minimum_precision=given.minimum_precision, lowest=lowest)
    thresholds = {name: max(value, given.minimum_threshold) for name, value in chosen.items()}
    quality = pseudo_label_quality(found, validation_set, thresholds).to_json()
    for name, numbers in quality["per_class"].items():
        numbers["threshold"] = thresholds[name]
    return {"thresholds": thresholds, "validation_quality": quality}


def _warn_of_shut_out(context: StepContext, modes: Mapping[FlipConsistency, dict[str, Any]]) -> None:
    """Tell, for the mode in which this run labels, which classes will have no pseudo-labels; without unlabelled images
    nobody asks.
    """
    if not context.run["datasets"].get("unlabeled"):
        return
    mode = context.parameters.pseudo_label.flip_consistency
    thresholds = modes[mode]["thresholds"] if mode in modes else modes["none"]["thresholds"]
    if names := [name for name, value in thresholds.items() if value >= SHUT_OUT]:
        log.warning(
            "%d of %d classes get no pseudo-labels, since on the validation split no score reaches "
            "teach.minimum_precision (%s) or they have no box there: %s",
            len(names), len(thresholds), context.parameters.teach.minimum_precision, some(names),
        )  # fmt: skip


def _numbers(quality: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Precision and recall of each mode for the manifest; plain detections go without the mode's name."""
    numbers = {
        f"threshold_{'' if mode == 'none' else f'{mode}_'}{name}": entry[name]
        for mode, entry in quality.items()
        for name in ("precision", "recall")
    }
    return {name: value for name, value in numbers.items() if value is not None}


def _complete_history(context: StepContext, accuracy: float) -> None:
    """A teacher that was not trained has one row, for `dvc plots diff`."""
    path = context.output / "history.csv"
    if not path.exists():
        path.write_text(f"epoch,map50_95\n0,{accuracy}\n", encoding="utf-8")
