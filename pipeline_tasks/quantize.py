"""`nasline quantize`: calibration, selective quantization, quantization-aware training."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipeline_tasks.execution import StepContext
from pipeline_tasks.params import QuantizeParameters
from pipeline_tasks.training_task import TrainingTask, open_images, prepare_torch, run_training
from pipeline_tasks.workspace import write_json

if TYPE_CHECKING:
    import torch

    from model.checkpoint import CheckpointMetadata
    from model.data.image_set import ImageSet
    from model.data.tables import Dataset
    from model.quantization.sensitivity import LayerSensitivity
    from model.yolo_nas import YoloNAS

log = logging.getLogger(__name__)

REPORT = "quantization.json"
Measure = Callable[["torch.nn.Module"], float]


@dataclass(frozen=True)
class Stage:
    """A quantized network on the way, with its validation mAP."""

    name: str
    network: YoloNAS
    map50_95: float


def quantize(context: StepContext) -> dict[str, Any]:
    """Quantize the folded student; publish the network that keeps the most accuracy within the rules.

    PTQ is always measured, then selective quantization; training follows when the budget asks for it. Calibration
    and sensitivity use training images, choices are made on the validation split: the test split stays unseen.
    """
    from model.checkpoint import load_checkpoint
    from model.data.tables import read_dataset
    from model.quantization.storage import save_quantized

    dataset = read_dataset(context.inputs["target"])
    student, metadata = load_checkpoint(context.inputs["student"])
    folded = student.eval().fused_copy().to(prepare_torch(context.parameters.start))
    measure = _validation_map(context, dataset, metadata)
    float_map = measure(folded)
    given = context.parameters.quantize
    ptq, selective = _without_training(context, folded, dataset, metadata, measure, float_map)
    chosen = selective if given.map_budget / 100 < float_map - ptq.map50_95 else ptq
    trained = _train(context, chosen, folded, dataset, metadata, measure, float_map)
    best = max((chosen, trained), key=lambda stage: stage.map50_95) if trained else chosen
    save_quantized(context.output / "checkpoint", best.network, metadata)
    return _report(context, float_map, [ptq, selective, *([trained] if trained else [])], best)


def _validation_map(context: StepContext, dataset: Dataset, metadata: CheckpointMetadata) -> Measure:
    from model.evaluation import detect, evaluate, torch_predictor

    validation_set, open_image = dataset.split("val"), open_images(context)
    device = prepare_torch(context.parameters.start)

    def measure(network: torch.nn.Module) -> float:
        found = detect(torch_predictor(network.eval(), device), validation_set, open_image, metadata.preprocessing)
        return float(evaluate(found, validation_set).map50_95)

    return measure


def _without_training(
    context: StepContext,
    folded: YoloNAS,
    dataset: Dataset,
    metadata: CheckpointMetadata,
    measure: Measure,
    float_map: float,
) -> tuple[Stage, Stage]:
    """Post-training quantization, and the same with the most sensitive layers left in float."""
    from model.quantization.quantize import CPU_FLOAT_LAYERS, QuantizationConfig, quantize

    given = context.parameters.quantize
    calibration, held_aside = _training_images(dataset.split("train"), given, context.parameters.start.seed)
    in_float = (*CPU_FLOAT_LAYERS, *given.float_layers)
    config = QuantizationConfig(observer=given.observer, percentile=given.percentile, float_layers=in_float)
    network = quantize(folded, _batches(context, calibration, metadata), config)
    ptq = Stage("ptq", network, measure(network))
    log.info("validation mAP50-95: float %.4f, PTQ %.4f", float_map, ptq.map50_95)
    selective = _select_float_layers(context, ptq, held_aside, metadata, measure, float_map)
    return ptq, selective


def _training_images(training_set: ImageSet, given: QuantizeParameters, seed: int) -> tuple[ImageSet, ImageSet]:
    """Images to calibrate on, and others to measure sensitivity on (the same ones where there are too few)."""
    import numpy as np

    order = np.random.default_rng(seed).permutation(len(training_set))
    calibration, rest = order[: given.calibration_images], order[given.calibration_images :]
    held_aside = rest if len(rest) >= given.sensitivity_images else order
    return training_set.subset(calibration), training_set.subset(held_aside[: given.sensitivity_images])


def _batches(context: StepContext, images: ImageSet, metadata: CheckpointMetadata) -> Iterator[torch.Tensor]:
    import torch

    from model.data.loader import evaluation_batches

    device = prepare_torch(context.parameters.start)
    for batch, _, _ in evaluation_batches(images, open_images(context), metadata.preprocessing, 16):
        yield torch.from_numpy(batch).to(device).float() / 255


def _select_float_layers(
    context: StepContext,
    ptq: Stage,
    held_aside: ImageSet,
    metadata: CheckpointMetadata,
    measure: Measure,
    float_map: float,
) -> Stage:
    """Leave more and more of the most sensitive layers in float until the budget is met."""
    import copy

    from model.quantization.quantize import float_layers, set_float_layers
    from model.quantization.sensitivity import choose_float_layers, layer_sensitivity, multiply_add_shares

    given = context.parameters.quantize
    sensitivities = layer_sensitivity(ptq.network, list(_batches(context, held_aside, metadata)))
    shares = multiply_add_shares(ptq.network, metadata.preprocessing.input_size)
    _write_sensitivities(context, sensitivities, shares)
    stage = ptq
    for share in (given.maximum_float_share / 3, given.maximum_float_share):
        network = copy.deepcopy(ptq.network)
        chosen = choose_float_layers(sensitivities, shares, share)
        set_float_layers(network, {**float_layers(network), **chosen})
        stage = Stage("selective", network, measure(network))
        log.info("validation mAP50-95: selective, %d more layers in float, %.4f", len(chosen), stage.map50_95)
        if float_map - stage.map50_95 <= given.map_budget / 100:
            break
    return stage


def _write_sensitivities(context: StepContext, sensitivities: list[LayerSensitivity], shares: dict[str, float]) -> None:
    rows = [{"layer": s.name, "error": s.error, "multiply_add_share": shares[s.name]} for s in sensitivities]
    write_json(context.output / "sensitivity.json", rows)


def _train(
    context: StepContext,
    chosen: Stage,
    folded: YoloNAS,
    dataset: Dataset,
    metadata: CheckpointMetadata,
    measure: Measure,
    float_map: float,
) -> Stage | None:
    """Quantization-aware training with distillation from the float network, when asked for or needed."""
    import copy

    from model.distillation import DistillationConfig
    from pipeline_tasks.distillation_task import with_teacher

    given = context.parameters.quantize
    misses = float_map - chosen.map50_95 > given.map_budget / 100
    if given.qat == "never" or (given.qat == "auto" and not misses):
        return None
    weight = given.training.distillation_weight
    config = DistillationConfig(class_logits_weight=weight, box_distribution_weight=weight)
    network = copy.deepcopy(chosen.network)
    task = TrainingTask(
        model=network,
        training_set=dataset.split("train"),
        validation_set=dataset.split("val"),
        compute_loss=with_teacher(copy.deepcopy(folded), len(metadata.class_names), config),
        parameters=given.training,
        preprocessing=metadata.preprocessing,
        reduced_precision=False,
    )
    run_training(context, task)
    stage = Stage("qat", network, measure(network))
    log.info("validation mAP50-95: QAT %.4f", stage.map50_95)
    return stage


def _report(context: StepContext, float_map: float, stages: list[Stage], best: Stage) -> dict[str, Any]:
    from model.quantization.quantize import float_layers, precision_per_layer

    in_float = float_layers(best.network)
    quantized = len(precision_per_layer(best.network)) - len(in_float)
    precision = {"published": best.name, "quantized_layers": quantized, "float_layers": len(in_float)}
    maps = {"float_map50_95": float_map, **{f"{stage.name}_map50_95": stage.map50_95 for stage in stages}}
    write_json(context.output / REPORT, {**maps, **precision, "float_layer_reasons": in_float})
    return {**maps, **precision}
