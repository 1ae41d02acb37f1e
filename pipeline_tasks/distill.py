"""`nasline distill`: the student learns labels and pseudo-labels, and what the teacher thinks of them."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from pipeline_tasks.distillation_task import add_feature_adapters, remove_feature_adapters, with_teacher
from pipeline_tasks.execution import StepContext
from pipeline_tasks.params import DistillParameters
from pipeline_tasks.teacher_checkpoint import load_teacher
from pipeline_tasks.training_task import (
    Phases,
    TrainingTask,
    dataset_lineage,
    merge_lineage,
    prepare_torch,
    run_training,
    start_network,
    training_summary,
    write_checkpoint,
)
from pipeline_tasks.validate_data import is_absent

if TYPE_CHECKING:
    from model.data.image_set import ImageSet
    from model.distillation import DistillationConfig
    from model.teacher import Teacher, TeacherPrecision
    from model.training_step import ComputeLoss

log = logging.getLogger(__name__)


def distill(context: StepContext) -> dict[str, Any]:
    """Train the student on both label kinds against the frozen teacher; publish its float checkpoint."""
    from model.data.image_set import concatenate
    from model.data.tables import read_dataset
    from model.preprocessing import Preprocessing

    given = context.parameters.distill
    dataset = read_dataset(context.inputs["target"])
    class_names = dataset.metadata.class_names
    sets = [dataset.split("train"), *_pseudo_labelled(context)]
    variant = context.parameters.start.student_variant
    network, lineage, transfer = start_network(context, variant, class_names, context.inputs["weights"])
    teacher, teacher_metadata = load_teacher(context.inputs["teacher"], _teacher_precision(context))
    if given.feature_weight:
        add_feature_adapters(network, teacher)
    task = TrainingTask(
        model=network,
        training_set=concatenate(sets),
        validation_set=dataset.split("val"),
        compute_loss=_distillation_loss(context, teacher, len(class_names)),
        parameters=given,
        preprocessing=Preprocessing(context.parameters.start.image_size),
        transfer=transfer,
        phases=_phases(given, sets),
    )
    result = run_training(context, task)
    remove_feature_adapters(network)
    lineage = merge_lineage(lineage, teacher_metadata.lineage, *_dataset_lineages(context))
    write_checkpoint(context, network, class_names, result.total_steps, lineage)
    pseudo_boxes = sum(int(images.box_counts.sum()) for images in sets[1:])
    return {**training_summary(result, len(task.training_set), transfer), "pseudo_boxes": pseudo_boxes}


def _pseudo_labelled(context: StepContext) -> list[ImageSet]:
    """The unlabelled images that got a pseudo-box, with the boxes' weights; none where no such set was given."""
    import numpy as np

    from model.data.tables import read_dataset

    given = context.parameters.distill
    if is_absent(context.inputs["pseudo_labels"]):
        return []
    images = read_dataset(context.inputs["pseudo_labels"]).image_set()
    images = images.subset(np.flatnonzero(images.box_counts > 0))
    scores = images.all_boxes().scores if given.pseudo_weight == "score" else np.float32(1)
    return [images.with_scores(scores * np.float32(given.pseudo_factor))] if len(images) else []


def _phases(given: DistillParameters, sets: list[ImageSet]) -> Phases | None:
    """The order in which labels and pseudo-labels are learned; None for both kinds throughout."""
    from model.data.image_set import concatenate

    if given.pseudo_order == "mixed":
        return None
    if len(sets) == 1:
        log.warning("distill.pseudo_order %s has no effect: there are no pseudo-labels", given.pseudo_order)
        return None
    labelled, pseudo_labelled = sets
    first = pseudo_labelled if given.pseudo_order == "first" else concatenate(sets)
    return Phases(first, labelled, given.pseudo_share)


def _teacher_precision(context: StepContext) -> TeacherPrecision:
    """Where the student computes in bfloat16, the teacher's weights are brought to it once and not at each step."""
    import torch

    from model.precision import resolve

    shared = context.parameters.start
    trained_in = resolve(shared.precision, torch.device(shared.device))
    return "bfloat16" if trained_in == "bfloat16" else context.parameters.distill.teacher_precision


def _dataset_lineages(context: StepContext) -> list[dict[str, Any]]:
    folders = [context.inputs["target"], context.inputs["pseudo_labels"]]
    return [dataset_lineage(folder) for folder in folders if not is_absent(folder)]


def _distillation_loss(context: StepContext, teacher: Teacher, num_classes: int) -> ComputeLoss:
    """Detection loss plus the distillation terms."""
    device = prepare_torch(context.parameters.start)
    return with_teacher(teacher.to(device), num_classes, _config(context.parameters.distill))


def _config(given: DistillParameters) -> DistillationConfig:
    from dataclasses import fields

    from model.distillation import DistillationConfig

    return DistillationConfig(**{field.name: getattr(given, field.name) for field in fields(DistillationConfig)})
