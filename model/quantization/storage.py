"""A quantized network on disk: ``quantized.safetensors`` (weights and input ranges) and ``quantized.json``.

Loading gives a network that computes the same bits; it can be trained on, measured or exported.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

import model as model_package
from model.checkpoint import CheckpointMetadata
from model.quantization.merged_upsampling import is_merged, merge_upsampling
from model.quantization.quantize import attach_quantizers, float_layers, quantized_layers, set_float_layers
from model.training_state import write_atomically
from model.yolo_nas import YoloNAS

SCHEMA_VERSION = 1
WEIGHTS_FILE = "quantized.safetensors"
METADATA_FILE = "quantized.json"
RANGE = "input_amax"
FIELDS = {"checkpoint": dict, "float_layers": dict}
"""What every record has, beside its schema version."""


def is_quantized(directory: Path) -> bool:
    """Whether a directory holds a quantized network."""
    return (directory / METADATA_FILE).is_file()


def save_quantized(
    directory: Path, model: YoloNAS, metadata: CheckpointMetadata, report: Mapping[str, Any] | None = None
) -> None:
    """Write a quantized network; the metadata file comes last, so a directory that has it is whole.

    report: JSON values that say how it came about, for whoever reads it later (``read_report``).
    Raises ValueError for a network that is not quantized or whose classes the metadata does not describe.
    """
    if not quantized_layers(model):
        raise ValueError("the network is not quantized: save a float one with save_checkpoint")
    if model.architecture.variant != metadata.variant or model.num_classes != len(metadata.class_names):
        raise ValueError(
            f"metadata says {metadata.variant} with {len(metadata.class_names)} classes, "
            f"the model is {model.architecture.variant} with {model.num_classes}"
        )
    directory.mkdir(parents=True, exist_ok=True)
    state = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    record = {
        "schema_version": SCHEMA_VERSION,
        "checkpoint": metadata.to_json(),
        "float_layers": float_layers(model),
        "merged_upsampling": is_merged(model),
        "report": dict(report or {}),
    }
    write_atomically(directory / WEIGHTS_FILE, save(state))
    text = json.dumps(record, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    write_atomically(directory / METADATA_FILE, text.encode())


def load_quantized(directory: Path) -> tuple[YoloNAS, CheckpointMetadata]:
    """Quantized network (evaluation mode, CPU) and its metadata.

    Raises ValueError naming the file and the remedy when one is missing, damaged or of another kind, or when a tensor
    is not finite, an input range negative or every one 0.
    """
    record = _read_record(directory / METADATA_FILE)
    metadata = _read_checkpoint(directory / METADATA_FILE, record)
    network = model_package.build(metadata.variant, len(metadata.class_names)).eval().fuse()
    if record.get("merged_upsampling", False):
        merge_upsampling(network)
    attach_quantizers(network)
    weights = directory / WEIGHTS_FILE
    try:
        state = load_file(weights)
        network.load_state_dict(state)
    except (OSError, SafetensorError, RuntimeError) as error:
        raise ValueError(f"{weights} is missing, damaged or of another network ({error}); quantize again") from error
    _check_values(weights, state)
    try:
        set_float_layers(network, record["float_layers"])
    except ValueError as error:
        raise ValueError(f"{directory / METADATA_FILE}: float_layers: {error}; quantize again") from None
    return network, metadata


def read_report(directory: Path) -> dict[str, Any]:
    """What was said of a quantized network when it was saved; empty where nothing was."""
    path = directory / METADATA_FILE
    report = _read_record(path).get("report", {})
    if not isinstance(report, dict):
        raise ValueError(f"{path}: report must be a JSON object, got {report!r}; quantize again")
    return report


def _read_record(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({error}); give a directory written by `nasline quantize`") from error
    if not isinstance(record, dict) or record.get("schema_version") != SCHEMA_VERSION:
        raise ValueError(f"{path} is not quantized-network metadata of schema version {SCHEMA_VERSION}; quantize again")
    for name, kind in FIELDS.items():
        if not isinstance(record.get(name), kind):
            found = f"it is {record[name]!r}" if name in record else "it is missing"
            raise ValueError(f"{path}: {name} must be a JSON object, but {found}; quantize again")
    return record


def _read_checkpoint(path: Path, record: Mapping[str, Any]) -> CheckpointMetadata:
    try:
        return CheckpointMetadata.from_json(record["checkpoint"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: checkpoint is not valid metadata ({error}); quantize again") from error


def _check_values(path: Path, state: Mapping[str, Tensor]) -> None:
    """Refuse what would compute nonsense without a word.

    A single range of 0 is right: calibration finds it for an input that is always 0 (``Observer.amax``).
    """
    for name, value in state.items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            wrong = value[~torch.isfinite(value)].flatten()[0].item()
            raise ValueError(f"{path}: {name} holds {wrong:g}, which is no finite number; quantize again")
        if name.endswith(RANGE) and value < 0:
            raise ValueError(f"{path}: {name} is {value.item():g}, a range must not be negative; quantize again")
    if not any(value > 0 for name, value in state.items() if name.endswith(RANGE)):
        raise ValueError(f"{path}: every {RANGE} is 0, no range was ever calibrated; quantize again")
