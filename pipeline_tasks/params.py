"""The parameters of a pipeline run: one section per step, each field with its meaning, unit and limits.

These models are the only description of the parameters. The command line's options, the Airflow trigger form and
the checks of `nasline start` are made from them. Nothing heavier than pydantic is imported, since a DAG file reads
this module.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pipeline_tasks.errors import DataError, ParameterError
from pipeline_tasks.export_parameters import ExportParameters
from pipeline_tasks.gate_parameters import GateParameters
from pipeline_tasks.quantize_parameters import QuantizeParameters
from pipeline_tasks.schema import Section, parameter
from pipeline_tasks.training_parameters import TrainingParameters
from pipeline_tasks.validation_parameters import ValidateDataParameters

Variant = Literal["pico", "t", "n", "s", "m", "l"]


class StartParameters(Section):
    """What all steps share."""

    dataset: str = parameter(
        "", "Folder of the target set: COCO (annotations/instances_{train,val,test}.json), VOC, YOLO or Objects365",
        main=True, in_key=False,
    )  # fmt: skip
    pretrain_dataset: str | None = parameter(
        None, "Folder of the labelled pretraining set, in any of these forms; empty: start from random weights",
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
    initial_checkpoint: str | None = parameter(
        None, "Checkpoint folder that the network of its variant starts from, student or teacher; "
        "empty: random weights",
        in_key=False,
    )  # fmt: skip
    device: str = parameter(
        "cpu", "Where networks are trained: cpu, cuda or cuda:N", in_key=False, pattern=r"^(cpu|cuda(:\d+)?)$"
    )
    precision: Literal["auto", "float32", "bfloat16"] = parameter(
        "auto", "Arithmetic of training (quantization stays float32); auto: bfloat16 on CPUs and GPUs with "
        "instructions for it, which saves a fifth to a half of the time there, float32 elsewhere"
    )  # fmt: skip
    processes: int = parameter(
        1, "Training processes on one machine, which share each batch; with cuda each has a device", in_key=False,
        ge=1, le=64,
    )  # fmt: skip
    threads: int = parameter(0, "CPU threads per process; 0 takes every core", in_key=False, ge=0, le=1024)
    loader_workers: int = parameter(0, "Processes that decode and augment images", in_key=False, ge=0, le=256)
    cache_megabytes: int = parameter(
        1024, "Memory for decoded images; 0 decodes every time", unit="MB", in_key=False, ge=0
    )
    estimate_steps: int | None = parameter(
        20, "Optimiser steps of each training that the first task in Airflow measures for its estimate; 0: only "
        "images, steps and disk; empty: no estimate",
        unit="steps", in_key=False, ge=0, le=1000,
    )  # fmt: skip
    reduced_decoding: bool = parameter(
        False, "Decode JPEGs of at least twice the size that training needs at a half, a quarter or an eighth: takes "
        "less time, pixels differ slightly from those that evaluation sees",
    )  # fmt: skip


def _epochs_of(variant: str) -> Any:
    return parameter(None, f"Epochs of variant {variant}; empty: `epochs`", unit="epochs", ge=1, le=10000)


class VariantEpochs(Section):
    """Variants that pretrain for a time of their own: small networks learn less from an image."""

    t: int | None = _epochs_of("T")
    n: int | None = _epochs_of("N")
    s: int | None = _epochs_of("S")
    m: int | None = _epochs_of("M")
    l: int | None = _epochs_of("L")  # noqa: E741  the variant's name


class PretrainParameters(TrainingParameters):
    """Training from random weights on the pretraining set."""

    epochs_by_variant: VariantEpochs = VariantEpochs()

    def of_variant(self, variant: Variant) -> PretrainParameters:
        """The same with the variant's own number of epochs."""
        return self.model_copy(update={"epochs": getattr(self.epochs_by_variant, variant, None) or self.epochs})


class TeachParameters(TrainingParameters):
    """The teacher: fine-tuned on the target set or taken as it is, and its pseudo-label thresholds."""

    source: Literal["train", "champion", "champion_teacher"] = parameter(
        "train", "Where the teacher comes from: trained here, or, without training, the registered champion's network "
        "or the network that taught it",
    )  # fmt: skip
    extra_checkpoints: list[str] = parameter(
        [], "More checkpoint folders, of any variant: the average of all of them then teaches and pseudo-labels",
        in_key=False,
    )  # fmt: skip
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
    threshold_offset: float = parameter(
        0.0, "Added to the thresholds chosen by teach, but of classes that are to get no pseudo-labels", ge=-1, le=1
    )
    flip_consistency: Literal["none", "keep", "weight", "average"] = parameter(
        "none", "What the mirrored image decides: nothing; keep boxes found there too; weight scores by the agreement; "
        "or both views are averaged (teach reports what each is worth)",
    )  # fmt: skip
    true_boxes: str | None = parameter(
        None, "COCO file with the true boxes of the unlabelled images, to measure the pseudo-labels; nothing learns it",
        in_key=False,
    )  # fmt: skip


class DistillParameters(TrainingParameters):
    """Training of the student on labels and pseudo-labels against the teacher."""

    epochs: int = parameter(
        50, "Passes over labelled and pseudo-labelled images", unit="epochs", main=True, ge=1, le=10000
    )
    class_logits_weight: float = parameter(1.0, "Weight of the class-logit term", ge=0)
    box_distribution_weight: float = parameter(0.5, "Weight of the box-distribution (DFL) term", ge=0)
    feature_weight: float = parameter(
        0.0, "Weight of the neck-feature term; 1 is the strength published for its kind, 0 leaves it out", ge=0
    )
    feature_kind: Literal["pkd", "pkd_foreground", "cwd"] = parameter(
        "pkd", "How neck features are compared: correlation (arXiv 2207.02039), the same weighted by the teacher's "
        "scores, or channel-wise (arXiv 2011.13256)",
    )  # fmt: skip
    class_temperature: float = parameter(1.0, "Softening of the class probabilities", gt=0, le=100)
    box_temperature: float = parameter(10.0, "Softening of the box distributions", gt=0, le=100)
    feature_temperature: float = parameter(1.0, "Softening of the channels' maps (cwd)", gt=0, le=100)
    foreground_threshold: float = parameter(
        0.1, "Best teacher score from which an anchor counts as foreground", ge=0, le=1
    )
    schedule: Literal["constant", "cosine"] = parameter(
        "cosine", "Distillation weights over the steps: constant, or falling to final_weight_ratio"
    )
    final_weight_ratio: float = parameter(
        0.1, "Share of the distillation weights left at the last step (cosine)", ge=0, le=1
    )
    teacher_share: float = parameter(
        1.0, "Share of the steps with the teacher; those after it learn from labels alone and cost less", ge=0, le=1
    )
    teacher_precision: Literal["as_student", "bfloat16"] = parameter(
        "as_student", "Arithmetic of the teacher's forward pass; bfloat16 halves its time on devices that have it"
    )
    pseudo_weight: Literal["score", "one"] = parameter(
        "score", "Weight of a pseudo-label beside a label's 1: the teacher's score, or 1 too"
    )
    pseudo_factor: float = parameter(1.0, "Factor on the weight of every pseudo-label", gt=0, le=1)
    pseudo_order: Literal["mixed", "first", "mixed_first"] = parameter(
        "mixed", "Pseudo-labelled images beside the labelled ones throughout; alone, before them; or beside them, "
        "before labelled ones alone",
    )  # fmt: skip
    pseudo_share: float = parameter(
        0.5, "Share of the steps in the first part, with pseudo_order first or mixed_first", gt=0, lt=1
    )


class RegisterParameters(Section):
    """Registration of the accepted engine, and the watch over the champion."""

    promote: bool = parameter(True, "Move the alias champion to an accepted engine; else only candidate")
    maximum_champion_drop: float | None = parameter(
        2.0, "mAP50-95 that the champion may have lost on today's data since the gate before evaluate_champion raises "
        "an alert; empty: none",
        unit="points", in_key=False, ge=0, le=100,
    )  # fmt: skip
    retrain_on_drop: bool = parameter(False, "Let such an alert start a retraining too", in_key=False)


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
    return [_form_field(key, schema) for key, schema in _leaves(Parameters, "")]


def _leaves(model: type[BaseModel], prefix: str) -> list[tuple[str, dict[str, Any]]]:
    """Each parameter with its JSON schema."""
    schemas = model.model_json_schema()["properties"] if model is not Parameters else {}  # all sections' would be twice
    leaves = []
    for name, field in model.model_fields.items():
        key = prefix + (field.alias or name)
        nested = field.annotation
        if isinstance(nested, type) and issubclass(nested, BaseModel):
            leaves += _leaves(nested, key + ".")
        else:
            leaves.append((key, schemas[field.alias or name]))
    return leaves


def _form_field(key: str, described: dict[str, Any]) -> FormField:
    schema = dict(described)
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


def of_run(frozen: Mapping[str, Any]) -> Parameters:
    """The parameters that `start` froze.

    Raises:
        ParameterError: an older release froze what this one no longer takes.
    """
    try:
        return Parameters.model_validate(frozen["parameters"])
    except ValidationError as error:
        faults = _sentence(error, f"run.json of run {frozen['run']}", {})
        raise ParameterError(f"{faults}; start another run, which takes over what has not changed") from None


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
        elif fault["type"] == "value_error":
            whole_section = isinstance(fault["input"], dict)  # whose values would fill the screen
            faults.append(f"{origin}: {key}{'.' if whole_section else ' '}{fault['ctx']['error']}")
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
