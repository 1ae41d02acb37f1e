"""What the training loop asks of a loader, and the batches of one optimiser step."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from model.data.loader import Batch


class BatchSource(Protocol):
    """What ``train`` asks of a loader: the same batches for the same epoch, from any batch on."""

    @property
    def batches_per_epoch(self) -> int:
        """Batches in every epoch."""

    def epoch(self, epoch: int, start_batch: int = 0, mosaic_enabled: bool = True) -> Iterator[Batch]:
        """Batches ``start_batch``, ``start_batch + 1``, ... of ``epoch`` (both counted from 0)."""


class BatchGroups:
    """The batches of a source in groups of ``size``, one group for each optimiser step (gradient accumulation).

    Groups of k batches of B images hold the same images in the same order as batches of k * B images would. As a
    loader does with images, what is left at the end of an epoch is left out, unless the whole epoch is smaller.
    """

    def __init__(self, source: BatchSource, size: int) -> None:
        self._source = source
        self.size = min(size, source.batches_per_epoch)

    @property
    def groups_per_epoch(self) -> int:
        """Optimiser steps in every epoch."""
        return self._source.batches_per_epoch // self.size

    def epoch(self, epoch: int, start_group: int = 0, mosaic_enabled: bool = True) -> Iterator[list[Batch]]:
        """Groups ``start_group``, ``start_group + 1``, ... of ``epoch`` (both counted from 0)."""
        batches = self._source.epoch(epoch, start_group * self.size, mosaic_enabled)
        for _ in range(start_group, self.groups_per_epoch):
            yield list(islice(batches, self.size))
