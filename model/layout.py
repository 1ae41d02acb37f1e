"""Arrangements in memory with which a CPU computes the same numbers in less time.

Nothing here has parameters or changes a result beyond the order of float sums. On other devices each function is the
plain operation. What each one gains stands in docs/LOG.md.

Legend: B images, C channels, H and W rows and columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

WIDEST_IMAGE = 4  # channels; with more, a convolution's own kernels are quick


def join(maps: Sequence[Float[Tensor, "B _ H W"]]) -> Float[Tensor, "B channels H W"]:
    """Maps side by side in their channels, each with a gradient of its own in memory.

    The gradients of ``torch.cat`` are strips of one wide map. In channels-last order a strip's rows are a few dozen
    values long, over which torch's elementwise kernels lose up to thirty times a copy's time.
    """
    if maps[0].device.type != "cpu" or not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return torch.cat(list(maps), dim=1)
    joined: Tensor = _Join.apply(*maps)  # type: ignore[no-untyped-call]
    return joined


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *maps: Tensor) -> Tensor:
        ctx.widths = [part.shape[1] for part in maps]
        return torch.cat(maps, dim=1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        order = _order_of(gradient)
        return tuple(part.contiguous(memory_format=order) for part in torch.split(gradient, ctx.widths, dim=1))


def _order_of(maps: Tensor) -> torch.memory_format:
    is_channels_last = maps.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if is_channels_last else torch.contiguous_format


def suits_halving(images: Float[Tensor, "B C H W"]) -> bool:
    """Whether ``halving_convolutions`` is made for these images: on a CPU, few channels, even height and width."""
    channels, height, width = images.shape[1:]
    is_narrow = channels <= WIDEST_IMAGE and height % 2 == 0 and width % 2 == 0
    return images.device.type == "cpu" and is_narrow and not torch.compiler.is_compiling()


def halving_convolutions(
    images: Float[Tensor, "B C H W"],
    kernel_3x3: Float[Tensor, "out C 3 3"],
    kernel_1x1: Float[Tensor, "out C 1 1"],
    bias_1x1: Float[Tensor, " out"] | None,
) -> tuple[Float[Tensor, "B out H//2 W//2"], Float[Tensor, "B out H//2 W//2"]]:
    """Both convolutions with stride 2, the 3x3 one with padding 1 and no bias; channels-last maps come out.

    Two neighbouring columns are taken for one with twice the channels, which in channels-last order is the same
    memory. So nothing but rows is left to halve: a 3x2 kernel takes the place of the 3x3 one, and every second row
    goes through a plain 1x1. oneDNN is slow with three channels in planes, and in channels-last order it writes past
    its buffer in the weight gradient of a strided 1x1 convolution with fewer than 16 (3.12, in torch 2.13).
    """
    pairs = _column_pairs(images)
    wide = functional.conv2d(pairs, _channels_last(_paired_columns(kernel_3x3)), stride=(2, 1))
    rows = _channels_last(pairs[:, :, 1::2, 1:])
    point = functional.conv2d(rows, _channels_last(_paired_columns(kernel_1x1)), bias_1x1)
    return wide, point


def _column_pairs(images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B 2*C H+1 W//2+1"]:
    """Channels-last, with a row of zeros above and a pair of zero columns to the left; channels: left, then right."""
    batch, channels, height, width = images.shape
    bordered = images.new_zeros((batch, height + 1, width + 2, channels))
    bordered[:, 1:, 2:] = images.permute(0, 2, 3, 1)
    pairs = bordered.view(batch, height + 1, width // 2 + 1, 2 * channels).permute(0, 3, 1, 2)
    if torch.is_autocast_enabled("cpu"):  # once for both convolutions
        pairs = pairs.to(torch.get_autocast_dtype("cpu"))
    return pairs


def _paired_columns(kernel: Float[Tensor, "out C k k"]) -> Float[Tensor, "out 2*C k pairs"]:
    """The kernel over pairs of columns: an odd kernel begins at a pair's left column or, 3 wide, at its right one."""
    out_channels, channels, side, _ = kernel.shape
    padding = (1, 0) if side == 3 else (0, 1)
    pairs = functional.pad(kernel, padding).view(out_channels, channels, side, -1, 2)
    return pairs.permute(0, 4, 1, 2, 3).reshape(out_channels, 2 * channels, side, -1)


def _channels_last(maps: Tensor) -> Tensor:
    return maps.contiguous(memory_format=torch.channels_last)
