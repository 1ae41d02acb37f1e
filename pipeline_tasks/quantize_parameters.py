"""The parameters of the step `quantize`."""

from __future__ import annotations

from typing import Literal

from pipeline_tasks.schema import Section, parameter
from pipeline_tasks.training_parameters import TrainingParameters


class QuantizationTrainingParameters(TrainingParameters):
    """The quantization-aware training loop: a short one with a small learning rate."""

    epochs: int = parameter(3, "Passes over the training images", unit="epochs", ge=1, le=1000)
    learning_rate: float = parameter(2e-5, "Peak learning rate of AdamW", gt=0, le=1)
    warmup_steps: int = parameter(20, "Optimiser steps of linear warm-up", unit="steps", ge=0)
    mosaic: float = parameter(0.0, "Probability of joining four images into one", ge=0, le=1)
    distillation_weight: float = parameter(1.0, "Weight of distillation from the float network", ge=0)


class QuantizeParameters(Section):
    """Calibration, choice of the float layers, and quantization-aware training."""

    calibration_images: int = parameter(256, "Training images the ranges are measured on", unit="images", ge=1)
    observer: Literal["auto", "max", "percentile", "mse"] = parameter(
        "auto", "How activation ranges are chosen; auto tries max, mse and the percentiles 99.99 and 99.999, and takes "
        "the one with the least error on confident predictions on the sensitivity images",
    )  # fmt: skip
    percentile: float = parameter(
        99.99, "Share of activations inside the range, with observer percentile", unit="percent", gt=50, le=100
    )
    sensitivity_images: int = parameter(64, "Training images the layer sensitivity is measured on", ge=1)
    float_layers: list[str] = parameter(
        [], "More layers to leave in float, as patterns of names such as backbone.stem*"
    )
    bias_correction: bool = parameter(
        True, "Take off each layer's bias what rounding shifts the mean of its output by, on the calibration images"
    )
    merge_upsampling: bool = parameter(
        True, "Merge the neck's transposed convolutions with the 1x1 convolutions behind them, so that both run in INT8"
    )
    maximum_float_share: float = parameter(
        0.15, "Share of the time that INT8 saves that selective quantization may give up; profiled where the gate's "
        "target is cpu, else predicted from multiply-adds",
        ge=0, le=1,
    )  # fmt: skip
    selection_evaluations: int = parameter(
        10, "Most choices of float layers measured on the validation split, PTQ included; 0 leaves selection out",
        ge=0, le=1000,
    )  # fmt: skip
    profile_rounds: int = parameter(
        30, "Timed runs of each form of the engine while layers are profiled; the shortest count", ge=1, le=10000
    )
    map_budget: float = parameter(
        0.5, "mAP that may be lost on the validation split before layers are left in float or QAT is needed",
        unit="points", ge=0, le=100,
    )  # fmt: skip
    qat: Literal["auto", "always", "never"] = parameter(
        "auto", "Quantization-aware training: when selective quantization misses the budget, always, or never"
    )
    training: QuantizationTrainingParameters = QuantizationTrainingParameters()
