"""Checkpoints: a directory with ``model.safetensors`` (weights) and ``checkpoint.json`` (what they are).

Nothing is unpickled.  Optimiser state is not part of a checkpoint.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from model import build
from model.preprocessing import Preprocessing
from model.yolo_nas import VARIANTS, YoloNAS

SCHEMA_VERSION = 1
WEIGHTS_FILE = "model.safetensors"
METADATA_FILE = "checkpoint.json"
CLASS_PREDICTION = ".cls_pred."


@dataclass(frozen=True)
class CheckpointMetadata:
    """What a checkpoint holds and what it descends from."""

    variant: str
    class_names: tuple[str, ...]
    preprocessing: Preprocessing
    step: int  # optimiser steps behind the weights
    parents: dict[str, str] = field(default_factory=dict)  # role of each ancestor -> its digest
    lineage: dict[str, Any] = field(default_factory=dict)  # licences of "weights", "annotations", "images", each apart
    schema_version: int = SCHEMA_VERSION

    def __post_init__(self) -> None:
        object.__setattr__(self, "class_names", tuple(self.class_names))
        if self.variant not in VARIANTS:
            raise ValueError(f"variant must be one of {', '.join(VARIANTS)}, got {self.variant!r}")
        _check_class_names(self.class_names)
        if self.schema_version != SCHEMA_VERSION:
            raise ValueError(f"schema_version must be {SCHEMA_VERSION}, got {self.schema_version!r}")

    def to_json(self) -> dict[str, Any]:
        """The fields as a JSON-ready dictionary."""
        return {**asdict(self), "class_names": list(self.class_names)}

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> CheckpointMetadata:
        """Read what ``to_json`` wrote; raises ValueError naming the field."""
        version = record.get("schema_version")
        if version != SCHEMA_VERSION:
            raise ValueError(f"schema_version must be {SCHEMA_VERSION}, got {version!r}, as another release writes")
        names = {item.name for item in fields(cls)}
        if set(record) != names:
            raise ValueError(f"expected the fields {sorted(names)}, got {sorted(record)}")
        for name, kind in [("class_names", list), ("step", int), ("parents", dict), ("lineage", dict)]:
            if not isinstance(record[name], kind):
                raise ValueError(f"{name} must be a JSON {kind.__name__}, got {record[name]!r}")
        preprocessing = Preprocessing.from_json(record["preprocessing"])
        return cls(**{**record, "class_names": tuple(record["class_names"]), "preprocessing": preprocessing})


def _check_class_names(names: Sequence[str]) -> None:
    if not names:
        raise ValueError("class_names is empty; a detector needs at least one class")
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ValueError(f"class_names must be unique, repeated: {', '.join(repeated)}")


def save_checkpoint(directory: Path, model: YoloNAS, metadata: CheckpointMetadata) -> None:
    """Write a checkpoint directory; a crash leaves the old one or the new one, never a mixture.

    Both files are written beside the target and flushed, then the directory is renamed into place.  The same weights
    and metadata give the same bytes.  Raises ValueError when the metadata does not describe the model.
    """
    if model.architecture != VARIANTS[metadata.variant] or model.num_classes != len(metadata.class_names):
        raise ValueError(
            f"metadata says {metadata.variant} with {len(metadata.class_names)} classes, "
            f"the model is {model.architecture.variant} with {model.num_classes}"
        )
    directory = Path(directory)
    directory.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", suffix=".tmp", dir=directory.parent))
    try:
        _write_files(temporary, model, metadata)
        _move_into_place(temporary, directory)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_files(directory: Path, model: YoloNAS, metadata: CheckpointMetadata) -> None:
    directory.chmod(0o755)
    state = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
    save_file(state, directory / WEIGHTS_FILE)
    record = json.dumps({**metadata.to_json(), "fused": model.fused}, indent=2, sort_keys=True, ensure_ascii=False)
    (directory / METADATA_FILE).write_text(record + "\n", encoding="utf-8")
    for path in (directory / WEIGHTS_FILE, directory / METADATA_FILE, directory):
        _flush(path)


def _move_into_place(temporary: Path, directory: Path) -> None:
    """Rename over ``directory``; an existing checkpoint is set aside first, since rename cannot replace a full one."""
    if directory.exists():
        aside = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", suffix=".old", dir=directory.parent))
        os.replace(directory, aside / directory.name)
        os.replace(temporary, directory)
        shutil.rmtree(aside, ignore_errors=True)
    else:
        os.replace(temporary, directory)
    _flush(directory.parent)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def load_checkpoint(directory: Path) -> tuple[YoloNAS, CheckpointMetadata]:
    """Network (evaluation mode, CPU) and metadata of a checkpoint directory.

    Raises ValueError naming the file and the remedy when a file is missing, damaged, of another kind, or holds a weight
    that is no finite number.
    """
    directory = Path(directory)
    metadata, fused = read_metadata(directory)
    model = build(metadata.variant, len(metadata.class_names)).eval()
    if fused:
        model.fuse()
    state = _read_weights(directory / WEIGHTS_FILE)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(
            f"{directory / WEIGHTS_FILE} does not hold the weights of a {metadata.variant} with "
            f"{len(metadata.class_names)} classes, as {METADATA_FILE} says; export the checkpoint again"
        ) from error
    return model, metadata


def read_metadata(directory: Path) -> tuple[CheckpointMetadata, bool]:
    """Metadata of a checkpoint directory and whether its weights are fused; raises ValueError as loading does."""
    path = Path(directory) / METADATA_FILE
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        fused = bool(record.pop("fused"))
        return CheckpointMetadata.from_json(record), fused
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}); give a checkpoint directory") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not valid checkpoint metadata ({error}); use another checkpoint") from error


def _read_weights(path: Path) -> dict[str, Tensor]:
    try:
        state = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} is missing or damaged ({error}); copy or train the checkpoint again") from error
    for name, tensor in state.items():
        if not torch.isfinite(tensor).all():
            wrong = tensor[~torch.isfinite(tensor)][0].item()
            raise ValueError(f"{path}: {name} holds {wrong:g}, which is no finite number; use another checkpoint")
    return state


class TransferReport(NamedTuple):
    """State-dict keys that were taken over or kept their fresh values, and the class names whose rows were taken over.

    A class-prediction tensor counts as kept when at least one of its rows was. ``unused`` are the keys of the source
    that fitted nowhere.
    """

    kept: list[str]
    reinitialised: list[str]
    classes_kept: list[str]
    unused: list[str]


@torch.no_grad()
def transfer_weights(
    model: YoloNAS,
    source_state: Mapping[str, Tensor],
    source_class_names: Sequence[str],
    target_class_names: Sequence[str],
) -> TransferReport:
    """Start ``model`` from the weights of a network with another class list, in place.

    Tensors of equal name and shape are copied.  Of the class predictions, the rows of class names that both lists
    share are copied; other rows, and tensors that do not fit, keep the model's fresh initialisation.
    """
    _check_class_names(source_class_names)
    _check_class_names(target_class_names)
    if model.num_classes != len(target_class_names):
        raise ValueError(f"the model has {model.num_classes} classes, but {len(target_class_names)} names were given")
    shared = [name for name in target_class_names if name in source_class_names]
    target_rows = torch.tensor([target_class_names.index(name) for name in shared], dtype=torch.int64)
    source_rows = torch.tensor([source_class_names.index(name) for name in shared], dtype=torch.int64)
    report = TransferReport([], [], shared, [])
    for key, value in model.state_dict().items():
        source = source_state.get(key)
        taken = False
        if source is not None and CLASS_PREDICTION in key:
            taken = _transfer_rows(value, source, target_rows, source_rows, len(source_class_names))
        elif source is not None and source.shape == value.shape:
            value.copy_(source)
            taken = True
        (report.kept if taken else report.reinitialised).append(key)
    report.unused.extend(sorted(source_state.keys() - set(report.kept)))
    return report


def _transfer_rows(
    value: Tensor, source: Tensor, target_rows: Tensor, source_rows: Tensor, num_source_classes: int
) -> bool:
    if len(source) != num_source_classes:
        raise ValueError(f"the source weights have {len(source)} classes, but {num_source_classes} names were given")
    if not len(target_rows) or source.shape[1:] != value.shape[1:]:
        return False
    value[target_rows.to(value.device)] = source[source_rows.to(source.device)].to(value.device, value.dtype)
    return True
