"""The rounding convolutions: forward against integers, gradients, switches."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from model.quantization import SMALLEST_SCALE
from model.quantization.fake_quantize import QuantizedConv2d, QuantizedConvTranspose2d


def calibrated(convolution: nn.Conv2d, amax: float) -> QuantizedConv2d:
    quantized = QuantizedConv2d.from_float(convolution)
    quantized.input_amax.fill_(amax)
    return quantized


def test_convolution_equals_integer_arithmetic() -> None:
    convolution = nn.Conv2d(5, 7, 3, stride=2, padding=1)
    quantized = calibrated(convolution, 2.0)
    images = torch.randn(2, 5, 8, 8)
    step, steps = 2.0 / 127, quantized.weight_scale()
    integers = (images / step).round().clamp(-128, 127).double()
    weights = (convolution.weight / steps[:, None, None, None]).round().double()
    sums = nn.functional.conv2d(integers, weights, stride=2, padding=1) * (step * steps.double())[:, None, None]
    assert convolution.bias is not None
    expected = sums + convolution.bias.double()[:, None, None]
    torch.testing.assert_close(quantized(images).double(), expected, atol=1e-5, rtol=0)  # float32 summation


def test_transposed_convolution_has_a_scale_per_output_channel() -> None:
    convolution = nn.ConvTranspose2d(3, 6, 2, 2)
    quantized = QuantizedConvTranspose2d.from_float(convolution)
    quantized.input_amax.fill_(1.0)
    assert quantized.weight_scale().shape == (6,)
    torch.testing.assert_close(quantized.weight_scale() * 127, convolution.weight.abs().amax((0, 2, 3)))
    images = torch.randn(1, 3, 4, 4).clamp(-1, 1)
    assert quantized(images).shape == (1, 6, 8, 8)
    torch.testing.assert_close(quantized(images), convolution(images), atol=0.03, rtol=0)  # a few steps of 1/127


def test_gradient_passes_inside_the_range_and_stops_outside() -> None:
    convolution = nn.Conv2d(1, 1, 1, bias=False)
    nn.init.ones_(convolution.weight)
    quantized = calibrated(convolution, 1.0)
    values = torch.tensor([-2.0, -0.7, 0.0, 0.3, 0.99, 1.5]).reshape(1, 1, 1, -1).requires_grad_()
    quantized(values).sum().backward()
    assert values.grad is not None
    assert values.grad.flatten().tolist() == pytest.approx([0, 1, 1, 1, 1, 0])


def test_every_weight_gets_a_gradient() -> None:
    quantized = calibrated(nn.Conv2d(3, 4, 3), 1.0)
    quantized(torch.rand(1, 3, 6, 6)).square().sum().backward()
    assert quantized.weight.grad is not None and bool((quantized.weight.grad != 0).all())


def test_scales_are_never_subnormal_in_half_precision() -> None:
    convolution = nn.Conv2d(2, 3, 1)
    nn.init.constant_(convolution.weight, 1e-7)
    quantized = calibrated(convolution, 1e-6)
    assert float(quantized.input_scale()) == SMALLEST_SCALE
    assert quantized.weight_scale().tolist() == [SMALLEST_SCALE] * 3
    smallest_normal = torch.finfo(torch.float16).tiny
    assert quantized.weight_scale().half().min() >= smallest_normal


def test_switched_off_it_is_the_float_convolution_to_the_bit() -> None:
    convolution = nn.Conv2d(3, 4, 3, padding=1)
    quantized = calibrated(convolution, 0.5)
    quantized.quantizing = False
    images = torch.randn(1, 3, 8, 8)
    assert torch.equal(quantized(images), convolution(images))


def test_freezing_changes_no_number_and_no_state() -> None:
    quantized = calibrated(nn.Conv2d(3, 4, 3), 0.7)
    images = torch.rand(1, 3, 8, 8)
    before, state_before = quantized(images), copy.deepcopy(quantized.state_dict())
    quantized.freeze()
    torch.testing.assert_close(quantized(images), before, atol=1e-7, rtol=1e-6)  # one rounding of the scale
    assert quantized.state_dict().keys() == state_before.keys()
    nn.init.zeros_(quantized.weight)
    assert float(quantized.weight_scale().max()) == SMALLEST_SCALE
    quantized.unfreeze()
    assert quantized.frozen_weight_scale is None and quantized.frozen_input_scale is None


def test_scale_follows_the_weight_until_frozen() -> None:
    quantized = calibrated(nn.Conv2d(1, 1, 1), 1.0)
    with torch.no_grad():
        quantized.weight.fill_(254.0)
    assert quantized.weight_scale().item() == pytest.approx(2.0)


def test_state_holds_the_float_names_the_range_and_the_shift() -> None:
    assert set(calibrated(nn.Conv2d(1, 1, 1), 1.0).state_dict()) == {"weight", "bias", "input_amax", "bias_shift"}


@pytest.mark.parametrize(
    "convolution", [nn.Conv2d(2, 3, 1), nn.Conv2d(2, 3, 1, bias=False), nn.ConvTranspose2d(2, 3, 2, 2)]
)
def test_the_shift_counts_in_int8_alone_frozen_or_not(convolution: nn.Conv2d | nn.ConvTranspose2d) -> None:
    kind = QuantizedConv2d if isinstance(convolution, nn.Conv2d) else QuantizedConvTranspose2d
    quantized = kind.from_float(convolution)  # type: ignore[arg-type]
    quantized.input_amax.fill_(1.0)
    images = torch.rand(1, 2, 4, 4)
    before = quantized(images)
    shift = torch.tensor([0.5, -1.0, 0.0])
    quantized.bias_shift.copy_(shift)
    torch.testing.assert_close(quantized(images) - before, shift[:, None, None].expand_as(before))
    shifted = quantized(images)
    quantized.freeze()
    assert torch.equal(quantized(images), shifted)
    quantized.quantizing = False
    assert torch.equal(quantized(images), convolution(images))


def test_copy_keeps_the_switches() -> None:
    quantized = calibrated(nn.Conv2d(1, 1, 1), 1.0)
    quantized.quantizing, quantized.float_reason = False, "because"
    twin = copy.deepcopy(quantized)
    assert (twin.quantizing, twin.float_reason) == (False, "because")


def test_grouped_transposed_convolution_is_refused() -> None:
    with pytest.raises(ValueError, match="2 groups"):
        QuantizedConvTranspose2d.from_float(nn.ConvTranspose2d(4, 4, 2, groups=2))
