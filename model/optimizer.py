"""AdamW with the two decay groups of YOLO-NAS training."""

from __future__ import annotations

import torch
from torch import nn


def build_optimizer(network: nn.Module, learning_rate: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW (betas 0.9 and 0.999, eps 1e-8) over the trainable parameters of ``network``.

    Decay applies to kernels only. Everything with at most one dimension (batch-norm weights and biases,
    biases of convolutions, the bottlenecks' shortcut factors ``alpha``, learned quantization scales) is left
    free: these have no redundant scale that decay could remove. The published recipe decays ``alpha`` too.

    Raises:
        ValueError: when nothing is trainable or ``weight_decay`` is negative.
    """
    if weight_decay < 0:
        raise ValueError(f"weight_decay must not be negative, got {weight_decay}")
    trainable = [parameter for parameter in network.parameters() if parameter.requires_grad]
    if not trainable:
        raise ValueError("the network has no trainable parameter: unfreeze some before training")
    groups = [
        {"params": [p for p in trainable if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trainable if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=learning_rate, fused=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Give every parameter group the same learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
