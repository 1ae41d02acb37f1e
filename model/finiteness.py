"""What became infinite or no number in an optimiser step, in words."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

REMEDY = "lower learning_rate, lengthen warmup_steps or set gradient_clip_norm"


class NotFinite(ValueError):
    """A loss or a gradient is not finite; weights, statistics and average are those before the step."""


def fault_in_losses(losses: Mapping[str, float]) -> str | None:
    """Which of ``loss`` and its parts ``loss_<part>`` is not finite, None when all are."""
    wrong = {name: value for name, value in losses.items() if not math.isfinite(value)}
    parts = [f"{name.removeprefix('loss_')} became {value:g}" for name, value in wrong.items() if name != "loss"]
    if parts:
        return f"the loss part {', '.join(parts)}"
    if wrong:
        return f"the loss became {wrong['loss']:g} although each of its parts is finite"
    return None


@torch.no_grad()
def fault_in_gradients(network: nn.Module, norm: Tensor) -> str | None:
    """Whose gradient makes the norm of all gradients (0-d) infinite or no number, None when it is finite."""
    value = norm.item()
    if math.isfinite(value):
        return None
    largest = {n: p.grad.abs().max().item() for n, p in network.named_parameters() if p.grad is not None}
    wrong = [name for name, size in largest.items() if not math.isfinite(size)]
    if not wrong:
        name = max(largest, key=lambda name: largest[name])
        return f"the gradient norm became {value:g}; the largest gradient is {largest[name]:g}, of {name}"
    share = f" (one of {len(wrong)} parameters)" if len(wrong) > 1 else ""
    return f"the gradient of {wrong[0]}{share} became {largest[wrong[0]]:g}"


def sentence(fault: str, update: int, losses: Mapping[str, float]) -> str:
    """The fault with its optimiser step (the first is 1), the losses of that step and what may help."""
    values = ", ".join(f"{name} {value:g}" for name, value in losses.items())
    return f"optimiser step {update}: {fault} ({values}); {REMEDY}"
