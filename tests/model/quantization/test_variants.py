"""Every variant can be quantized, for any number of classes: nothing depends on a width or on a name of one network."""

from __future__ import annotations

import pytest
import torch

import model
from model.quantization.merged_upsampling import merge_upsampling
from model.quantization.quantize import (
    PREDICTION_LAYERS,
    QuantizationConfig,
    float_layers,
    freeze,
    quantize,
    quantized_layers,
)
from model.quantization.selection import LayerCosts, rank_layers
from model.quantization.sensitivity import LayerSensitivity, multiply_add_shares, quantization_errors

SIDE = 64


@pytest.mark.parametrize(
    ("variant", "classes"), [("pico", 1), ("pico", 365), ("t", 3), ("n", 80), ("s", 1), ("m", 20), ("l", 80)]
)
def test_a_variant_is_quantized_layer_by_layer(variant: str, classes: int) -> None:
    network = model.build(variant, classes).eval().fuse()
    images = torch.rand(1, 3, SIDE, SIDE)
    config = QuantizationConfig(observer="mse", float_layers=tuple(PREDICTION_LAYERS), merge_upsampling=True)
    quantized = quantize(network, [images], config)
    names = list(quantized_layers(quantized))
    convolutions = [m for m in network.modules() if isinstance(m, torch.nn.Conv2d | torch.nn.ConvTranspose2d)]
    assert len(names) == len(convolutions) and len(float_layers(quantized)) == 6
    shares = multiply_add_shares(quantized, SIDE)
    assert sum(shares.values()) == pytest.approx(1.0) and set(shares) == set(names)
    assert 0 < quantization_errors(quantized, [images], [names])[0] < 1  # scores of an untrained network hardly move
    ranking = rank_layers(
        [LayerSensitivity(name, 1.0) for name in names], LayerCosts.predicted(shares), float_layers(quantized), 0.5
    )
    assert 0 < len(ranking) < len(names) - 6
    freeze(quantized)
    with torch.no_grad():
        (boxes, scores), _ = quantized(images)
    assert scores.shape == (1, 84, classes) and bool(boxes.isfinite().all())


@pytest.mark.parametrize("variant", ["t", "m"])
def test_merging_is_exact_in_every_family_of_widths(variant: str) -> None:
    network = model.build(variant, 2).double().eval().fuse()
    images = torch.rand(1, 3, SIDE, SIDE, dtype=torch.float64)
    with torch.no_grad():
        before, _ = network(images)
        merge_upsampling(network)
        after, _ = network(images)
    for expected, found in zip(before, after, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-9, rtol=0)
