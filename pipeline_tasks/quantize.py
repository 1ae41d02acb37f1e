"""`nasline quantize`: calibration, selective quantization, quantization-aware training."""

from __future__ import annotations

import copy
import csv
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from pipeline_tasks.execution import StepContext
from pipeline_tasks.quantization_search import (
    CALIBRATION_BATCH,
    SENSITIVITY_BATCH,
    Choice,
    Subject,
    choose_layers,
)
from pipeline_tasks.quantize_parameters import QuantizeParameters
from pipeline_tasks.training_task import TrainingTask, open_images, prepare_torch, run_training
from pipeline_tasks.workspace import write_json

if TYPE_CHECKING:
    import torch

    from model.checkpoint import CheckpointMetadata
    from model.data.image_set import ImageSet
    from model.data.tables import Dataset
    from model.quantization.quantize import QuantizationConfig
    from model.yolo_nas import YoloNAS

log = logging.getLogger(__name__)

REPORT = "quantization.json"
AUTO_PERCENTILES = (99.99, 99.999)
FRONTIER_COLUMNS = (
    *("weights", "layers_added", "map50_95", "lost_points"),
    *("predicted", "measured_wall", "measured_cpu", "unit", "published"),
)


@dataclass(frozen=True)
class Stage:
    """A quantized network on the way.

    weights: "ptq", or "qat" once trained. met: whether its validation mAP keeps within the budget. time: of one image,
    to compare stages by; 0 for all where no search asked for it. choice: the search that chose its float layers.
    """

    name: str
    weights: str
    network: YoloNAS
    map50_95: float
    met: bool
    time: float = 0.0
    choice: Choice | None = None

    @property
    def added(self) -> list[str]:
        """Layers that selection left in float."""
        return sorted(self.choice.added) if self.choice else []


def quantize(context: StepContext) -> dict[str, Any]:
    """Quantize the folded student; publish the fastest network within the accuracy budget, else the most accurate.

    PTQ is always measured, then selective quantization searched; training follows when they miss the budget, or when
    asked for. Calibration and sensitivity use training images, choices are made on the validation split: the test
    split stays unseen.
    """
    from model import processes
    from model.quantization.storage import save_quantized

    subject = _subject(context)
    network, observer_errors = _calibrated(subject)
    float_map, int8_map = processes.made_by_first(lambda: (subject.measure(subject.folded), subject.measure(network)))
    log.info("validation mAP50-95: float %.4f, PTQ %.4f", float_map, int8_map)
    ptq = Stage("ptq", "ptq", network, int8_map, _within_budget(subject, float_map, int8_map))
    stages = _with_selection(subject, ptq, float_map)
    stages += _with_training(subject, stages, float_map)
    best = _best(stages)
    summary = _summary(context, float_map, stages, best)
    described = {**summary, "observer_errors": observer_errors}
    report = {**described, "layers_in_float": _write_reports(context, described, stages, best)}
    save_quantized(context.output / "checkpoint", best.network, subject.metadata, report)
    return summary


def _subject(context: StepContext) -> Subject:
    from model.checkpoint import load_checkpoint
    from model.data.tables import read_dataset

    given, shared = context.parameters.quantize, context.parameters.start
    dataset = read_dataset(context.inputs["target"])
    student, metadata = load_checkpoint(context.inputs["student"])
    folded = student.eval().fused_copy().to(prepare_torch(shared))
    calibration, held_aside = _training_images(dataset.split("train"), given, shared.seed)
    measure = _validation_map(context, dataset, metadata)
    return Subject(context, folded, dataset, metadata, calibration, held_aside, measure)


def _validation_map(
    context: StepContext, dataset: Dataset, metadata: CheckpointMetadata
) -> Callable[[torch.nn.Module], float]:
    from model.evaluation import detect, evaluate, torch_predictor

    validation_set, open_image = dataset.split("val"), open_images(context)
    device = prepare_torch(context.parameters.start)

    def measure(network: torch.nn.Module) -> float:
        found = detect(torch_predictor(network.eval(), device), validation_set, open_image, metadata.preprocessing)
        return float(evaluate(found, validation_set).map50_95)

    return measure


def _training_images(training_set: ImageSet, given: QuantizeParameters, seed: int) -> tuple[ImageSet, ImageSet]:
    """Images to calibrate on, and others to measure sensitivity on (the same ones where there are too few)."""
    import numpy as np

    order = np.random.default_rng(seed).permutation(len(training_set))
    calibration, rest = order[: given.calibration_images], order[given.calibration_images :]
    held_aside = rest if len(rest) >= given.sensitivity_images else order
    return training_set.subset(calibration), training_set.subset(held_aside[: given.sensitivity_images])


def _calibrated(subject: Subject) -> tuple[YoloNAS, dict[str, float]]:
    """The quantized network with the asked for or best ranges, and the error of each way to choose them where several
    were tried. Each process calibrates on its share, and all get the same answer.
    """
    from model.quantization.bias_correction import correct_biases
    from model.quantization.quantize import float_layers, quantize, quantized_layers
    from model.quantization.sensitivity import quantization_errors

    given = subject.context.parameters.quantize
    networks = {}
    for name, config in _configs(given).items():
        networks[name] = quantize(subject.folded, subject.batches(subject.calibration, CALIBRATION_BATCH), config)
        if given.bias_correction:
            correct_biases(networks[name], subject.batches(subject.calibration, CALIBRATION_BATCH))
    if len(networks) == 1:
        return next(iter(networks.values())), {}
    errors = {}
    for name, network in networks.items():
        int8 = [layer for layer in quantized_layers(network) if layer not in float_layers(network)]
        batches = subject.batches(subject.held_aside, SENSITIVITY_BATCH)
        (errors[name],) = quantization_errors(network, batches, [int8])
    best = min(errors, key=lambda name: errors[name])
    told = ", ".join(f"{name} {error:.4f}" for name, error in errors.items())
    log.info("ranges by %s; errors on confident predictions: %s", best, told)
    return networks[best], errors


def _configs(given: QuantizeParameters) -> dict[str, QuantizationConfig]:
    """The ways to choose ranges that are tried."""
    from model.quantization.quantize import CPU_FLOAT_LAYERS, PREDICTION_LAYERS, QuantizationConfig

    by_default = PREDICTION_LAYERS if given.merge_upsampling else CPU_FLOAT_LAYERS
    common = QuantizationConfig(
        float_layers=(*by_default, *given.float_layers), merge_upsampling=given.merge_upsampling
    )
    if given.observer != "auto":
        return {given.observer: replace(common, observer=given.observer, percentile=given.percentile)}
    return {
        "max": replace(common, observer="max"),
        "mse": replace(common, observer="mse"),
        **{f"percentile {p:g}": replace(common, observer="percentile", percentile=p) for p in AUTO_PERCENTILES},
    }


def _within_budget(subject: Subject, float_map: float, value: float) -> bool:
    return value >= float_map - subject.context.parameters.quantize.map_budget / 100


def _with_selection(subject: Subject, stage: Stage, float_map: float) -> list[Stage]:
    """A stage, and what comes of it when the layers that matter most are left in float too."""
    from model.quantization.quantize import float_layers, set_float_layers

    if not subject.context.parameters.quantize.selection_evaluations:
        return [stage]
    choice = choose_layers(subject, stage.network, stage.weights, float_map, stage.map50_95)
    network = copy.deepcopy(stage.network)
    set_float_layers(network, {**float_layers(network), **choice.added})
    name = "selective" if stage.weights == "ptq" else "qat_selective"
    selective = Stage(name, stage.weights, network, choice.map50_95, choice.met, choice.time, choice)
    return [replace(stage, time=choice.time_before), selective]


def _with_training(subject: Subject, stages: list[Stage], float_map: float) -> list[Stage]:
    """Quantization-aware training, when asked for or needed; its own selection, when that still misses the budget.

    It starts from what meets the budget. Where nothing does, it starts from PTQ: training may recover all of it, and
    then no layer has to stay in float.
    """
    mode = subject.context.parameters.quantize.qat
    met = any(stage.met for stage in stages)
    if mode == "never" or (mode == "auto" and met):
        return []
    start = _best(stages) if met else stages[0]
    network = _trained(subject, start.network)
    map50_95 = subject.measure(network)
    log.info("validation mAP50-95: QAT %.4f", map50_95)
    within = _within_budget(subject, float_map, map50_95)
    trained = Stage("qat", "qat", network, map50_95, within, start.time, start.choice)
    return [trained] if within or met else _with_selection(subject, trained, float_map)


def _trained(subject: Subject, network: YoloNAS) -> YoloNAS:
    """A copy after the ordinary training loop, with distillation from the float network."""
    from model.distillation import DistillationConfig
    from pipeline_tasks.distillation_task import with_teacher

    context, metadata = subject.context, subject.metadata
    given = context.parameters.quantize.training
    weight = given.distillation_weight
    config = DistillationConfig(class_logits_weight=weight, box_distribution_weight=weight)
    task = TrainingTask(
        model=copy.deepcopy(network),
        training_set=subject.dataset.split("train"),
        validation_set=subject.dataset.split("val"),
        compute_loss=with_teacher(copy.deepcopy(subject.folded), len(metadata.class_names), config),
        parameters=given,
        preprocessing=metadata.preprocessing,
        reduced_precision=False,
    )
    run_training(context, task)
    return task.model


def _best(stages: list[Stage]) -> Stage:
    """The fastest that meets the budget, of equally fast ones the most accurate; where none does, the most accurate."""
    met = [stage for stage in stages if stage.met]
    if met:
        return min(met, key=lambda stage: (stage.time, -stage.map50_95))
    return max(stages, key=lambda stage: stage.map50_95)


def _summary(context: StepContext, float_map: float, stages: list[Stage], best: Stage) -> dict[str, Any]:
    from model.quantization.quantize import float_layers, quantized_layers

    in_float = len(float_layers(best.network))
    return {
        "float_map50_95": float_map,
        **{f"{stage.name}_map50_95": stage.map50_95 for stage in stages},
        "published": best.name,
        "quantized_layers": len(quantized_layers(best.network)) - in_float,
        "float_layers": in_float,
        "map_budget_points": context.parameters.quantize.map_budget,
        "budget_met": best.met,
    }


def _searched(stages: list[Stage]) -> list[Choice]:
    """The searches that were made, each once."""
    return [stage.choice for stage in stages if stage.choice and stage.name.endswith("selective")]


def _write_reports(
    context: StepContext, summary: dict[str, Any], stages: list[Stage], best: Stage
) -> list[dict[str, Any]]:
    """The step's files; returns the rows of the published network's float layers."""
    from model.quantization.quantize import float_layers

    in_float = float_layers(best.network)
    layers = [row for choice in _searched(stages) for row in choice.layers]
    write_json(context.output / REPORT, {**summary, "float_layer_reasons": in_float})
    write_json(context.output / "sensitivity.json", layers)
    _write_frontier(context, stages, best)
    return _float_rows(in_float, best, layers)


def _float_rows(in_float: dict[str, str], best: Stage, layers: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For engine.json: every float layer, why, and what was measured on it."""
    known = {row["layer"]: row for row in layers if row["weights"] == best.weights} or {
        row["layer"]: row for row in layers
    }
    kept = ("error", "int8_time", "float_time", "unit")
    return [
        {"layer": name, "reason": reason, "chosen_by": "search" if name in best.added else "rule"}
        | {key: known[name][key] for key in kept if name in known}
        for name, reason in in_float.items()
    ]


def _write_frontier(context: StepContext, stages: list[Stage], best: Stage) -> None:
    """All choices that were measured, as JSON, table and picture."""
    from model.quantization.frontier_plot import draw_frontier

    rows = [row for choice in _searched(stages) for row in choice.frontier]
    rows = [row for index, row in enumerate(rows) if index == 0 or row["weights"] != "float"]
    if not rows:
        return
    for stage in stages:
        if stage.name == "qat":
            rows += _trained_rows(stage, rows)
    for row in rows:
        row["published"] = (row["weights"], row["added"]) == (best.weights, best.added)
    write_json(context.output / "frontier.json", rows)
    with (context.output / "frontier.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, FRONTIER_COLUMNS, extrasaction="ignore")
        writer.writeheader()
        writer.writerows({**row, "layers_added": len(row["added"])} for row in rows)
    draw_frontier(rows, context.parameters.quantize.map_budget, context.output / "plots" / "frontier.png")


def _trained_rows(stage: Stage, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The trained network takes the time of the one it was trained from."""
    if any(row["weights"] == "qat" and row["added"] == stage.added for row in rows):
        return []
    lost = 100 * (rows[0]["map50_95"] - stage.map50_95)
    twin = next(row for row in rows if row["weights"] == "ptq" and row["added"] == stage.added)
    return [{**twin, "weights": "qat", "map50_95": stage.map50_95, "lost_points": lost}]
