"""AdamW with the two decay groups of YOLO-NAS training, and learning rates that differ by depth for fine-tuning."""

from __future__ import annotations

from collections.abc import Collection, Iterable

import torch
from torch import nn

# from the input on; whatever follows (the heads, layers added for training) is the last stage
DEPTH_STAGES: tuple[tuple[str, ...], ...] = (
    ("backbone.stem.",),
    ("backbone.stage1.",),
    ("backbone.stage2.",),
    ("backbone.stage3.",),
    ("backbone.stage4.", "backbone.context_module."),
    ("neck.",),
)


def build_optimizer(
    network: nn.Module,
    learning_rate: float,
    weight_decay: float,
    layer_decay: float = 1.0,
    fresh_parameters: Collection[str] = (),
) -> torch.optim.AdamW:
    """AdamW (betas 0.9 and 0.999, eps 1e-8) over the trainable parameters of ``network``.

    Decay applies to kernels only. Everything with at most one dimension (batch-norm weights and biases,
    biases of convolutions, the bottlenecks' shortcut factors ``alpha``, learned quantization scales) is left
    free: these have no redundant scale that decay could remove. The published recipe decays ``alpha`` too.

    ``layer_decay`` and ``fresh_parameters`` make groups of their own for parameters with another learning rate (see
    ``rate_factors``); weight decay, which AdamW multiplies by the rate, falls along with it.

    Raises:
        ValueError: when nothing is trainable or ``weight_decay`` is negative.
    """
    if weight_decay < 0:
        raise ValueError(f"weight_decay must not be negative, got {weight_decay}")
    trainable = {name: parameter for name, parameter in network.named_parameters() if parameter.requires_grad}
    if not trainable:
        raise ValueError("the network has no trainable parameter: unfreeze some before training")
    factors = rate_factors(trainable, layer_decay, fresh_parameters)
    groups = [
        {
            "params": [p for name, p in trainable.items() if (p.ndim > 1) == is_kernel and factors[name] == factor],
            "weight_decay": weight_decay if is_kernel else 0.0,
            "rate_factor": factor,
        }
        for factor in sorted(set(factors.values()))
        for is_kernel in (True, False)
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=learning_rate, fused=True)


def rate_factors(names: Iterable[str], layer_decay: float, fresh_parameters: Collection[str] = ()) -> dict[str, float]:
    """Factor on the learning rate of each parameter: ``layer_decay`` to the number of stages between it and the heads.

    The stages are the stem, the four of the backbone, the neck and the heads. Early layers, whose features are the
    most general, move least (discriminative fine-tuning, arXiv 1801.06146, section 3.2, there by layer of a language
    model). Parameters that start from random values have nothing to keep and get the full rate.
    """
    fresh = frozenset(fresh_parameters)
    return {name: 1.0 if name in fresh else layer_decay ** _stages_before_heads(name) for name in names}


def _stages_before_heads(name: str) -> int:
    for stage, prefixes in enumerate(DEPTH_STAGES):
        if name.startswith(prefixes):
            return len(DEPTH_STAGES) - stage
    return 0


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Give every parameter group this learning rate times its own factor."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group.get("rate_factor", 1.0)
