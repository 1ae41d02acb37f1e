"""The few things training needs to know about its sibling processes; alone, every call is a no-op.

Processes exist when torchrun started them and ``torch.distributed`` is initialised; nothing here starts them.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

_Value = TypeVar("_Value")


def count() -> int:
    """Number of processes that train together."""
    return distributed.get_world_size() if _together() else 1


def rank() -> int:
    """Index of this process; 0 evaluates and writes."""
    return distributed.get_rank() if _together() else 0


def wait_for_all() -> None:
    """Return when every process has come here."""
    if _together():
        distributed.barrier()


def any_says(flag: bool, device: torch.device) -> bool:
    """True in every process as soon as one process says so."""
    if not _together():
        return flag
    votes = torch.tensor(int(flag), device=device)
    distributed.all_reduce(votes, op=distributed.ReduceOp.MAX)
    return bool(votes.item())


def from_first(value: _Value) -> _Value:
    """The value that process 0 holds."""
    if not _together():
        return value
    box = [value]
    distributed.broadcast_object_list(box)
    return box[0]


def averaging_gradients(network: nn.Module, device: torch.device) -> nn.Module:
    """``network``, wrapped so that gradients are averaged over all processes where there are several.

    On accelerators the batch-norm layers then use the statistics of all processes.
    """
    if not _together():
        return network
    if device.type == "cpu":
        return DistributedDataParallel(network)
    network = nn.SyncBatchNorm.convert_sync_batchnorm(network)  # type: ignore[no-untyped-call]
    return DistributedDataParallel(network, device_ids=[device.index])


def _together() -> bool:
    return distributed.is_available() and distributed.is_initialized()
