"""One optimiser step: loss, gradient, clipping, update, average."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from model import processes
from model.ema import ExponentialMovingAverage
from model.finiteness import NotFinite, fault_in_gradients, fault_in_losses, sentence
from model.freezing import eval_mode
from model.loss import recorded_normalizers
from model.optimizer import build_optimizer, set_learning_rate
from model.precision import resolve
from model.training_state import TrainedParts

if TYPE_CHECKING:
    from model.data.loader import Batch
    from model.loss import Targets

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
            the average stay float32. "auto" is bfloat16 where the device has instructions for it.
        device: where to train.
        layer_decay: factor on the learning rate for each stage away from the heads.
        fresh_parameters: names of parameters that have the full rate wherever they are.
        frozen: names of layers whose norms stand still (see ``freezing.frozen_layers``).

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
        layer_decay: float = 1.0,
        fresh_parameters: Sequence[str] = (),
        frozen: Sequence[str] = (),
    ) -> None:
        self.precision = resolve(precision, device)
        _use_channels_last(network.to(device))
        self.network, self.compute_loss, self.device = network, compute_loss, device
        self.gradient_clip_norm, self.frozen = gradient_clip_norm, frozen
        self.average = ExponentialMovingAverage(network, ema_decay)
        self.optimizer = build_optimizer(network, 0.0, weight_decay, layer_decay, fresh_parameters)
        self._trained = processes.averaging_gradients(network, device)
        self._buffers = list(network.buffers())
        self._buffers_before = [buffer.clone() for buffer in self._buffers]

    @property
    def parts(self) -> TrainedParts:
        """Everything ``step`` changes."""
        return TrainedParts(self.network, self.average.network, self.optimizer)

    def train_mode(self) -> None:
        """Put the network into training mode, frozen layers excepted."""
        self.network.train()
        eval_mode(self.network, self.frozen)

    def step(
        self, batch: Batch | Sequence[Batch], learning_rate: float, update: int, progress: float = 0.0
    ) -> dict[str, float]:
        """Optimiser step number ``update`` (the first is 1), on ``batch``; gives the loss and its parts.

        A sequence of batches is learned as one batch of them all would be (gradient accumulation), but for batch
        norm, which sees each on its own: the loss is divided by its normaliser over all of them (the first one that
        ``global_normalizer`` was asked for; terms with another one or none are averaged with the same weights).

        Raises:
            NotFinite: when the loss or its gradient is not finite; nothing has changed then.
        """
        set_learning_rate(self.optimizer, learning_rate)
        self.optimizer.zero_grad(set_to_none=True)
        _copy(self._buffers, self._buffers_before)
        losses = self._backward(batch if isinstance(batch, Sequence) else [batch], update, progress)
        self._clip(update, losses)
        self.optimizer.step()
        self.average.update(self.network, update)
        return losses

    def _backward(self, batches: Sequence[Batch], update: int, progress: float) -> dict[str, float]:
        """Gradients of the batches' joint loss; gives that loss and its parts."""
        sums: list[float] = []
        rows: list[dict[str, float]] = []
        for batch in batches:
            is_last = len(rows) == len(batches) - 1
            with self._exchanging_gradients(is_last), recorded_normalizers() as normalizers:
                loss, losses = self._forward(batch, update, progress)
                # times its own normaliser it is a plain sum again, which may be added to those of the others
                sums.append(float(normalizers[0]) if normalizers and len(batches) > 1 else 1.0)
                (loss * max(sums[-1], 1.0)).backward()  # type: ignore[no-untyped-call]
            rows.append(losses)
        divisor = max(sum(sums), 1.0)
        if len(batches) > 1:
            torch._foreach_div_([p.grad for p in self.network.parameters() if p.grad is not None], divisor)
        weights = [max(value, 1.0) / divisor for value in sums]
        return {name: sum(w * row[name] for w, row in zip(weights, rows, strict=True)) for name in rows[0]}

    def _forward(self, batch: Batch, update: int, progress: float) -> tuple[Tensor, dict[str, float]]:
        images, targets = self._as_input(batch.images), batch.targets.to(self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bfloat16"):
            loss, parts = self.compute_loss(self._trained, images, targets, progress)
        losses = _as_numbers({"loss": loss, **{f"loss_{name}": part for name, part in parts.items()}})
        self._stop_at(fault_in_losses(losses), update, losses)
        return loss, losses

    def _clip(self, update: int, losses: dict[str, float]) -> None:
        norm = get_total_norm([p.grad for p in self.network.parameters() if p.grad is not None])
        self._stop_at(fault_in_gradients(self.network, norm), update, losses)
        if self.gradient_clip_norm:
            clip_grads_with_norm_(self.network.parameters(), self.gradient_clip_norm, norm)

    def _stop_at(self, fault: str | None, update: int, losses: dict[str, float]) -> None:
        """Raise NotFinite for a fault, with the statistics from before the step; all processes see the same fault,
        since losses and gradients are means over all of them.
        """
        if fault is not None:
            _copy(self._buffers_before, self._buffers)
            raise NotFinite(sentence(fault, update, losses))

    def _exchanging_gradients(self, wanted: bool) -> AbstractContextManager[None]:
        """Processes average their gradients once a step, with the last batch."""
        if wanted or not isinstance(self._trained, DistributedDataParallel):
            return nullcontext()
        return self._trained.no_sync()

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


@torch.no_grad()
def _copy(source: list[Tensor], target: list[Tensor]) -> None:
    if source:
        torch._foreach_copy_(target, source)


def _as_numbers(losses: dict[str, Tensor]) -> dict[str, float]:
    """All values in one transfer from the device, each the mean over all processes: the whole batch's."""
    values = processes.mean_of_all(torch.stack([value.detach().float() for value in losses.values()])).tolist()
    return dict(zip(losses, values, strict=True))
