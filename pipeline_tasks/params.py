"""The parameters of a pipeline run: one section per step, each field with its meaning, unit and limits.

These models are the only description of the parameters. The command line's options, the Airflow trigger form and
the checks of `nasline start` are made from them. Nothing heavier than pydantic is imported, since a DAG file reads
this module.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model
from pydantic.fields import FieldInfo

from pipeline_tasks.errors import DataError, ParameterError

Variant = Literal["pico", "t", "n", "s", "m", "l"]


def parameter(
    default: Any,
    meaning: str,
    *,
    unit: str = "",
    main: bool = False,
    in_key: bool = True,
    **limits: Any,
) -> Any:
    """A field of a section.

    `main` puts it in the open part of the trigger form. `in_key=False` marks what cannot change a step's result
    (how fast or where it is computed), so that changing it does not make finished work be done again.
    """
    extra: dict[str, Any] = {"unit": unit, "main": main, "in_key": in_key}
    description = f"{meaning} [{unit}]" if unit else meaning
    return Field(default, description=description, json_schema_extra=extra, **limits)


class Section(BaseModel):
    """Base of all sections: immutable, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class StartParameters(Section):
    """What all steps share."""

    dataset: str = parameter(
        "", "Folder of the labelled target set in COCO layout (images/, annotations/instances_{train,val,test}.json)",
        main=True, in_key=False,
    )  # fmt: skip
    pretrain_dataset: str | None = parameter(
        None, "Folder of the labelled pretraining set in COCO layout; empty: start from random weights",
        main=True, in_key=False,
    )  # fmt: skip
    unlabeled_dataset: str | None = parameter(
        None, "Folder of unlabelled images (images/); empty: no pseudo-labels", main=True, in_key=False
    )
    student_variant: Variant = parameter("s", "Network that becomes the engine", main=True)
    teacher_variant: Variant = parameter("m", "Network that teaches and pseudo-labels", main=True)
    image_size: int = parameter(
        640, "Side of the square network input, a multiple of 32",
        unit="pixels", main=True, ge=64, le=2048, multiple_of=32,
    )  # fmt: skip
    seed: int = parameter(0, "Seed of every random draw", ge=0, le=2**31 - 1)
    model_name: str = parameter(
        "yolo_nas", "Name of the registered model", main=True, in_key=False, pattern=r"^[A-Za-z0-9_.-]{1,100}$"
    )
    experiment: str = parameter("nasline", "MLflow experiment the runs are logged to", in_key=False, min_length=1)
    from_champion: bool = parameter(
        False, "Start from the registered champion's weights instead of pretraining", in_key=False
    )
    device: str = parameter(
        "cpu", "Where networks are trained: cpu, cuda or cuda:N", in_key=False, pattern=r"^(cpu|cuda(:\d+)?)$"
    )
    precision: Literal["float32", "bfloat16"] = parameter(
        "float32", "Arithmetic of training; bfloat16 saves time on devices that have it (quantization stays float32)"
    )
    threads: int = parameter(0, "CPU threads per process; 0 takes every core", in_key=False, ge=0, le=1024)
    loader_workers: int = parameter(0, "Processes that decode and augment images", in_key=False, ge=0, le=256)
    cache_megabytes: int = parameter(
        1024, "Memory for decoded images; 0 decodes every time", unit="MB", in_key=False, ge=0
    )


class ValidateDataParameters(Section):
    """Limits of the data validation."""

    maximum_bad_image_fraction: float = parameter(
        0.01, "Share of a set's images that may be quarantined before the step stops", ge=0, le=1
    )
    maximum_bad_box_fraction: float = parameter(
        0.01, "Share of a set's boxes that may be quarantined before the step stops", ge=0, le=1
    )
    box_tolerance_pixels: float = parameter(
        1.0, "How far a box may reach over the image border; it is clipped", unit="pixels", ge=0
    )


class TrainingParameters(Section):
    """Settings of one training loop."""

    epochs: int = parameter(50, "Passes over the training images", unit="epochs", ge=1, le=10000)
    budget_minutes: float | None = parameter(
        None, "Wall-clock budget; turned into optimiser steps once, after a measured warm-up, instead of epochs",
        unit="minutes", gt=0,
    )  # fmt: skip
    batch_size: int = parameter(16, "Images per optimiser step", unit="images", ge=1, le=4096)
    learning_rate: float = parameter(5e-4, "Peak learning rate of AdamW", gt=0, le=1)
    final_learning_rate_ratio: float = parameter(0.1, "Last learning rate over the peak (cosine)", gt=0, le=1)
    weight_decay: float = parameter(1e-4, "AdamW weight decay of kernels", ge=0, le=1)
    warmup_steps: int = parameter(100, "Optimiser steps of linear warm-up", unit="steps", ge=0)
    ema_decay: float = parameter(0.9997, "Decay of the exponential moving average of the weights", ge=0, lt=1)
    gradient_clip_norm: float | None = parameter(10.0, "Gradients are scaled down to this norm; empty: never", gt=0)
    mosaic: float = parameter(0.5, "Probability of joining four images into one", ge=0, le=1)
    mixup: float = parameter(0.0, "Probability of blending two images", ge=0, le=1)
    flip: float = parameter(0.5, "Probability of a left-right flip (0 for text or digits)", ge=0, le=1)
    scale: float = parameter(0.5, "Random zoom: factor within 1 ± scale", ge=0, lt=1)
    translate: float = parameter(0.1, "Random shift as a share of the image side", ge=0, lt=1)
    rotate_degrees: float = parameter(0.0, "Random rotation within ± this angle", unit="degrees", ge=0, le=180)
    color_jitter: float = parameter(1.0, "Strength of hue, saturation and value jitter; 0 is none", ge=0, le=3)
    close_mosaic_epochs: int = parameter(5, "Last epochs without mosaic and mixup", unit="epochs", ge=0)
    evaluate_every_epochs: int = parameter(1, "Epochs between two evaluations on the validation split", ge=1)
    checkpoint_every_steps: int = parameter(
        200, "Optimiser steps between two checkpoints", unit="steps", in_key=False, ge=1
    )


class PretrainParameters(TrainingParameters):
    """Training from random weights on the pretraining set."""


class TeachParameters(TrainingParameters):
    """Fine-tuning of the teacher on the target set."""

    minimum_precision: float = parameter(
        0.7, "Precision on the validation split that a class's pseudo-label threshold must reach", ge=0, le=1
    )
    minimum_threshold: float = parameter(0.3, "Lowest score a pseudo-label threshold may take", ge=0, le=1)


class PseudoLabelParameters(Section):
    """Labelling of the unlabelled images by the teacher."""

    shards: int = parameter(
        2, "Parts the unlabelled images are labelled in, one task each", in_key=False, ge=1, le=1000
    )
    batch_size: int = parameter(16, "Images per forward pass", unit="images", ge=1)
    threshold_offset: float = parameter(0.0, "Added to every class's threshold chosen by teach", ge=-1, le=1)


class DistillParameters(TrainingParameters):
    """Training of the student on labels and pseudo-labels against the teacher."""

    epochs: int = parameter(
        50, "Passes over labelled and pseudo-labelled images", unit="epochs", main=True, ge=1, le=10000
    )
    class_logits_weight: float = parameter(1.0, "Weight of the class-logit term", ge=0)
    box_distribution_weight: float = parameter(0.5, "Weight of the box-distribution (DFL) term", ge=0)
    feature_weight: float = parameter(0.0, "Weight of the neck-feature term; 0 leaves it out", ge=0)
    box_temperature: float = parameter(10.0, "Softening of the box distributions", gt=0, le=100)
    foreground_threshold: float = parameter(
        0.1, "Best teacher score from which an anchor counts as foreground", ge=0, le=1
    )
    final_weight_ratio: float = parameter(
        0.1, "Share of the distillation weights left at the last step (cosine)", ge=0, le=1
    )


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
    observer: Literal["max", "percentile", "mse"] = parameter("percentile", "How activation ranges are chosen")
    percentile: float = parameter(99.99, "Share of activations inside the range", unit="percent", gt=50, le=100)
    sensitivity_images: int = parameter(64, "Training images the layer sensitivity is measured on", ge=1)
    float_layers: list[str] = parameter(
        [], "More layers to leave in float, as patterns of names such as backbone.stem*"
    )
    maximum_float_share: float = parameter(
        0.15, "Share of the multiply-adds that selective quantization may leave in float", ge=0, le=1
    )
    map_budget: float = parameter(
        0.5, "mAP that may be lost on the validation split before layers are left in float or QAT is needed",
        unit="points", ge=0, le=100,
    )  # fmt: skip
    qat: Literal["auto", "always", "never"] = parameter(
        "auto", "Quantization-aware training: when selective quantization misses the budget, always, or never"
    )
    training: QuantizationTrainingParameters = QuantizationTrainingParameters()


class ExportParameters(Section):
    """ONNX export and its comparison with the torch network."""

    comparison_images: int = parameter(16, "Validation images both are compared on", unit="images", ge=1)
    maximum_box_error_pixels: float = parameter(
        0.3, "Mean box difference to the torch network allowed on confident anchors", unit="pixels", gt=0
    )


class GateParameters(Section):
    """The rules an engine must pass; an empty limit switches its rule off."""

    target: Literal["cpu"] = parameter("cpu", "Device the engine is built for and measured on")
    runtime: Literal["openvino", "onnxruntime"] = parameter("openvino", "Runtime on the target")
    minimum_map: float | None = parameter(
        0.2, "Lowest mAP50-95 of the INT8 engine on the test split", main=True, ge=0, le=1
    )
    maximum_map_drop: float | None = parameter(
        1.0, "Most mAP50-95 the INT8 engine may lose against the float engine", unit="points", main=True, ge=0, le=100
    )
    maximum_latency_ms: float | None = parameter(
        None, "Budget for the INT8 engine's median latency on the target", unit="ms", main=True, gt=0
    )
    minimum_speedup: float | None = parameter(None, "Least float over INT8 latency (minima, which noise spares)", gt=0)
    champion_margin: float | None = parameter(
        0.5, "mAP50-95 by which the engine may be worse than the champion on today's clean test images",
        unit="points", ge=0, le=100,
    )  # fmt: skip
    allow_removed_classes: bool = parameter(False, "Accept an engine that lacks a class of the champion")
    minimum_comparison_images: int = parameter(10, "Fewest clean test images a champion comparison needs", ge=1)
    maximum_size_megabytes: float | None = parameter(None, "Largest INT8 ONNX file", unit="MB", gt=0)
    require_image_licence: list[str] | None = parameter(
        None, "Accepted licences of the images, by name as in the dataset; empty accepts all"
    )
    require_annotation_licence: list[str] | None = parameter(
        None, "Accepted licences of the annotations; empty accepts all"
    )
    require_weights_licence: list[str] | None = parameter(
        None, "Accepted origins of the weights, such as 'random initialisation'; empty accepts all"
    )
    latency_threads: int = parameter(0, "Threads of the measured engines; 0 takes every core", ge=0, le=1024)
    latency_repeats: int = parameter(200, "Timed runs per engine, interleaved", ge=10, le=100000)
    maximum_box_error_pixels: float | None = parameter(
        0.5, "Mean box difference of the built INT8 engine to the exported file run literally, on confident anchors",
        unit="pixels", gt=0,
    )  # fmt: skip
    maximum_spread: float = parameter(
        0.5, "Largest (p90 - min) / min of a latency measurement before it is repeated, then refused", gt=0
    )


class RegisterParameters(Section):
    """Registration of the accepted engine."""

    promote: bool = parameter(True, "Move the alias champion to an accepted engine; else only candidate")


class Parameters(Section):
    """All sections, in the order of the steps."""

    start: StartParameters = StartParameters()
    validate_data: ValidateDataParameters = ValidateDataParameters()
    pretrain: PretrainParameters = PretrainParameters()
    teach: TeachParameters = TeachParameters()
    pseudo_label: PseudoLabelParameters = PseudoLabelParameters()
    distill: DistillParameters = DistillParameters()
    quantize: QuantizeParameters = QuantizeParameters()
    export: ExportParameters = ExportParameters()
    gate: GateParameters = GateParameters()
    register_: RegisterParameters = Field(default=RegisterParameters(), alias="register")

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=False)

    def section(self, name: str) -> Section:
        """The section of a step."""
        value = getattr(self, "register_" if name == "register" else name)
        assert isinstance(value, Section)
        return value

    def to_json(self) -> dict[str, Any]:
        """Sections and fields as plain JSON values."""
        return self.model_dump(mode="json", by_alias=True)


@dataclass(frozen=True)
class FormField:
    """One parameter as JSON schema, for the trigger form and the command line."""

    key: str
    schema: dict[str, Any]
    section: str | None


def form_fields() -> list[FormField]:
    """Every parameter as `section.field`; the main ones have no section of their own in the form."""
    return [_form_field(key, field) for key, field in _leaves(Parameters, "")]


def _leaves(model: type[BaseModel], prefix: str) -> list[tuple[str, FieldInfo]]:
    leaves = []
    for name, field in model.model_fields.items():
        key = prefix + (field.alias or name)
        nested = field.annotation
        if isinstance(nested, type) and issubclass(nested, BaseModel):
            leaves += _leaves(nested, key + ".")
        else:
            leaves.append((key, field))
    return leaves


def _form_field(key: str, field: FieldInfo) -> FormField:
    annotation: Any = field.annotation
    holder = create_model("Holder", value=(annotation, field))
    schema = dict(holder.model_json_schema()["properties"]["value"])
    extra = {name: schema.pop(name, None) for name in ("unit", "main", "in_key")}
    schema["title"] = key
    section = None if extra["main"] else key.rsplit(".", 1)[0]
    return FormField(key, _flatten_optional(schema), section)


def _flatten_optional(schema: dict[str, Any]) -> dict[str, Any]:
    """`anyOf: [X, null]` as `type: [X, null]`, the form Airflow draws as an optional field."""
    choices = schema.pop("anyOf", None)
    if not choices:
        return schema
    (value,) = [choice for choice in choices if choice.get("type") != "null"]
    return {**schema, **value, "type": ["null", value["type"]]}


def resolve(parameter_file: Path | None, options: dict[str, Any]) -> Parameters:
    """Defaults, overridden by the file, overridden by options (`section.field` to value), validated.

    Raises:
        DataError: the file is missing or is no YAML mapping.
        ParameterError: an unknown name or a value out of range; the sentence names field, value and limit.
    """
    merged = _read_parameter_file(parameter_file) if parameter_file else {}
    for key, value in options.items():
        _set(merged, key, value)
    source = str(parameter_file) if parameter_file else "options"
    try:
        return Parameters.model_validate(merged)
    except ValidationError as error:
        raise ParameterError(_sentence(error, source, options)) from None


def _read_parameter_file(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"parameter file {path} does not exist; give --params FILE or leave it out") from None
    except yaml.YAMLError as error:
        raise DataError(f"parameter file {path} is not valid YAML: {' '.join(str(error).split())}") from None
    if content is not None and not isinstance(content, dict):
        raise DataError(f"parameter file {path} must hold one section per step, found {type(content).__name__}")
    return {name: dict(values) if isinstance(values, dict) else values for name, values in (content or {}).items()}


def _set(merged: dict[str, Any], key: str, value: Any) -> None:
    *sections, field = key.split(".")
    target = merged
    for section in sections:
        inner = target.get(section)
        target[section] = dict(inner) if isinstance(inner, dict) else {}
        target = target[section]
    target[field] = value


def _sentence(error: ValidationError, source: str, options: dict[str, Any]) -> str:
    """All faults as one sentence: where, which field, what is wrong, what was given."""
    faults = []
    for fault in error.errors(include_url=False):
        key = ".".join(str(part) for part in fault["loc"])
        origin = "option" if key in options else source
        if fault["type"] == "extra_forbidden":
            faults.append(f"{origin}: {key} is no known parameter{_suggestion(key)}")
        else:
            faults.append(f"{origin}: {key}: {_lower(fault['msg'])}, got {json.dumps(fault['input'], default=str)}")
    return "; ".join(faults)


def _suggestion(key: str) -> str:
    import difflib

    known = [name for name, _ in _leaves(Parameters, "")] + list(Parameters().to_json())
    close = difflib.get_close_matches(key, known, n=1)
    return f"; did you mean {close[0]}?" if close else "; `nasline start --help` lists them"


def _lower(message: str) -> str:
    return message[:1].lower() + message[1:]
