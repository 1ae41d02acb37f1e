"""Files outside the datasets that parameters name by their place: pinned by content when the run starts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline_tasks import digests
from pipeline_tasks.errors import DataError, ParameterError
from pipeline_tasks.label_quality import require_true_boxes
from pipeline_tasks.params import Parameters

FIELD = "pinned_files"
"""Its name in run.json: for each step, the further inputs by name."""

CHECKPOINT_FILES = ("checkpoint.json", "model.safetensors")
EXTRA_TEACHERS = "extra_teachers"
TRUE_BOXES = "true_boxes"
CLASS_NAMES = "class_names"

Pinned = dict[str, dict[str, dict[str, Any]]]


def pin(parameters: Parameters) -> Pinned:
    """Place and digest of every such file of a run, and a teacher's classes; torch is imported where one is given.

    Raises:
        DataError: a file is missing.
        ParameterError: it is not what the step that reads it needs, which would else be told after the pretraining.
    """
    extra = [_pinned_teacher(place) for place in parameters.teach.extra_checkpoints]
    true_boxes = parameters.pseudo_label.true_boxes
    return {
        "teach": {f"{EXTRA_TEACHERS}_{number}": entry for number, entry in enumerate(extra, start=1)},
        "pseudo_label": {TRUE_BOXES: _pinned_true_boxes(true_boxes)} if true_boxes else {},
    }


def of_step(frozen: Mapping[str, Any], step: str) -> dict[str, dict[str, Any]]:
    """What a run pinned for a step, by the name of the input."""
    pinned: Pinned = frozen.get(FIELD, {})
    return pinned.get(step, {})


def facts(frozen: Mapping[str, Any], step: str) -> dict[str, tuple[str, str]]:
    """The same without what follows from the digest: a run of an older release has no class names."""
    return {name: (entry["path"], entry["digest"]) for name, entry in of_step(frozen, step).items()}


def extra_teachers(frozen: Mapping[str, Any]) -> list[str]:
    """Digests of the checkpoints that teach beside the run's own teacher: what the engine depends on."""
    return [entry["digest"] for entry in of_step(frozen, "teach").values()]


def require_unchanged(field: str, path: Path, digest: str) -> None:
    """Compare a file or checkpoint folder with what was pinned.

    Raises:
        DataError: it is gone or was changed since the run started.
    """
    if _digest(field, path) != digest:
        raise DataError(f"{field}: {path} was changed since the run started; start the run anew")


def _pinned_teacher(place: str) -> dict[str, Any]:
    from model.checkpoint import load_checkpoint

    field = "teach.extra_checkpoints"
    entry = _pinned(field, place)
    try:
        _, metadata = load_checkpoint(Path(entry["path"]))
    except ValueError as error:
        raise ParameterError(f"{field}: {error}") from None
    return {**entry, CLASS_NAMES: list(metadata.class_names)}


def _pinned_true_boxes(place: str) -> dict[str, str]:
    field = "pseudo_label.true_boxes"
    entry = _pinned(field, place)
    try:
        require_true_boxes(Path(entry["path"]))
    except DataError as error:
        raise ParameterError(f"{field}: {error}") from None
    return entry


def _pinned(field: str, place: str) -> dict[str, str]:
    path = Path(place).expanduser().resolve()
    return {"path": str(path), "digest": _digest(field, path)}


def _digest(field: str, path: Path) -> str:
    """Of a file, or of the files of a checkpoint folder."""
    files = [path] if field.endswith(TRUE_BOXES) else [path / name for name in CHECKPOINT_FILES]
    try:
        return digests.of_json([digests.of_file(file) for file in files])
    except OSError as error:
        remedy = "a COCO annotation file" if len(files) == 1 else "a checkpoint folder such as outputs/teach/checkpoint"
        raise DataError(f"{field}: {error.filename} cannot be read ({error.strerror}); give {remedy}") from None
