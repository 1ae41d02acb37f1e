"""`nasline teach`: the teacher learns the target set, and its score thresholds are chosen."""

from __future__ import annotations

from typing import Any

from pipeline_tasks.execution import StepContext
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

THRESHOLDS = "thresholds.json"


def teach(context: StepContext) -> dict[str, Any]:
    """Fine-tune the teacher; publish its checkpoint and a pseudo-label threshold per class."""
    from model.data.tables import read_dataset
    from model.preprocessing import Preprocessing

    dataset = read_dataset(context.inputs["target"])
    class_names = dataset.metadata.class_names
    variant = context.parameters.start.teacher_variant
    network, lineage = start_network(context, variant, class_names, context.inputs["weights"])
    task = TrainingTask(
        model=network,
        training_set=dataset.split("train"),
        validation_set=dataset.split("val"),
        compute_loss=detection_loss(len(class_names)),
        parameters=context.parameters.teach,
        preprocessing=Preprocessing(context.parameters.start.image_size),
    )
    result = run_training(context, task)
    lineage = merge_lineage(lineage, dataset_lineage(context.inputs["target"]))
    write_checkpoint(context, network, class_names, result.total_steps, lineage)
    quality = _choose_thresholds(context, task)
    return {**training_summary(result, len(task.training_set)), **quality}


def _choose_thresholds(context: StepContext, task: TrainingTask) -> dict[str, Any]:
    """On the validation split, once: shards must not choose their own."""
    from model.evaluation import class_thresholds, detect, pseudo_label_quality, torch_predictor

    assert task.validation_set is not None
    device = prepare_torch(context.parameters.start)
    found = detect(torch_predictor(task.model, device), task.validation_set, open_images(context), task.preprocessing)
    given = context.parameters.teach
    chosen = class_thresholds(found, task.validation_set, minimum_precision=given.minimum_precision)
    thresholds = {name: max(value, given.minimum_threshold) for name, value in chosen.items()}
    quality = pseudo_label_quality(found, task.validation_set, thresholds).to_json()
    content = {"thresholds": thresholds, "validation_quality": quality}
    write_json(context.output / THRESHOLDS, content)
    return {f"threshold_{name}": quality[name] for name in ("precision", "recall") if quality[name] is not None}
