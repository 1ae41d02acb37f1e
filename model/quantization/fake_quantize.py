"""Convolutions that compute in float but round their input and weight as the INT8 engine will.

Legend: N batch, I input channels, O output channels, K kernel side, H, W height and width.

The rounding is torch's own ``fake_quantize`` operator: it exports to QuantizeLinear/DequantizeLinear and its gradient
is the straight-through estimator (arXiv 1308.3432), 1 inside the range and 0 outside.

* Input: one symmetric scale for the whole tensor, int8 with zero point 0, range calibrated once and then held. Moving
  ranges would make an interrupted training depend on when it was interrupted and gain nothing at the small learning
  rates of quantization-aware training.
* Bias: in float, plus a fixed shift that applies in INT8 alone (``bias_correction``).
* Weight: one symmetric scale per output channel (axis 0; axis 1 for a transposed convolution), always computed from
  the present weight. So scale and weight cannot disagree after an optimiser step, an average (EMA) or a reload, no
  weight is ever clipped, and the scales need no place in the state dict.

What is switched on is kept in plain Python attributes, not in tensors: exporters can read it without a graph break.
"""

from __future__ import annotations

from typing import Self

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from model.quantization import QUANTIZED_MAXIMUM, QUANTIZED_MINIMUM, SMALLEST_SCALE


class _QuantizedConvolution(nn.Module):
    """What both kinds of convolution share: the calibrated input range and the switches."""

    weight: Tensor
    bias: Tensor | None
    input_amax: Tensor
    bias_shift: Tensor
    """Added to the bias where the layer rounds; 0 until ``bias_correction`` has measured it."""
    weight_axis: int
    frozen_weight_scale: Tensor | None
    frozen_bias: Tensor | None
    weight_zero_point: Tensor

    quantizing: bool = True
    """False leaves the layer in float, as selective quantization asks for."""
    float_reason: str = ""
    """Why the layer stays in float; empty when it does not."""
    frozen_input_scale: float | None = None

    def _add_ranges(self) -> None:
        device, channels = self.weight.device, self.weight.shape[self.weight_axis]
        self.register_buffer("input_amax", torch.zeros((), device=device))
        self.register_buffer("bias_shift", torch.zeros(channels, device=device))
        zero_point = torch.zeros(channels, dtype=torch.int32, device=device)
        self.register_buffer("weight_zero_point", zero_point, persistent=False)
        self.register_buffer("frozen_weight_scale", None, persistent=False)
        self.register_buffer("frozen_bias", None, persistent=False)

    def input_scale(self) -> Float[Tensor, ""]:
        """Step of the input grid, never below ``SMALLEST_SCALE``."""
        return (self.input_amax / QUANTIZED_MAXIMUM).clamp(min=SMALLEST_SCALE)

    def weight_scale(self) -> Float[Tensor, " O"]:
        """Step of the weight grid of every output channel, never below ``SMALLEST_SCALE``."""
        other_axes = [axis for axis in range(4) if axis != self.weight_axis]
        amax = self.weight.detach().float().abs().amax(dim=other_axes)
        return (amax / QUANTIZED_MAXIMUM).clamp(min=SMALLEST_SCALE)

    def freeze(self) -> None:
        """Turn scales and bias into constants, so that an exporter writes numbers and not the way to compute them."""
        self.frozen_input_scale = float(self.input_scale())
        self.frozen_weight_scale = self.weight_scale()
        self.frozen_bias = self._shifted_bias().detach()

    def unfreeze(self) -> None:
        """Let the scales follow the weights and the calibrated range again."""
        self.frozen_input_scale = None
        self.frozen_weight_scale = None
        self.frozen_bias = None

    def _shifted_bias(self) -> Tensor:
        if self.frozen_bias is not None:
            return self.frozen_bias
        return self.bias_shift if self.bias is None else self.bias + self.bias_shift

    def _rounded_input(self, values: Tensor) -> Tensor:
        if self.frozen_input_scale is not None:
            return torch.fake_quantize_per_tensor_affine(
                values, self.frozen_input_scale, 0, QUANTIZED_MINIMUM, QUANTIZED_MAXIMUM
            )
        return torch.fake_quantize_per_tensor_affine(
            values, self.input_scale(), self.weight_zero_point[:1].squeeze(0), QUANTIZED_MINIMUM, QUANTIZED_MAXIMUM
        )

    def _rounded_weight(self) -> Tensor:
        scale = self.weight_scale() if self.frozen_weight_scale is None else self.frozen_weight_scale
        return torch.fake_quantize_per_channel_affine(
            self.weight, scale, self.weight_zero_point, self.weight_axis, QUANTIZED_MINIMUM, QUANTIZED_MAXIMUM
        )


class QuantizedConv2d(_QuantizedConvolution, nn.Conv2d):
    """``nn.Conv2d`` with rounded input and weight; the same parameters under the same names, plus ``input_amax``."""

    weight_axis = 0

    @classmethod
    def from_float(cls, convolution: nn.Conv2d) -> Self:
        """Take over the parameters (not copies) of a float convolution; its range is not calibrated yet."""
        quantized = cls(
            convolution.in_channels,
            convolution.out_channels,
            _pair(convolution.kernel_size),
            stride=_pair(convolution.stride),
            padding=_pair(convolution.padding),
            dilation=_pair(convolution.dilation),
            groups=convolution.groups,
            bias=convolution.bias is not None,
            padding_mode=convolution.padding_mode,
            device="meta",
        )
        quantized.weight, quantized.bias = convolution.weight, convolution.bias
        quantized._add_ranges()
        return quantized.train(convolution.training)

    def forward(self, input: Float[Tensor, "N I H W"]) -> Float[Tensor, "N O h w"]:
        """Convolution of the rounded input with the rounded weight; in float when ``quantizing`` is off."""
        return self.rounded_forward(input) if self.quantizing else nn.Conv2d.forward(self, input)

    def rounded_forward(self, input: Float[Tensor, "N I H W"]) -> Float[Tensor, "N O h w"]:
        """As ``forward`` with ``quantizing`` on."""
        output: Tensor = self._conv_forward(self._rounded_input(input), self._rounded_weight(), self._shifted_bias())
        return output


class QuantizedConvTranspose2d(_QuantizedConvolution, nn.ConvTranspose2d):
    """``nn.ConvTranspose2d`` with rounded input and weight; its output channels are axis 1 of the weight."""

    weight_axis = 1

    @classmethod
    def from_float(cls, convolution: nn.ConvTranspose2d) -> Self:
        """Take over the parameters (not copies) of a float convolution; its range is not calibrated yet."""
        if convolution.groups != 1:
            raise ValueError(f"a transposed convolution with {convolution.groups} groups has no per-channel INT8 form")
        quantized = cls(
            convolution.in_channels,
            convolution.out_channels,
            _pair(convolution.kernel_size),
            stride=_pair(convolution.stride),
            padding=_pair(convolution.padding),
            output_padding=_pair(convolution.output_padding),
            bias=convolution.bias is not None,
            dilation=_pair(convolution.dilation),
            device="meta",
        )
        quantized.weight, quantized.bias = convolution.weight, convolution.bias
        quantized._add_ranges()
        return quantized.train(convolution.training)

    def forward(
        self, input: Float[Tensor, "N I H W"], output_size: list[int] | None = None
    ) -> Float[Tensor, "N O h w"]:
        """Transposed convolution of the rounded input with the rounded weight; in float when ``quantizing`` is off."""
        if not self.quantizing:
            return nn.ConvTranspose2d.forward(self, input, output_size)
        assert output_size is None, "a quantized transposed convolution has one output size"
        return self.rounded_forward(input)

    def rounded_forward(self, input: Float[Tensor, "N I H W"]) -> Float[Tensor, "N O h w"]:
        """As ``forward`` with ``quantizing`` on."""
        return functional.conv_transpose2d(
            self._rounded_input(input),
            self._rounded_weight(),
            self._shifted_bias(),
            _pair(self.stride),
            _pair(self.padding),
            _pair(self.output_padding),
            self.groups,
            _pair(self.dilation),
        )


QuantizedConvolution = QuantizedConv2d | QuantizedConvTranspose2d


def _pair(values: str | tuple[int, ...]) -> tuple[int, int]:
    assert not isinstance(values, str), "torch keeps padding as two numbers except for 'same' and 'valid', unused here"
    first, second = values
    return first, second
