"""Which layers lose most when they are quantized.

The effect of a layer is measured with that layer alone in INT8, on training images (never on those a gate reads), by
what counts in the end: scores and boxes of the anchors on which the float network is most sure. No labels are needed.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from jaxtyping import Float
from torch import Tensor, nn

from model import processes
from model.quantization.quantize import only_quantized, quantized_layers
from model.yolo_nas import YoloNAS

ANCHORS_PER_IMAGE = 50
"""Anchors that are compared in each image: about as many as belong to its objects, each with several anchors."""


@dataclass(frozen=True)
class LayerSensitivity:
    """Effect of one layer in INT8: score error plus 1 - IoU, mean over confident anchors weighted by their score."""

    name: str
    error: float


def layer_sensitivity(model: YoloNAS, batches: Iterable[Float[Tensor, "B 3 S S"]]) -> list[LayerSensitivity]:
    """Error of every quantizable layer, each alone in INT8, in the order of the network.

    Arguments and errors are those of ``quantization_errors``.
    """
    names = list(quantized_layers(model))
    errors = quantization_errors(model, batches, [(name,) for name in names])
    return [LayerSensitivity(name, error) for name, error in zip(names, errors, strict=True)]


def quantization_errors(
    model: YoloNAS, batches: Iterable[Float[Tensor, "B 3 S S"]], choices: Sequence[Collection[str]]
) -> list[float]:
    """For each choice of layers: the error of the network with exactly those in INT8.

    batches: training images in [0, 1]; of several processes, the share of this one: all get the same answer, to the
    bit that of one process with every batch. Which layers stay in float at present does not matter and is not changed.
    Raises ValueError for no batch.
    """
    device = next(model.parameters()).device
    with torch.no_grad():
        own = [_errors_on(model, images.to(device), choices) for images in batches]
    shares = processes.from_first(processes.gathered_by_first(own))
    together = [errors for turn in itertools.zip_longest(*shares) for errors in turn if errors is not None]
    if not together:
        raise ValueError("measuring sensitivity needs at least one batch of training images, got none")
    return [sum(errors) / len(together) for errors in zip(*together, strict=True)]


def _errors_on(model: YoloNAS, images: Float[Tensor, "B 3 S S"], choices: Sequence[Collection[str]]) -> list[float]:
    """Errors of the choices on one batch, those first whose first layer in INT8 comes first.

    What runs before it computes what it computes in float and is not computed again: that is most of the work, since
    most of it is in the first layers.
    """
    with only_quantized(model, ()), _Replay(model) as replay:
        reference = _ConfidentAnchors(model, images)
        positions = {name: position for position, name in enumerate(replay.order)}
        firsts = [min((positions[name] for name in choice), default=len(positions)) for choice in choices]
        errors = dict.fromkeys(range(len(choices)), 0.0)
        for index in sorted(errors, key=lambda index: firsts[index]):
            replay.up_to(firsts[index])
            with only_quantized(model, tuple(choices[index])):
                errors[index] = reference.error(model, images)
    return [errors[index] for index in range(len(choices))]


class _Replay:
    """Remembers the convolutions' outputs of the first forward pass and gives them again, for as many as asked.

    What follows a convolution may overwrite its output in place with its ReLU; doing that again changes nothing.
    order: names in the order in which the layers ran.
    """

    def __init__(self, model: YoloNAS) -> None:
        self.order: list[str] = []
        self._layers = quantized_layers(model)
        self._outputs: dict[str, Tensor] = {}
        self._given = 0

    def __enter__(self) -> Self:
        self._handles = [
            layer.register_forward_hook(functools.partial(self._remember, name)) for name, layer in self._layers.items()
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        for name in self.order[: self._given]:
            del self._layers[name].__dict__["forward"]

    def up_to(self, position: int) -> None:
        """From now on the layers before this position in ``order`` give their remembered output."""
        for name in self.order[self._given : position]:
            output = self._outputs[name]
            self._layers[name].__dict__["forward"] = lambda *_, output=output: output
        self._given = max(self._given, position)

    def _remember(self, name: str, _layer: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if name not in self._outputs:
            self.order.append(name)
            self._outputs[name] = output


def multiply_add_shares(model: YoloNAS, input_size: int) -> dict[str, float]:
    """Share of each quantizable layer in the multiply-adds of all of them: a device-free stand-in for its time."""
    counts: dict[str, int] = {}
    layers = quantized_layers(model)
    parameter = next(model.parameters())

    def count(name: str) -> None:
        def hook(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            transposed = isinstance(layer, nn.ConvTranspose2d)
            positions = inputs[0] if transposed else output
            weight = layer.get_parameter("weight")
            counts[name] = weight.numel() * positions.shape[2] * positions.shape[3]

        handles.append(layers[name].register_forward_hook(hook))

    handles: list[torch.utils.hooks.RemovableHandle] = []
    try:
        for name in layers:
            count(name)
        with torch.no_grad():
            model(torch.zeros(1, 3, input_size, input_size, device=parameter.device))
    finally:
        for handle in handles:
            handle.remove()
    total = sum(counts.values())
    return {name: counts[name] / total for name in layers}


class _ConfidentAnchors:
    """The best anchors of the float network on some images, to measure other settings of the network against."""

    def __init__(self, model: YoloNAS, images: Float[Tensor, "B 3 S S"]) -> None:
        (boxes_xyxy, scores), _ = model(images)
        best = scores.amax(dim=2)  # (B, A)
        self._weights, self._indices = best.topk(min(ANCHORS_PER_IMAGE, best.shape[1]), dim=1)  # (B, K)
        self._boxes_xyxy, self._scores = self._pick(boxes_xyxy), self._pick(scores)

    def error(self, model: YoloNAS, images: Float[Tensor, "B 3 S S"]) -> float:
        """Score error plus 1 - IoU of the network as it now is, weighted by the reference score."""
        (boxes_xyxy, scores), _ = model(images)
        score_error = (self._pick(scores) - self._scores).abs().amax(dim=2)
        overlap_lost = 1 - _paired_iou(self._pick(boxes_xyxy), self._boxes_xyxy)
        weighted = (score_error + overlap_lost) * self._weights
        return float(weighted.double().sum() / self._weights.double().sum())

    def _pick(self, values: Float[Tensor, "B A F"]) -> Float[Tensor, "B K F"]:
        return values.gather(1, self._indices[:, :, None].expand(-1, -1, values.shape[2]))


def _paired_iou(first_xyxy: Float[Tensor, "B K 4"], second_xyxy: Float[Tensor, "B K 4"]) -> Float[Tensor, "B K"]:
    sides = torch.minimum(first_xyxy[..., 2:], second_xyxy[..., 2:]) - torch.maximum(
        first_xyxy[..., :2], second_xyxy[..., :2]
    )
    intersection = sides.clamp(min=0).prod(dim=-1)
    areas = [(boxes[..., 2:] - boxes[..., :2]).clamp(min=0).prod(dim=-1) for boxes in (first_xyxy, second_xyxy)]
    union = areas[0] + areas[1] - intersection
    return torch.where(union > 0, intersection / union.clamp(min=1e-9), torch.ones_like(union))
