"""Sensitivity finds the layer that was spoiled; the choice of float layers follows its rules."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
from exported_detector import INPUT_SIZE, ExportedDetector, as_input, export_detector

from model.quantization.quantize import float_layers, quantized_layers
from model.quantization.sensitivity import (
    LayerSensitivity,
    choose_float_layers,
    layer_sensitivity,
    multiply_add_shares,
)
from model.yolo_nas import YoloNAS


@pytest.fixture(scope="module")
def detector(golden: object, shared: Path) -> ExportedDetector:
    return export_detector(golden, shared)


def test_a_layer_with_a_ruined_range_is_the_most_sensitive(detector: ExportedDetector) -> None:
    network: YoloNAS = copy.deepcopy(detector.quantized)
    spoiled = "backbone.stage3.blocks.conv1.conv"
    quantized_layers(network)[spoiled].input_amax.mul_(50)
    before = float_layers(network)
    found = layer_sensitivity(network, [as_input(detector.images[:2])])
    assert [layer.name for layer in found] == list(quantized_layers(network))
    assert max(found, key=lambda layer: layer.error).name == spoiled
    assert all(layer.error > 0 for layer in found)
    assert float_layers(network) == before


def test_sensitivity_is_repeatable_and_needs_images(detector: ExportedDetector) -> None:
    batches = [as_input(detector.images[:1])]
    first, second = (layer_sensitivity(detector.quantized, batches) for _ in range(2))
    assert first == second
    with pytest.raises(ValueError, match="at least one batch"):
        layer_sensitivity(detector.quantized, [])


def test_shares_of_multiply_adds(detector: ExportedDetector) -> None:
    shares = multiply_add_shares(detector.quantized, INPUT_SIZE)
    assert sum(shares.values()) == pytest.approx(1.0)
    # same kernel and resolution: the ratio is that of the channels, 16*16*9 against 3*16*9 at a quarter of the area
    stem, block = "backbone.stem.conv.rbr_reparam", "backbone.stage1.blocks.bottlenecks.0.cv1.rbr_reparam"
    assert shares[stem] / shares[block] == pytest.approx(4 * 3 / 16)


def test_shares_of_a_transposed_convolution(detector: ExportedDetector) -> None:
    """Each input pixel meets each weight once: 48 x 48 x 2 x 2 at 3x3, against 24 x 48 x 1 x 1 at 6x6."""
    layers, shares = quantized_layers(detector.quantized), multiply_add_shares(detector.quantized, INPUT_SIZE)
    name = next(name for name in layers if name == "neck.neck1.upsample")
    other = "neck.neck1.reduce_after_concat.conv"
    ratio = layers[name].weight.numel() * 9 / (layers[other].weight.numel() * 36)
    assert shares[name] / shares[other] == pytest.approx(ratio)


SENSITIVITIES = [
    LayerSensitivity("cheap", 0.30),
    LayerSensitivity("dear", 0.50),
    LayerSensitivity("harmless", 0.01),
    LayerSensitivity("twin", 0.30),
]
SHARES = {"cheap": 0.01, "dear": 0.50, "harmless": 0.001, "twin": 0.01}


def test_choice_takes_the_most_error_per_cost_within_the_budget() -> None:
    assert list(choose_float_layers(SENSITIVITIES, SHARES, 0.015)) == ["cheap"]  # equal ratios: network order
    assert list(choose_float_layers(SENSITIVITIES, SHARES, 0.1)) == ["cheap", "twin"]
    assert list(choose_float_layers(SENSITIVITIES, SHARES, 1.0)) == ["cheap", "twin", "dear"]


def test_choice_without_budget_is_empty_and_reasons_are_given() -> None:
    assert choose_float_layers(SENSITIVITIES, SHARES, 0.0) == {}
    assert choose_float_layers([], SHARES, 0.5) == {}
    reason = choose_float_layers(SENSITIVITIES, SHARES, 0.02)["cheap"]
    assert "0.3000" in reason and "1.00 %" in reason


def test_choice_refuses_nonsense() -> None:
    with pytest.raises(ValueError, match="maximum_float_share"):
        choose_float_layers(SENSITIVITIES, SHARES, 1.5)
    with pytest.raises(ValueError, match="twin"):
        choose_float_layers(SENSITIVITIES, {"cheap": 0.1, "dear": 0.1, "harmless": 0.1}, 0.5)
