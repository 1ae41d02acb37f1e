"""One optimiser step: loss, gradient, clipping, update, average."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from model import processes
from model.ema import ExponentialMovingAverage
from model.optimizer import build_optimizer, set_learning_rate
from model.training_state import TrainedParts

if TYPE_CHECKING:
    from model.data.loader import Batch
    from model.loss import Targets

PRECISIONS = ("float32", "bfloat16")
NARROWEST_CHANNELS_LAST = 16  # input channels

# network, images (B, 3, H, W) float in [0, 1], targets, share of the training that is done in [0, 1)
# -> loss to minimise, its parts for the record (0-d)
ComputeLoss = Callable[[nn.Module, Tensor, "Targets", float], tuple[Tensor, dict[str, Tensor]]]


class Learner:
    """A network with its optimiser and its average, which learns from one batch at a time.

    Args:
        network: trained in place; moved to ``device`` and to channels-last memory order.
        compute_loss: loss of a batch.
        weight_decay: decay of kernels.
        ema_decay: long-run decay of the averaged weights.
        gradient_clip_norm: largest gradient norm, 0 for no limit.
        precision: "float32", or "bfloat16" for convolutions in mixed precision; weights, their gradients and
            the average stay float32.
        device: where to train.

    Raises:
        ValueError: for an unknown precision.
    """

    def __init__(
        self,
        network: nn.Module,
        compute_loss: ComputeLoss,
        *,
        weight_decay: float,
        ema_decay: float,
        gradient_clip_norm: float,
        precision: str,
        device: torch.device,
    ) -> None:
        if precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
        _use_channels_last(network.to(device))
        self.network, self.compute_loss, self.device = network, compute_loss, device
        self.gradient_clip_norm, self.precision = gradient_clip_norm, precision
        self.average = ExponentialMovingAverage(network, ema_decay)
        self.optimizer = build_optimizer(network, learning_rate=0.0, weight_decay=weight_decay)
        self._trained = processes.averaging_gradients(network, device)

    @property
    def parts(self) -> TrainedParts:
        """Everything ``step`` changes."""
        return TrainedParts(self.network, self.average.network, self.optimizer)

    def step(self, batch: Batch, learning_rate: float, update: int, progress: float = 0.0) -> dict[str, float]:
        """Optimiser step number ``update`` (the first is 1), on ``batch``; gives the loss and its parts.

        Raises:
            ValueError: when the loss or its gradient is not finite; the weights are then unchanged.
        """
        set_learning_rate(self.optimizer, learning_rate)
        self.optimizer.zero_grad(set_to_none=True)
        images, targets = self._as_input(batch.images), batch.targets.to(self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bfloat16"):
            loss, parts = self.compute_loss(self._trained, images, targets, progress)
        losses = _as_numbers({"loss": loss, **{f"loss_{name}": part for name, part in parts.items()}})
        _require_finite("loss", losses["loss"], update, losses)
        loss.backward()  # type: ignore[no-untyped-call]
        norm = torch.nn.utils.clip_grad_norm_(self.network.parameters(), self.gradient_clip_norm or torch.inf)
        _require_finite("gradient norm", norm.item(), update, losses)
        self.optimizer.step()
        self.average.update(self.network, update)
        return losses

    def _as_input(self, images: Tensor) -> Tensor:
        images = images.to(self.device, non_blocking=True)
        if self.device.type != "cpu":
            images = images.contiguous(memory_format=torch.channels_last)
        return images.float().div_(255.0)


@torch.no_grad()
def _use_channels_last(network: nn.Module) -> None:
    """Keep kernels, and with them the maps they make, in channels-last order: 0 to 17 % less time on a CPU.

    Narrow kernels of the CPU are left out, and its images too: with fewer than 16 input channels in this
    order, oneDNN 3.12 (in torch 2.13) writes past its buffer in the weight gradient of a strided 1x1
    convolution, which is what the network's stem has.
    """
    for parameter in network.parameters():
        wide = parameter.ndim == 4 and parameter.shape[1] >= NARROWEST_CHANNELS_LAST
        if wide or (parameter.ndim == 4 and parameter.device.type != "cpu"):
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)


def _as_numbers(losses: dict[str, Tensor]) -> dict[str, float]:
    """All values in one transfer from the device."""
    values = torch.stack([value.detach().float() for value in losses.values()]).tolist()
    return dict(zip(losses, values, strict=True))


def _require_finite(what: str, value: float, update: int, losses: dict[str, float]) -> None:
    if value - value != 0.0:  # NaN and both infinities
        parts = ", ".join(f"{name} {part:g}" for name, part in losses.items())
        raise ValueError(
            f"the {what} became {value:g} at optimiser step {update} ({parts}); lower learning_rate, "
            "lengthen warmup_steps or set gradient_clip_norm"
        )
