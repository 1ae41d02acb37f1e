"""The pipeline as data: its steps, what each reads, and what its result depends on.

`nasline`, `dvc.yaml` and the DAGs all follow this list; a test compares them.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Input:
    """A published folder that a step reads: of `step` (and its `part`), the subfolder `folder` ("" is all)."""

    name: str
    step: str
    part: str = ""
    folder: str = ""


@dataclass(frozen=True)
class StepDefinition:
    """One step: how it is run and what its key is made of."""

    name: str
    summary: str
    outputs: str
    inputs: tuple[Input, ...] = ()
    parts: tuple[str, ...] = ()
    sharded: bool = False
    uses_accelerator: bool = False
    timeout_hours: float = 2.0
    shared_parameters: tuple[str, ...] = ()
    """Fields of the section `start` that can change this step's result."""
    contract_version: int = 1
    """Raised when the meaning of the step's output changes; finished work of older versions is not reused."""

    @property
    def needs(self) -> tuple[str, ...]:
        """References (`step` or `step/part`) that must have finished; never empty but for `start`."""
        references = dict.fromkeys(reference(i.step, i.part) for i in self.inputs)
        return tuple(references) or (("start",) if self.name != "start" else ())


def reference(step: str, part: str = "") -> str:
    """Name of a step or of one of its parts, as in run.json: `teach`, `pretrain/student`."""
    return f"{step}/{part}" if part else step


TARGET = Input("target", "validate_data", folder="target")
PRETRAIN = Input("pretrain", "validate_data", folder="pretrain")
UNLABELED = Input("unlabeled", "validate_data", folder="unlabeled")

STEPS: tuple[StepDefinition, ...] = (
    StepDefinition(
        "start",
        "Resolve and freeze the run: parameters, dataset digests, champion and code version.",
        outputs="runs/RUN/run.json",
        timeout_hours=1.0,
    ),
    StepDefinition(
        "validate_data",
        "Read the dataset folders, validate them with Great Expectations, quarantine bad rows.",
        outputs="Parquet tables per set, validation.json, quarantine, data docs",
        timeout_hours=6.0,
        contract_version=2,
    ),
    StepDefinition(
        "pretrain",
        "Train student and teacher from random weights on the pretraining set (the Objects365 role).",
        outputs="checkpoint, metrics, curves",
        inputs=(PRETRAIN,),
        parts=("student", "teacher"),
        uses_accelerator=True,
        timeout_hours=24 * 21,
        shared_parameters=("image_size", "seed", "precision"),
    ),
    StepDefinition(
        "teach",
        "Fine-tune the teacher on the target set, or take the champion; choose a score threshold per class.",
        outputs="checkpoint, thresholds.json with the labels' precision and recall, metrics, curves",
        inputs=(TARGET, Input("weights", "pretrain", "teacher", "checkpoint")),
        uses_accelerator=True,
        timeout_hours=24 * 7,
        shared_parameters=("image_size", "seed", "precision", "teacher_variant"),
        contract_version=2,
    ),
    StepDefinition(
        "pseudo_label",
        "Run the teacher over the unlabelled images and keep scored boxes above the thresholds.",
        outputs="Parquet tables of pseudo-labels",
        inputs=(UNLABELED, Input("teacher", "teach")),
        sharded=True,
        uses_accelerator=True,
        timeout_hours=48.0,
        contract_version=3,
    ),
    StepDefinition(
        "distill",
        "Train the student on labels and pseudo-labels against the teacher's logits and box distributions.",
        outputs="checkpoint, metrics, curves",
        inputs=(
            TARGET,
            Input("weights", "pretrain", "student", "checkpoint"),
            Input("teacher", "teach", folder="checkpoint"),
            Input("pseudo_labels", "pseudo_label", folder="tables"),
        ),
        uses_accelerator=True,
        timeout_hours=24 * 21,
        shared_parameters=("image_size", "seed", "precision", "student_variant"),
    ),
    StepDefinition(
        "quantize",
        "Calibrate on training images, leave sensitive layers in float, train quantization-aware.",
        outputs="quantized checkpoint, quantization.json, frontier of accuracy and time",
        inputs=(TARGET, Input("student", "distill", folder="checkpoint")),
        uses_accelerator=True,
        timeout_hours=24 * 3,
        shared_parameters=("seed",),
        contract_version=2,
    ),
    StepDefinition(
        "export",
        "Write the Q/DQ ONNX and its float twin and compare both with the torch networks.",
        outputs="engine directory: model.onnx, model.float.onnx, engine.json",
        inputs=(
            TARGET,
            Input("student", "distill", folder="checkpoint"),
            Input("quantized", "quantize", folder="checkpoint"),
        ),
        timeout_hours=2.0,
    ),
    StepDefinition(
        "gate",
        "Build the target's engines, measure accuracy and latency on them, write the verdict.",
        outputs="verdict.json, accuracy.json, latency.json, the target's engines, plots",
        inputs=(TARGET, PRETRAIN, UNLABELED, Input("engine", "export", folder="engine")),
        timeout_hours=6.0,
        contract_version=3,
    ),
    StepDefinition(
        "register",
        "Put the accepted engine into the MLflow registry and move the alias champion.",
        outputs="registration.json",
        inputs=(
            Input("engine", "export", folder="engine"),
            Input("gate", "gate"),
            Input("student", "distill", folder="checkpoint"),
            Input("teacher", "teach", folder="checkpoint"),
            TARGET,
            PRETRAIN,
            UNLABELED,
        ),
        timeout_hours=2.0,
        contract_version=2,
    ),
)

STEP_NAMES: tuple[str, ...] = tuple(step.name for step in STEPS)


def definition(name: str) -> StepDefinition:
    """The step of that name."""
    return STEPS[STEP_NAMES.index(name)]
