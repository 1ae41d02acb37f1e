"""Sensitivity finds the layer that was spoiled, and its short cuts change no number."""

from __future__ import annotations

import copy

import pytest
import torch
from exported_detector import INPUT_SIZE, ExportedDetector, as_input

from model.quantization.quantize import float_layers, quantized_layers, set_float_layers
from model.quantization.sensitivity import (
    _ConfidentAnchors,
    layer_sensitivity,
    multiply_add_shares,
    quantization_errors,
)
from model.yolo_nas import YoloNAS


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


def test_remembered_outputs_change_no_error(detector: ExportedDetector) -> None:
    """Each layer measured by full passes of the network, against the pass that leaves out what comes before it."""
    images = as_input(detector.images[:2])
    names = [*list(quantized_layers(detector.quantized))[::9], "heads.head3.reg_pred"]
    found = {layer.name: layer.error for layer in layer_sensitivity(detector.quantized, [images])}
    with torch.no_grad():
        for name in names:
            network = copy.deepcopy(detector.quantized)
            set_float_layers(network, dict.fromkeys(quantized_layers(network), "test"))
            reference = _ConfidentAnchors(network, images)
            quantized_layers(network)[name].quantizing = True
            assert found[name] == reference.error(network, images)


def test_errors_of_several_layers_together(detector: ExportedDetector) -> None:
    names = list(quantized_layers(detector.quantized))
    batches = [as_input(detector.images[:1]), as_input(detector.images[1:2])]
    nothing, first, everything = quantization_errors(detector.quantized, batches, [(), names[:1], names])
    assert nothing == 0.0 < first < everything
    assert first == layer_sensitivity(detector.quantized, batches)[0].error
    with torch.no_grad():  # the layers compute again, they do not repeat what was remembered
        assert torch.equal(*(detector.quantized(batch)[0][1] for batch in (batches[0], batches[0].clone())))
        assert not torch.equal(*(detector.quantized(batch)[0][1] for batch in batches))
