"""`nasline pretrain --role student|teacher`: on the pretraining set (the Objects365 role), from random weights or from
the run's initial checkpoint."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from pipeline_tasks import initial_checkpoint
from pipeline_tasks.execution import StepContext
from pipeline_tasks.training_task import (
    TrainingTask,
    dataset_lineage,
    detection_loss,
    merge_lineage,
    prepare_torch,
    run_training,
    start_network,
    training_summary,
    write_checkpoint,
)
from pipeline_tasks.validate_data import is_absent

log = logging.getLogger(__name__)

RANDOM_WEIGHTS = {"weights": ["random initialisation"], "annotations": [], "images": {}}


def pretrain(context: StepContext) -> dict[str, Any]:
    """Train one network from random weights or from the run's initial checkpoint; without a pretraining set these are
    published as they are, and the summary says so.
    """
    import model
    from model.data.tables import read_dataset
    from model.preprocessing import Preprocessing

    shared = context.parameters.start
    variant = getattr(shared, f"{context.part}_variant")
    prepare_torch(shared)
    initial = _initial_checkpoint(context)
    if context.part == "teacher" and context.parameters.teach.source != "train":
        log.info("nothing to pretrain for a teacher: it is the champion's, as teach.source says")
        write_checkpoint(context, model.build(variant, 1), ("object",), 0, RANDOM_WEIGHTS)
        return {"pretrained": 0}
    if is_absent(context.inputs["pretrain"]):
        return _publish_untrained(context, variant, initial)
    dataset = read_dataset(context.inputs["pretrain"])
    class_names = dataset.metadata.class_names
    if initial:
        network, lineage, transfer = start_network(context, variant, class_names, initial)
    else:
        network, lineage, transfer = model.build(variant, len(class_names)), RANDOM_WEIGHTS, None
    task = TrainingTask(
        model=network,
        training_set=dataset.split("train"),
        validation_set=dataset.split("val") if "val" in dataset.split_names else None,
        compute_loss=detection_loss(len(class_names)),
        parameters=context.parameters.pretrain.of_variant(variant),
        preprocessing=Preprocessing(shared.image_size),
        transfer=transfer,
    )
    result = run_training(context, task)
    lineage = merge_lineage(lineage, dataset_lineage(context.inputs["pretrain"]))
    write_checkpoint(context, task.model, class_names, result.total_steps, lineage)
    return {"pretrained": 1, **training_summary(result, len(task.training_set), transfer)}


def _initial_checkpoint(context: StepContext) -> Path | None:
    """The folder the run was told to begin from, as it was then; None for random weights."""
    folder = context.inputs.get(initial_checkpoint.INPUT)
    if folder is not None:
        initial_checkpoint.require_unchanged(folder, context.input_digests[initial_checkpoint.INPUT])
    return folder


def _publish_untrained(context: StepContext, variant: str, initial: Path | None) -> dict[str, Any]:
    import model
    from model.checkpoint import load_checkpoint

    if initial is None:
        log.warning("no pretraining set was given: %s (%s) starts from random weights", context.part, variant)
        write_checkpoint(context, model.build(variant, 1), ("object",), 0, RANDOM_WEIGHTS)
        return {"pretrained": 0}
    network, metadata = load_checkpoint(initial)
    log.info("no pretraining set was given: %s (%s) starts from %s", context.part, variant, initial)
    write_checkpoint(context, network, metadata.class_names, metadata.step, metadata.lineage)
    return {"pretrained": 0}
