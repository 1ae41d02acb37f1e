"""Checkpoint files of the reference implementation (super-gradients): read without running code, and written.

Such a file (``.pth``) is a pickle: a dictionary with the network's state (`net`), often its moving average (`ema_net`)
and much besides, or the bare state dict.  torch's restricted unpickler makes tensors and plain containers only.
"""

from __future__ import annotations

import io
import pickle
import re
import struct
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from model.preprocessing import Preprocessing
from model.training_state import write_atomically

Section = Literal["ema_net", "net"]
ChannelOrder = Literal["rgb", "bgr"]

SECTIONS: tuple[Section, ...] = ("ema_net", "net")
WRAPPERS = ("module.", "_orig_mod.")  # what DistributedDataParallel and torch.compile put before every key
COCO_PREPROCESSING = Preprocessing(640, margin=4)
"""Of the published checkpoints; a file that says nothing else is taken for one of them."""

DAMAGE = (
    OSError, RuntimeError, EOFError, LookupError, ValueError, TypeError, AttributeError, OverflowError, MemoryError,
    AssertionError, pickle.PickleError, struct.error,
)  # fmt: skip
"""All that unpickling was seen to raise on damaged files."""


class ReferenceFile(NamedTuple):
    """What a checkpoint of the reference holds, as far as it concerns a network."""

    state: dict[str, Tensor]  # in the reference's names, without a wrapper's prefix
    section: str  # where in the file it was: "ema_net", "net" or "state dict"
    class_names: tuple[str, ...] | None  # None: the file does not say
    channel_order: ChannelOrder | None  # of the pictures the network was trained on; None: the file does not say
    preprocessing: Preprocessing


def read_reference_file(path: Path, section: Section | None = None) -> ReferenceFile:
    """Read a checkpoint of the reference; without ``section`` the moving average if there is one, else the network.

    Raises ValueError naming the file when it is absent, damaged, holds more than tensors and plain values, or holds
    no network.
    """
    content = _load(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__} instead of a dictionary with `net` or `ema_net`")
    name, state = _network_section(path, content, section)
    told = content.get("processing_params")
    processing = told if isinstance(told, dict) else {}
    return ReferenceFile(
        state=_unwrapped(path, name, state),
        section=name,
        class_names=_class_names(processing),
        channel_order=_channel_order(processing),
        preprocessing=_preprocessing(processing),
    )


def _load(path: Path) -> Any:
    if not path.is_file():
        raise ValueError(f"{path} is no file; give a checkpoint file (.pth) of the reference")
    damaged = _damaged_member(path)
    if damaged:
        raise ValueError(f"{path} is damaged at {damaged}; copy or download it again")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except DAMAGE as error:
        raise ValueError(_unreadable(path, str(error))) from error


def _damaged_member(path: Path) -> str | None:
    """The first part whose checksum is wrong: torch compares none, so a flipped bit would become a weight."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip()
    except zipfile.BadZipFile:
        return None  # an old file, which is no archive, or a truncated one, which torch refuses
    except DAMAGE as error:
        return str(error)


def _unreadable(path: Path, reason: str) -> str:
    """torch's own sentence would advise to let the file run its code; this one does not."""
    foreign = re.search(r"GLOBAL (\S+)", reason)
    if foreign:
        return (
            f"{path} holds {foreign[1]}, which is more than weights, and was not opened; where you trust it, "
            "save its `net` or `ema_net` alone: torch.save({'net': checkpoint['ema_net']}, FILE)"
        )
    return f"{path} is no checkpoint file or is damaged or truncated; copy or download it again"


def _network_section(path: Path, content: dict[Any, Any], section: Section | None) -> tuple[str, dict[str, Any]]:
    for name in (section,) if section else SECTIONS:
        if isinstance(content.get(name), dict) and content[name]:
            return name, content[name]
    if section is None and content and all(isinstance(value, Tensor) for value in content.values()):
        return "state dict", content
    found = ", ".join(str(name) for name in list(content)[:10]) or "nothing"
    raise ValueError(f"{path} has no {section or 'ema_net, net or bare state dict'}; it holds {found}")


def _unwrapped(path: Path, section: str, state: Mapping[Any, Any]) -> dict[str, Tensor]:
    """The tensors by name, without a prefix that all of them have."""
    for key, value in state.items():
        if not isinstance(key, str):
            raise ValueError(f"{path}: {section} has the key {key!r}, which is no name; it is no state dict")
        if not isinstance(value, Tensor):
            raise ValueError(f"{path}: entry {key!r} of {section} is a {type(value).__name__}, not a tensor")
    tensors = {key: value.detach() for key, value in state.items()}
    while prefix := next((wrapper for wrapper in WRAPPERS if all(key.startswith(wrapper) for key in tensors)), ""):
        tensors = {key.removeprefix(prefix): value for key, value in tensors.items()}
    return tensors


def _class_names(processing: Mapping[str, Any]) -> tuple[str, ...] | None:
    names = processing.get("class_names")
    if isinstance(names, list | tuple) and names and all(isinstance(name, str) for name in names):
        return tuple(names)
    return None


def _steps(processing: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Name and settings of the pre-processing steps that the file tells."""
    composed = processing.get("image_processor")
    composed = composed.get("ComposeProcessing") if isinstance(composed, dict) else None
    listed = composed.get("processings") if isinstance(composed, dict) else None
    steps: list[tuple[str, dict[str, Any]]] = []
    for entry in listed if isinstance(listed, list | tuple) else []:
        named = entry if isinstance(entry, dict) else {entry: {}}
        steps += [(str(name), settings if isinstance(settings, dict) else {}) for name, settings in named.items()]
    return steps


def _channel_order(processing: Mapping[str, Any]) -> ChannelOrder | None:
    """The reference gives RGB pictures to these steps; each reversal turns the channels round."""
    steps = _steps(processing)
    reversals = sum(name == "ReverseImageChannels" for name, _ in steps)
    return None if not steps else "bgr" if reversals % 2 else "rgb"


def _preprocessing(processing: Mapping[str, Any]) -> Preprocessing:
    """Input size and margin of the padding and resizing steps, where the file tells both and the input is square."""
    sizes: dict[str, int] = {}
    for name, settings in _steps(processing):
        shape = settings.get("output_shape")
        if isinstance(shape, list | tuple) and len(shape) == 2 and shape[0] == shape[1] and isinstance(shape[0], int):
            sizes["padded" if "Padding" in name else "resized"] = shape[0]
    try:
        return Preprocessing(sizes["padded"], margin=sizes["padded"] - sizes["resized"])
    except (KeyError, ValueError):
        return COCO_PREPROCESSING


def write_reference_file(path: Path, state: Mapping[str, Tensor], class_names: Sequence[str]) -> None:
    """Write a state dict in the reference's names as `net` and `ema_net` (stored once), whole or not at all."""
    shared = dict(state)
    buffer = io.BytesIO()
    content = {"net": shared, "ema_net": shared, "processing_params": {"class_names": list(class_names)}}
    torch.save(content, buffer)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, buffer.getvalue())
