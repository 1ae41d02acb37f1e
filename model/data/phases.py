"""Two sets of images one after the other in one training: pseudo-labelled ones first, labelled ones then."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import islice
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from model.batch_source import BatchSource
    from model.data.loader import Batch


class PhasedLoader:
    """Batches of one source in the first part of a training and of another in the rest.

    An epoch has ``batches_per_epoch`` batches throughout, whatever the size of the sets, so that length and learning
    rate are those of a training on both sets mixed.  A source is gone through as often as its part of the training
    takes, each pass shuffled and augmented anew.  What a batch holds follows from its epoch and place alone, as with
    the sources.

    Args:
        sources: make the two sources; the second is made, and the first one let go, when its part begins.
        batches_per_epoch: as many as both sets together would have.
        first_share: share of all batches that come from the first source.
    """

    def __init__(
        self,
        sources: tuple[Callable[[], BatchSource], Callable[[], BatchSource]],
        batches_per_epoch: int,
        first_share: float,
    ) -> None:
        if not 0 < first_share < 1:
            raise ValueError(f"first_share must be between 0 and 1, got {first_share}")
        self.batches_per_epoch = batches_per_epoch
        self._makers, self._first_share = sources, first_share
        self._switch: int | None = None
        self._open: tuple[int, BatchSource] | None = None

    def plan(self, epochs: float) -> None:
        """Be told the length of the training, which may follow from a measurement; until then all is the first part.

        Each part gets a batch at least, unless there is but one: that is of the second part.
        """
        batches = epochs * self.batches_per_epoch
        self._switch = min(max(1, round(self._first_share * batches)), math.ceil(batches) - 1)

    def epoch(self, epoch: int, start_batch: int = 0, mosaic_enabled: bool = True) -> Iterator[Batch]:
        """The batches of one epoch from ``start_batch`` on."""
        place, end = epoch * self.batches_per_epoch + start_batch, (epoch + 1) * self.batches_per_epoch
        while place < end:
            part = int(self._switch is not None and place >= self._switch)
            begins, ends = (self._switch or 0, end) if part else (0, min(end, self._switch or end))
            source = self._source(part)
            number, first = divmod(place - begins, source.batches_per_epoch)
            count = min(ends - place, source.batches_per_epoch - first)
            yield from islice(source.epoch(number, first, mosaic_enabled), count)
            place += count

    def _source(self, part: int) -> BatchSource:
        if self._open is None or self._open[0] != part:
            self._open = None  # frees the other part's pictures and worker processes first
            self._open = (part, self._makers[part]())
        return self._open[1]
