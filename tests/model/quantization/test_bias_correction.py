"""Corrected layers keep the mean of their output; nothing else about them changes."""

from __future__ import annotations

import copy

import pytest
import torch
from exported_detector import ExportedDetector, as_input
from torch import nn

from model.quantization.bias_correction import correct_biases
from model.quantization.fake_quantize import QuantizedConv2d
from model.quantization.quantize import QuantizationConfig, float_layers, quantize, quantized_layers
from model.quantization.sensitivity import quantization_errors


def test_the_shift_is_the_mean_that_rounding_lost() -> None:
    network = nn.Sequential(QuantizedConv2d.from_float(nn.Conv2d(3, 4, 3)))
    layer = network[0]
    layer.input_amax.fill_(0.8)
    batches = [torch.rand(2, 3, 8, 8), torch.rand(1, 3, 8, 8)]
    with torch.no_grad():
        rounded = torch.cat([layer.rounded_forward(batch) for batch in batches])
        layer.quantizing = False
        plain = torch.cat([layer(batch) for batch in batches])
    layer.quantizing = True
    correct_biases(network, batches)
    torch.testing.assert_close(layer.bias_shift, (plain - rounded).mean(dim=(0, 2, 3)), atol=1e-6, rtol=0)
    with torch.no_grad():
        corrected = torch.cat([layer(batch) for batch in batches])
    torch.testing.assert_close(corrected.mean(dim=(0, 2, 3)), plain.mean(dim=(0, 2, 3)), atol=1e-6, rtol=0)
    before = layer.bias_shift.clone()
    correct_biases(network, batches)
    assert torch.equal(layer.bias_shift, before), "doing it again starts again"


def test_a_detector_errs_less_and_its_float_form_is_untouched(detector: ExportedDetector) -> None:
    network = copy.deepcopy(detector.quantized)
    images, unseen = as_input(detector.images[:8]), as_input(detector.unseen_images)
    in_float = float_layers(network)
    int8 = [name for name in quantized_layers(network) if name not in in_float]
    plain, nothing = quantization_errors(network, [unseen], [int8, ()])
    correct_biases(network, [images])
    corrected, still_nothing = quantization_errors(network, [unseen], [int8, ()])
    assert corrected < plain and still_nothing == nothing == 0.0
    assert float_layers(network) == in_float


def test_the_correction_of_a_layer_does_not_depend_on_the_others(detector: ExportedDetector) -> None:
    images = as_input(detector.images[:2])
    first, second = (
        quantize(detector.floating, [images], QuantizationConfig(float_layers=patterns))
        for patterns in ((), ("backbone.*",))
    )
    for network in (first, second):
        correct_biases(network, [images])
    for name, layer in quantized_layers(first).items():
        assert torch.equal(layer.bias_shift, quantized_layers(second)[name].bias_shift)


def test_no_batch_is_refused(detector: ExportedDetector) -> None:
    with pytest.raises(ValueError, match="at least one batch"):
        correct_biases(copy.deepcopy(detector.quantized), [])
