"""Batch norm with the statistics of every training process's share of the batch, for the CPU.

torch's ``SyncBatchNorm`` refuses the CPU. With this one, processes that train on one batch together compute what one
process computes on the whole batch, up to the order of float32 sums, whatever the sizes of their shares.

Shape legend: B pictures of this process, C channels.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, distributed, nn


class SynchronizedBatchNorm2d(nn.BatchNorm2d):
    """``BatchNorm2d`` that in training mode normalises with mean and variance over all processes.

    In evaluation mode, and once the processes have parted, it is an ordinary batch norm.
    """

    def forward(self, input: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        if not (self.training and distributed.is_initialized()):
            return super().forward(input)
        assert self.running_mean is not None and self.running_var is not None and self.momentum is not None
        output, mean, variance, count = _Normalize.apply(input, self.weight, self.bias, self.eps)  # type: ignore[no-untyped-call]
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * (count / (count - 1)), self.momentum)
            if self.num_batches_tracked is not None:
                self.num_batches_tracked.add_(1)
        normalised: Tensor = output
        return normalised


class _Normalize(torch.autograd.Function):
    """Sums that decide the result are added over all processes, forward and backward."""

    @staticmethod
    def forward(
        ctx: Any, pictures: Float[Tensor, "B C H W"], weight: Float[Tensor, " C"], bias: Float[Tensor, " C"], eps: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Normalised pictures, then mean, biased variance and number of values per channel over all processes.

        The variance takes a second round: the mean of squares minus the squared mean would lose its digits.
        """
        values = pictures.to(torch.promote_types(pictures.dtype, torch.float32))
        count = values.new_tensor([values.numel() / values.shape[1]])
        sums = torch.cat([values.sum(dim=(0, 2, 3)), count])
        distributed.all_reduce(sums)
        mean, count = sums[:-1] / sums[-1], sums[-1]
        centred = values - _per_channel(mean)
        squares = centred.square().sum(dim=(0, 2, 3))
        distributed.all_reduce(squares)
        variance = squares / count
        inverse_deviation = torch.rsqrt(variance + eps)
        standardised = centred * _per_channel(inverse_deviation)
        ctx.save_for_backward(standardised, weight, inverse_deviation, count)
        ctx.mark_non_differentiable(mean, variance, count)
        output = standardised * _per_channel(weight) + _per_channel(bias)
        return output.to(pictures.dtype), mean, variance, count

    @staticmethod
    def backward(ctx: Any, gradient: Float[Tensor, "B C H W"], *_: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        """Gradients of weight and bias are this process's alone: they are averaged like all other gradients."""
        standardised, weight, inverse_deviation, count = ctx.saved_tensors
        upstream = gradient.to(standardised.dtype)
        bias_gradient = upstream.sum(dim=(0, 2, 3))
        weight_gradient = (upstream * standardised).sum(dim=(0, 2, 3))
        sums = torch.stack([bias_gradient, weight_gradient])
        distributed.all_reduce(sums)
        shift, slope = (_per_channel(total / count) for total in sums)
        pictures_gradient = (upstream - shift - standardised * slope) * _per_channel(weight * inverse_deviation)
        return pictures_gradient.to(gradient.dtype), weight_gradient, bias_gradient, None


def _per_channel(values: Float[Tensor, " C"]) -> Float[Tensor, "1 C 1 1"]:
    return values[None, :, None, None]


def synchronize_norms(network: nn.Module) -> None:
    """Put a synchronized norm in the place of every batch norm; weights and statistics stay the same tensors."""
    _replace(network, nn.BatchNorm2d, SynchronizedBatchNorm2d)


def separate_norms(network: nn.Module) -> None:
    """Put ordinary batch norms back, also for torch's ``SyncBatchNorm``: code that folds norms looks for those."""
    _replace(network, SynchronizedBatchNorm2d, nn.BatchNorm2d)
    _replace(network, nn.SyncBatchNorm, nn.BatchNorm2d)


def _replace(network: nn.Module, old: type[nn.Module], new: type[nn.BatchNorm2d]) -> None:
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is old:
                setattr(parent, name, _as(new, child))


def _as(kind: type[nn.BatchNorm2d], norm: Any) -> nn.BatchNorm2d:
    """A norm of another kind around the same tensors."""
    replacement = kind(norm.num_features, norm.eps, norm.momentum, device="meta")
    replacement.weight, replacement.bias = norm.weight, norm.bias
    replacement.running_mean, replacement.running_var = norm.running_mean, norm.running_var
    replacement.num_batches_tracked = norm.num_batches_tracked
    return replacement.train(norm.training)
