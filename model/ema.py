"""Exponential moving average of a network's weights and statistics."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn


def threshold_decay(decay: float, update: int) -> float:
    """Decay of update number ``update`` (the first is 1): short memory at first, ``decay`` later on."""
    return min(decay, (1 + update) / (10 + update))


class ExponentialMovingAverage:
    """A copy of the network whose floating-point state follows ``average = d * average + (1 - d) * current``.

    Parameters and floating-point buffers (batch-norm statistics, quantization ranges) are averaged; other
    buffers (counters, flags) cannot be averaged and are copied, so that the copy is a state the network could
    have had. ``decay=0`` makes the average equal to the network.

    Args:
        network: the network to follow; its own weights are never changed here.
        decay: long-run decay, in [0, 1).

    Raises:
        ValueError: when ``decay`` is out of range.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"ema_decay must lie in [0, 1), got {decay}")
        self.decay = decay
        self.network = copy.deepcopy(network).eval().requires_grad_(False)
        self._averages = _state(self.network)

    @torch.no_grad()
    def update(self, network: nn.Module, update: int) -> None:
        """Follow ``network`` after its optimiser step number ``update`` (the first is 1)."""
        averages, currents = [], []
        for average, current in zip(self._averages, _state(network), strict=True):
            if average.is_floating_point():
                averages.append(average)
                currents.append(current)
            else:
                average.copy_(current)
        # lerp keeps the average exactly where it is when both are equal
        torch._foreach_lerp_(averages, currents, 1.0 - threshold_decay(self.decay, update))


def _state(network: nn.Module) -> list[Tensor]:
    return [tensor.detach() for tensor in (*network.parameters(), *network.buffers())]
