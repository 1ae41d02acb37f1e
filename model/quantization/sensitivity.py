"""Which layers lose most when they are quantized, and which of them to leave in float.

The effect of a layer is measured with that layer alone in INT8, on training images (never on those a gate reads), by
what counts in the end: scores and boxes of the anchors on which the float network is most sure. No labels are needed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

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

    batches: training images in [0, 1]. Which layers stay in float at present does not matter and is not changed.
    Raises ValueError for no batch.
    """
    names = list(quantized_layers(model))
    totals = dict.fromkeys(names, 0.0)
    count = 0
    device = next(model.parameters()).device
    with torch.no_grad():
        for images in batches:
            images = images.to(device)
            with only_quantized(model, ()):
                reference = _ConfidentAnchors(model, images)
            for name in names:
                with only_quantized(model, (name,)):
                    totals[name] += reference.error(model, images)
            count += 1
    if count == 0:
        raise ValueError("layer_sensitivity needs at least one batch of training images, got none")
    return [LayerSensitivity(name, totals[name] / count) for name in names]


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


def choose_float_layers(
    sensitivities: Sequence[LayerSensitivity], cost_share: Mapping[str, float], budget: float
) -> dict[str, str]:
    """Layers to leave in float, each with its reason, within a budget of cost.

    cost_share: share of the time (or of the multiply-adds) of each layer. budget: the most that the chosen layers may
    have together, in [0, 1]. Layers are taken in falling order of error per cost, those that no longer fit are passed
    over, and layers with an error below the mean are never taken: freeing them costs time and gains nothing. Equal
    ratios keep the order of the network, so the same input gives the same choice.
    """
    if not 0.0 <= budget <= 1.0:
        raise ValueError(f"quantize.maximum_float_share must be from 0 to 1, got {budget:g}")
    missing = [layer.name for layer in sensitivities if layer.name not in cost_share]
    if missing:
        raise ValueError(f"no cost is known for {len(missing)} layers, such as {missing[0]}")
    if not sensitivities:
        return {}
    mean_error = sum(layer.error for layer in sensitivities) / len(sensitivities)
    candidates = [layer for layer in sensitivities if layer.error >= mean_error and layer.error > 0.0]
    candidates.sort(key=lambda layer: layer.error / max(cost_share[layer.name], 1e-12), reverse=True)
    chosen: dict[str, str] = {}
    spent = 0.0
    for layer in candidates:
        cost = cost_share[layer.name]
        if spent + cost <= budget:
            spent += cost
            chosen[layer.name] = (
                f"sensitive: alone in INT8 it changes confident predictions by {layer.error:.4f} "
                f"({layer.error / mean_error:.1f} times the mean layer) and has {100 * cost:.2f} % of the cost"
            )
    return chosen


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
