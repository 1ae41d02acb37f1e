"""`nasline distill`: the student learns labels and pseudo-labels, and what the teacher thinks of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pipeline_tasks.distillation_task import add_feature_adapters, remove_feature_adapters, with_teacher
from pipeline_tasks.execution import StepContext
from pipeline_tasks.training_task import (
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
    from model.data.tables import Dataset
    from model.distillation import DistillationConfig
    from model.training_step import ComputeLoss


def distill(context: StepContext) -> dict[str, Any]:
    """Train the student on both label kinds against the frozen teacher; publish its float checkpoint."""
    from model.checkpoint import load_checkpoint
    from model.data.tables import read_dataset
    from model.preprocessing import Preprocessing

    dataset = read_dataset(context.inputs["target"])
    class_names = dataset.metadata.class_names
    training_set, pseudo_boxes = _training_set(context, dataset)
    variant = context.parameters.start.student_variant
    network, lineage = start_network(context, variant, class_names, context.inputs["weights"])
    teacher, teacher_metadata = load_checkpoint(context.inputs["teacher"])
    if context.parameters.distill.feature_weight:
        add_feature_adapters(network, teacher)
    task = TrainingTask(
        model=network,
        training_set=training_set,
        validation_set=dataset.split("val"),
        compute_loss=_distillation_loss(context, teacher, len(class_names)),
        parameters=context.parameters.distill,
        preprocessing=Preprocessing(context.parameters.start.image_size),
    )
    result = run_training(context, task)
    remove_feature_adapters(network)
    lineage = merge_lineage(lineage, teacher_metadata.lineage, *_dataset_lineages(context))
    write_checkpoint(context, network, class_names, result.total_steps, lineage)
    return {**training_summary(result, len(training_set)), "pseudo_boxes": pseudo_boxes}


def _training_set(context: StepContext, dataset: Dataset) -> tuple[ImageSet, int]:
    """Labelled training images, then the unlabelled ones that got a pseudo-box."""
    import numpy as np

    from model.data.image_set import concatenate
    from model.data.tables import read_dataset

    labelled = dataset.split("train")
    if is_absent(context.inputs["pseudo_labels"]):
        return labelled, 0
    pseudo = read_dataset(context.inputs["pseudo_labels"]).image_set()
    with_boxes = pseudo.subset(np.flatnonzero(pseudo.box_counts > 0))
    return concatenate([labelled, with_boxes]), int(pseudo.box_counts.sum())


def _dataset_lineages(context: StepContext) -> list[dict[str, Any]]:
    folders = [context.inputs["target"], context.inputs["pseudo_labels"]]
    return [dataset_lineage(folder) for folder in folders if not is_absent(folder)]


def _distillation_loss(context: StepContext, teacher: Any, num_classes: int) -> ComputeLoss:
    """Detection loss plus the distillation terms."""
    device = prepare_torch(context.parameters.start)
    return with_teacher(teacher.to(device), num_classes, _config(context.parameters.distill))


def _config(given: Any) -> DistillationConfig:
    from model.distillation import DistillationConfig

    return DistillationConfig(
        class_logits_weight=given.class_logits_weight,
        box_distribution_weight=given.box_distribution_weight,
        features_weight=given.feature_weight,
        box_temperature=given.box_temperature,
        foreground_threshold=given.foreground_threshold,
        schedule="cosine",
        final_weight_ratio=given.final_weight_ratio,
    )
