"""`nasline pretrain --role student|teacher`: from random weights on the pretraining set (the Objects365 role)."""

from __future__ import annotations

import logging
from typing import Any

from pipeline_tasks.execution import StepContext
from pipeline_tasks.training_task import (
    TrainingTask,
    dataset_lineage,
    detection_loss,
    prepare_torch,
    run_training,
    training_summary,
    write_checkpoint,
)
from pipeline_tasks.validate_data import is_absent

log = logging.getLogger(__name__)

RANDOM_WEIGHTS = {"weights": ["random initialisation"], "annotations": [], "images": {}}


def pretrain(context: StepContext) -> dict[str, Any]:
    """Train one network; without a pretraining set its random weights are published, and the summary says so."""
    import model
    from model.data.tables import read_dataset
    from model.preprocessing import Preprocessing

    shared = context.parameters.start
    variant = getattr(shared, f"{context.part}_variant")
    prepare_torch(shared)
    if is_absent(context.inputs["pretrain"]):
        log.warning("no pretraining set was given: %s (%s) starts from random weights", context.part, variant)
        write_checkpoint(context, model.build(variant, 1), ("object",), 0, RANDOM_WEIGHTS)
        return {"pretrained": 0}
    dataset = read_dataset(context.inputs["pretrain"])
    class_names = dataset.metadata.class_names
    task = TrainingTask(
        model=model.build(variant, len(class_names)),
        training_set=dataset.split("train"),
        validation_set=dataset.split("val") if "val" in dataset.split_names else None,
        compute_loss=detection_loss(len(class_names)),
        parameters=context.parameters.pretrain,
        preprocessing=Preprocessing(shared.image_size),
    )
    result = run_training(context, task)
    lineage = {**dataset_lineage(context.inputs["pretrain"]), "weights": RANDOM_WEIGHTS["weights"]}
    write_checkpoint(context, task.model, class_names, result.total_steps, lineage)
    return {"pretrained": 1, **training_summary(result, len(task.training_set))}
