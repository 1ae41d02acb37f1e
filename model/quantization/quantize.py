"""Post-training quantization of a folded network, and the choice of the layers that stay in float.

``quantize`` turns every convolution of a folded network into one that rounds like INT8 and finds its input range on
calibration images. What comes back is still an ordinary trainable module: quantization-aware training is the ordinary
training loop over it, with no batch norm left to drift.

Only the inputs of convolutions are rounded. Additions, pooling, concatenation and the box decoding stay in float.
"""

from __future__ import annotations

import copy
import fnmatch
import hashlib
import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import MappingProxyType

import torch
from jaxtyping import Float
from torch import Tensor, nn

from model import processes
from model.quantization.fake_quantize import (
    QuantizedConv2d,
    QuantizedConvolution,
    QuantizedConvTranspose2d,
)
from model.quantization.merged_upsampling import merge_upsampling
from model.quantization.observers import Observer, ObserverName, make_observer
from model.yolo_nas import YoloNAS

PREDICTION_REASON = (
    "last convolution before scores or box distances: its rounding error is the error of the result, "
    "and a 1x1 convolution on few channels costs no measurable time in float"
)
SIGNED_INPUT_REASON = (
    "its input can be negative, so it cannot be carried as unsigned integers, the only ones that OpenVINO computes "
    "rightly on every processor"
)
PREDICTION_LAYERS: Mapping[str, str] = MappingProxyType(
    {"heads.*.cls_pred": PREDICTION_REASON, "heads.*.reg_pred": PREDICTION_REASON}
)
CPU_FLOAT_LAYERS: Mapping[str, str] = MappingProxyType(
    {**PREDICTION_LAYERS, "neck.neck[12].reduce_after_concat*": SIGNED_INPUT_REASON}
)
"""Pattern of layer names -> why such a layer stays in float by default; of merged networks the predictions alone."""


@dataclass(frozen=True)
class QuantizationConfig:
    """How ranges are found and which layers stay in float.

    percentile: used by the percentile observer, in percent of the values of one activation that are kept.
    float_layers: shell patterns of layer names; each must match at least one layer.
    merge_upsampling: see ``merged_upsampling``; no layer then has a signed input because of an up-stage.
    signed_inputs_in_float: leave layers in float whose input was negative on the calibration images, as CPU engines
    need; TensorRT does not need it. It happens behind transposed convolutions and negative bottleneck scalars.
    """

    observer: ObserverName = "percentile"
    percentile: float = 99.99
    float_layers: tuple[str, ...] = field(default_factory=lambda: tuple(CPU_FLOAT_LAYERS))
    signed_inputs_in_float: bool = True
    merge_upsampling: bool = False


def quantize(model: YoloNAS, calibration: Iterable[Float[Tensor, "B 3 S S"]], config: QuantizationConfig) -> YoloNAS:
    """Quantized copy of a folded network; the given one is left as it is.

    calibration: batches of training images in [0, 1], letterboxed as in training, without augmentation.
    Raises ValueError for a network that is not folded, no batch, or a pattern that matches nothing.
    """
    if not model.fused:
        raise ValueError("only a folded network can be quantized: call fuse() first")
    quantized = copy.deepcopy(model).eval()
    if config.merge_upsampling:
        merge_upsampling(quantized)
    attach_quantizers(quantized)
    reasons = {
        name: CPU_FLOAT_LAYERS.get(pattern, f"asked for by quantize.float_layers {pattern!r}")
        for pattern in config.float_layers
        for name in match_layers(quantized, pattern)
    }
    signed = calibrate(quantized, calibration, config)
    if config.signed_inputs_in_float:
        reasons = {**dict.fromkeys(signed, SIGNED_INPUT_REASON), **reasons}
    set_float_layers(quantized, reasons)
    return quantized


def attach_quantizers(model: nn.Module) -> None:
    """Replace every convolution in place by its quantized kind, sharing the parameters; ranges are still zero."""
    for name, module in list(model.named_modules()):
        if isinstance(module, QuantizedConv2d | QuantizedConvTranspose2d):
            continue
        if isinstance(module, nn.Conv2d):
            _replace(model, name, QuantizedConv2d.from_float(module))
        elif isinstance(module, nn.ConvTranspose2d):
            _replace(model, name, QuantizedConvTranspose2d.from_float(module))


def calibrate(
    model: nn.Module, batches: Iterable[Float[Tensor, "B 3 S S"]], config: QuantizationConfig
) -> tuple[str, ...]:
    """Run the float network over the batches and store the observed input range of every layer.

    batches: of several processes, the share of this one. What they see is merged: all end with the same ranges, to the
    bit those of one process with every batch. Returns the names of the layers whose input was negative somewhere.
    """
    layers = quantized_layers(model)
    watches = {name: _InputWatch(make_observer(config.observer, config.percentile)) for name in layers}
    device = next(model.parameters()).device
    count = 0
    with _watching(layers, watches), only_quantized(model, ()), torch.no_grad():
        for images in batches:
            model(images.to(device))
            count += 1
    found = processes.from_first(processes.gathered_by_first((count, watches)))
    if sum(seen for seen, _ in found) == 0:
        raise ValueError("quantize needs at least one batch of calibration images, got none")
    for name, layer in layers.items():
        merged = found[0][1][name]
        for _, others in found[1:]:
            merged.merge(others[name])
        layer.input_amax.fill_(merged.observer.amax())
    return tuple(name for name, watch in found[0][1].items() if watch.negative)


def quantized_layers(model: nn.Module) -> dict[str, QuantizedConvolution]:
    """Every layer that can run in INT8, by name, in the order of the network; also those switched to float."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, QuantizedConv2d | QuantizedConvTranspose2d)
    }


def match_layers(model: nn.Module, pattern: str) -> list[str]:
    """Names of the quantizable layers that a shell pattern matches; ValueError when there is none."""
    layers = quantized_layers(model)
    matches = [name for name in layers if fnmatch.fnmatchcase(name, pattern)]
    if not matches:
        example = next(iter(layers), "(the network has no quantized layer)")
        raise ValueError(f"quantize.float_layers: {pattern!r} matches no convolution; a name looks like {example!r}")
    return matches


def set_float_layers(model: nn.Module, reasons: Mapping[str, str]) -> None:
    """Leave exactly these layers in float, each with the reason to be reported; all others round.

    Raises ValueError for a name that is not a quantizable layer.
    """
    layers = quantized_layers(model)
    unknown = sorted(set(reasons) - set(layers))
    if unknown:
        raise ValueError(f"not a quantizable layer: {', '.join(unknown)}")
    for name, layer in layers.items():
        layer.quantizing = name not in reasons
        layer.float_reason = reasons.get(name, "")


def float_layers(model: nn.Module) -> dict[str, str]:
    """Name -> reason of the layers that stay in float."""
    return {name: layer.float_reason for name, layer in quantized_layers(model).items() if not layer.quantizing}


def precision_per_layer(model: nn.Module) -> dict[str, dict[str, str]]:
    """Name -> {"precision": "int8" or "float32", "reason": why not int8, or empty}, for ``engine.json``."""
    return {
        name: {"precision": "int8" if layer.quantizing else "float32", "reason": layer.float_reason}
        for name, layer in quantized_layers(model).items()
    }


def calibration_digest(model: nn.Module) -> str:
    """SHA-256 of all calibrated input ranges: equal digests mean equal activation grids."""
    ranges = {name: float(layer.input_amax).hex() for name, layer in quantized_layers(model).items()}
    return hashlib.sha256(json.dumps(ranges, sort_keys=True).encode()).hexdigest()


def freeze(model: nn.Module) -> None:
    """Make the scales of every layer constants; call it before export. A frozen model must not be trained."""
    for layer in quantized_layers(model).values():
        layer.freeze()


def unfreeze(model: nn.Module) -> None:
    """Undo ``freeze``."""
    for layer in quantized_layers(model).values():
        layer.unfreeze()


@contextmanager
def only_quantized(model: nn.Module, names: Sequence[str]) -> Iterator[None]:
    """Within the block exactly the named layers round; afterwards the earlier choice holds again."""
    with _kept_choice(model) as layers:
        for name, layer in layers.items():
            layer.quantizing = name in names
        yield


@contextmanager
def float_too(model: nn.Module, names: Collection[str]) -> Iterator[None]:
    """Within the block the named layers stay in float too; afterwards the earlier choice holds again."""
    with _kept_choice(model) as layers:
        for name in names:
            layers[name].quantizing = False
        yield


@contextmanager
def _kept_choice(model: nn.Module) -> Iterator[dict[str, QuantizedConvolution]]:
    layers = quantized_layers(model)
    before = {name: layer.quantizing for name, layer in layers.items()}
    try:
        yield layers
    finally:
        for name, layer in layers.items():
            layer.quantizing = before[name]


class _InputWatch:
    """A forward pre-hook that shows a layer's input to an observer and remembers whether it was ever negative."""

    def __init__(self, observer: Observer) -> None:
        self.observer = observer
        self.negative = False

    def __call__(self, _layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self.observer.observe(inputs[0])
        self.negative = self.negative or bool((inputs[0] < 0).any())

    def merge(self, other: _InputWatch) -> None:
        """Add what another process has seen."""
        self.observer.merge(other.observer)
        self.negative = self.negative or other.negative


@contextmanager
def _watching(layers: Mapping[str, QuantizedConvolution], watches: Mapping[str, _InputWatch]) -> Iterator[None]:
    handles = [layer.register_forward_pre_hook(watches[name]) for name, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _replace(model: nn.Module, name: str, replacement: nn.Module) -> None:
    parent_name, _, child_name = name.rpartition(".")
    setattr(model.get_submodule(parent_name), child_name, replacement)
