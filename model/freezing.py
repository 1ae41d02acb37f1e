"""Layers that a training leaves as they are."""

from __future__ import annotations

import contextlib
import fnmatch
import logging
from collections.abc import Iterator, Sequence

from torch import nn

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def frozen_layers(network: nn.Module, patterns: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """Inside the block the layers that match keep their parameters, and optimisers built there leave them out.

    A pattern is a shell pattern of names as ``named_modules`` gives them, such as ``backbone.stem`` or
    ``backbone.stage[12]``; a layer that matches is frozen with all that is in it. Gives the names of those layers:
    their batch norms stand still only in evaluation mode, which is for the caller to set (``eval_mode``).

    Raises:
        ValueError: for a pattern that matches no layer with a parameter.
    """
    names = tuple(dict.fromkeys(name for pattern in patterns for name in matching_layers(network, pattern)))
    inside = [parameter for name in names for parameter in network.get_submodule(name).parameters()]
    frozen = [parameter for parameter in inside if parameter.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(False)
    if names:
        total = sum(parameter.numel() for parameter in network.parameters())
        count = sum(parameter.numel() for parameter in network.parameters() if not parameter.requires_grad)
        logger.info("freeze: %d of %d parameters stay as they are (%.1f %%)", count, total, 100 * count / total)
    try:
        yield names
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)


def eval_mode(network: nn.Module, names: Sequence[str]) -> None:
    """Put these layers into evaluation mode: their batch norms use and keep the statistics they have."""
    for name in names:
        network.get_submodule(name).eval()


def matching_layers(network: nn.Module, pattern: str) -> list[str]:
    """Names of the layers with parameters that match; ``ValueError``, naming the outermost layers, for none."""
    layers = [name for name, layer in network.named_modules() if name and any(True for _ in layer.parameters())]
    matches = [name for name in layers if fnmatch.fnmatchcase(name, pattern)]
    if not matches:
        outermost = ", ".join(name for name in layers if name.count(".") < 2)
        raise ValueError(f"freeze: {pattern!r} matches no layer; the outermost ones are {outermost}")
    return matches
