"""Bias correction: rounding must not shift the mean of a layer's output.

The errors of a layer's rounded weights and of its clipped inputs do not average out: every output channel is off by a
constant. That constant is measured on calibration images and taken off the bias (arXiv 1906.04721, section 4.2). What
we do differently: each layer is measured on the inputs that it has in the float network, all of them in one pass, so
the correction of a layer depends on that layer alone and holds whichever others stay in float.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from model import processes
from model.quantization.fake_quantize import QuantizedConvolution
from model.quantization.quantize import only_quantized, quantized_layers


@torch.no_grad()
def correct_biases(model: nn.Module, batches: Iterable[Float[Tensor, "B 3 S S"]]) -> None:
    """Set the shift of every calibrated layer, those that stay in float at present too, in place.

    batches: training images in [0, 1]; of several processes, the share of this one. All end with the same shifts, to
    the bit those of one process with every batch. Raises ValueError for no batch.
    """
    layers = quantized_layers(model)
    device = next(model.parameters()).device
    for layer in layers.values():
        layer.bias_shift.zero_()
    own = [_sums_on(model, layers, images.to(device)) for images in batches]
    shares = processes.from_first(processes.gathered_by_first(own))
    together = [sums for turn in itertools.zip_longest(*shares) for sums in turn if sums is not None]
    if not together:
        raise ValueError("correcting biases needs at least one batch of calibration images, got none")
    for name, layer in layers.items():
        total = torch.stack([sums[name][0] for sums in together]).sum(dim=0)
        layer.bias_shift.copy_(total / sum(sums[name][1] for sums in together))


Sums = dict[str, tuple[Tensor, int]]


def _sums_on(model: nn.Module, layers: dict[str, QuantizedConvolution], images: Float[Tensor, "B 3 S S"]) -> Sums:
    """For every layer: float minus rounded output, summed for each channel in float64, and over how many values."""
    sums: Sums = {}

    def compare(
        name: str, layer: QuantizedConvolution, inputs: tuple[Tensor, ...], output: Float[Tensor, "N O h w"]
    ) -> None:
        lost = (output - layer.rounded_forward(inputs[0])).double()
        sums[name] = lost.sum(dim=(0, 2, 3)).cpu(), lost[:, 0].numel()

    handles = [layer.register_forward_hook(functools.partial(compare, name)) for name, layer in layers.items()]
    try:
        with only_quantized(model, ()):
            model(images)
    finally:
        for handle in handles:
            handle.remove()
    return sums
