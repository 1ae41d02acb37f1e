"""What a training says while it runs: a bar on a terminal, elsewhere a plain line now and then in long epochs.

The line that closes an epoch is the training loop's.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Mapping
from typing import Any

logger = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 600.0


class EpochProgress:
    """Shows loss parts, images per second and the time left of one epoch; a context manager.

    Args:
        title: text in front, like "epoch 3/20".
        done: batches of this epoch that an earlier process did.
        batches: batches of the whole epoch.
        steps_after: optimiser steps of the run that follow this epoch.
        batch_size: images per step, over all processes.
        quiet: show nothing (processes other than the first).
    """

    def __init__(
        self, title: str, done: int, batches: int, steps_after: int, batch_size: int, *, quiet: bool = False
    ) -> None:
        self.title, self.done, self.batches, self.batch_size = title, done, batches, batch_size
        self.steps_after, self.quiet = steps_after, quiet
        self.steps, self.seconds = 0, 0.0
        self.started = self.last_line = time.monotonic()
        self._bar = _bar(title, done, batches) if not quiet and sys.stderr.isatty() else None

    def __enter__(self) -> EpochProgress:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.close()

    @property
    def images_per_second(self) -> float:
        """Mean speed of the epoch's steps in this process."""
        return self.steps * self.batch_size / max(self.seconds, 1e-9)

    @property
    def seconds_per_step(self) -> float:
        """Mean time of the epoch's steps in this process, 0 before the first."""
        return self.seconds / max(self.steps, 1)

    def step(self, losses: Mapping[str, float]) -> None:
        """Tell of one more optimiser step and its loss parts."""
        self.steps += 1
        self.seconds = time.monotonic() - self.started
        if self._bar is not None:
            self._bar.set_postfix_str(self._text(losses), refresh=False)
            self._bar.update()
        elif not self.quiet and time.monotonic() - self.last_line >= SECONDS_BETWEEN_LINES:
            self.last_line = time.monotonic()
            batch = self.done + self.steps
            logger.info("%s batch %d/%d %s", self.title, batch, self.batches, self._text(losses))

    def _text(self, losses: Mapping[str, float]) -> str:
        left = (self.batches - self.done - self.steps + self.steps_after) * self.seconds_per_step
        parts = " ".join(f"{name} {value:.3f}" for name, value in losses.items())
        return f"{parts} {self.images_per_second:.1f} images/s {duration(left)} left"


def duration(seconds: float) -> str:
    """Seconds as h:mm:ss or m:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _bar(title: str, done: int, batches: int) -> Any:
    from tqdm import tqdm

    return tqdm(total=batches, initial=done, desc=title, leave=False, dynamic_ncols=True)
