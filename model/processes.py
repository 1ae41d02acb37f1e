"""The few things training needs to know about its sibling processes; alone, every call is a no-op.

torchrun starts the processes; ``join`` makes them known to each other, ``part`` ends that. What they tell each other
between steps may take as long as the first one's evaluation does, so it has a group of its own that waits; the group
of the gradients keeps torch's time limits, by which a device that hangs is noticed.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from model.synchronized_norm import separate_norms, synchronize_norms

_Value = TypeVar("_Value")

_PATIENCE = timedelta(days=30)
_patient_group: distributed.ProcessGroup | None = None  # None, before ``join``: the default group
_acts_alone = False


def join(device: torch.device) -> None:
    """Meet the sibling processes that torchrun started: NCCL for CUDA devices, gloo for the CPU."""
    global _patient_group
    # 1x1 kernels have the same memory order by either description of their strides; torch compares the descriptions
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    _patient_group = distributed.new_group(backend="gloo", timeout=_PATIENCE)


def part() -> None:
    """Be alone from here on; every process calls this at the same point."""
    global _patient_group
    _patient_group = None
    if _together():
        distributed.destroy_process_group()


@contextmanager
def alone() -> Iterator[None]:
    """Inside the block this process acts as if it had no siblings."""
    global _acts_alone
    _acts_alone = True
    try:
        yield
    finally:
        _acts_alone = False


def count() -> int:
    """Number of processes that train together."""
    return distributed.get_world_size() if _together() else 1


def rank() -> int:
    """Index of this process; 0 evaluates and writes."""
    return distributed.get_rank() if _together() else 0


def wait_for_all() -> None:
    """Return when every process has come here."""
    if _together():
        distributed.barrier(group=_patient_group)


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
    distributed.broadcast_object_list(box, group=_patient_group)
    return box[0]


def made_by_first(make: Callable[[], _Value]) -> _Value:
    """What ``make`` returns in process 0; the others wait for it, however long that takes."""
    if rank() == 0:
        return from_first(make())
    value: _Value | None = from_first(None)
    return value  # type: ignore[return-value]


def tensors_from_first(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors that process 0 holds, by name; the others may give an empty mapping. On the CPU."""
    if not _together():
        return dict(tensors)
    shapes = from_first([(name, tensor.shape, tensor.dtype) for name, tensor in tensors.items()])
    received = {}
    for name, shape, dtype in shapes:
        mine = tensors[name].detach().cpu().contiguous() if rank() == 0 else torch.empty(shape, dtype=dtype)
        distributed.broadcast(mine, src=0, group=_patient_group)
        received[name] = mine
    return received


def gathered_by_first(value: _Value) -> list[_Value]:
    """Every process's value, in the order of the processes; an empty list in all but the first."""
    if not _together():
        return [value]
    values: list[_Value] | None = [value] * count() if rank() == 0 else None
    distributed.gather_object(value, values, group=_patient_group)
    return values or []


def mean_of_all(values: Tensor) -> Tensor:
    """Elementwise mean over the processes, without a gradient."""
    values = values.detach()
    if _together():
        values = values.clone()
        distributed.all_reduce(values)
        values /= count()
    return values


def averaging_gradients(network: nn.Module, device: torch.device) -> nn.Module:
    """``network``, wrapped so that gradients are averaged over all processes where there are several.

    Its batch-norm layers are replaced, in ``network`` itself, by ones with the statistics of all processes;
    ``separate`` puts ordinary ones back.
    """
    if not _together():
        return network
    if device.type == "cpu":
        synchronize_norms(network)
        return DistributedDataParallel(network)
    nn.SyncBatchNorm.convert_sync_batchnorm(network)  # type: ignore[no-untyped-call]
    return DistributedDataParallel(network, device_ids=[device.index or 0])


def separate(network: nn.Module) -> None:
    """Make ``network`` one that a process runs alone again, after ``averaging_gradients``."""
    separate_norms(network)


def _together() -> bool:
    return not _acts_alone and distributed.is_available() and distributed.is_initialized()
