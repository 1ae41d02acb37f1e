"""A quantization-hostile layer: the same network in float, a drop in INT8, found and mended by leaving it in float."""

from __future__ import annotations

import copy

import pytest
import torch
from exported_detector import CALIBRATION_IMAGES, ExportedDetector, as_input

import model
from model.quantization.quantize import QuantizationConfig, float_layers, quantize, quantized_layers
from model.quantization.sensitivity import layer_sensitivity, quantization_errors
from model.quantization.uneven_channels import spread_channels

BOTTLENECK = "backbone.stage2.blocks.bottlenecks.0"
OCTAVES = 12.0


def test_int8_loses_what_float_does_not_and_selection_finds_the_layer(detector: ExportedDetector) -> None:
    hostile = copy.deepcopy(detector.floating)
    layer = spread_channels(hostile, BOTTLENECK, OCTAVES)
    images = as_input(detector.images[:2])
    with torch.no_grad():
        (boxes, scores), _ = detector.floating(images)
        (same_boxes, same_scores), _ = hostile(images)
    torch.testing.assert_close(same_boxes, boxes, atol=2e-3, rtol=0)  # pixels; float32 sums of uneven terms
    torch.testing.assert_close(same_scores, scores, atol=1e-5, rtol=0)

    rounded = quantize(hostile, [as_input(detector.images[:CALIBRATION_IMAGES])], QuantizationConfig())
    most = max(layer_sensitivity(rounded, [images]), key=lambda found: found.error)
    assert most.name == layer
    int8 = set(quantized_layers(rounded)) - set(float_layers(rounded))
    (even,) = quantization_errors(detector.quantized, [images], [int8])
    uneven, mended = quantization_errors(rounded, [images], [int8, int8 - {layer}])
    assert uneven > 2 * even
    assert mended == pytest.approx(even, rel=0.25)


def test_only_folded_bottlenecks_can_be_spread() -> None:
    network = model.build("pico", 2)
    with pytest.raises(ValueError, match=r"call fuse\(\) first"):
        spread_channels(network, BOTTLENECK, OCTAVES)
    with pytest.raises(ValueError, match=r"stem is a .*, not a Bottleneck"):
        spread_channels(network, "backbone.stem", OCTAVES)
