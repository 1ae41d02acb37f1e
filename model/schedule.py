"""Learning rate as a pure function of the optimiser step, so a resumed run needs no schedule state."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class WarmupCosine:
    """Linear warm-up over ``warmup_steps``, then half a cosine down to ``learning_rate * final_ratio``.

    Step counts are optimiser steps, the first one is 0. The shape is that of the published YOLO-NAS
    recipes: the first step uses ``initial_learning_rate`` (the full rate where that is lower), step
    ``warmup_steps - 1`` the full rate, and the cosine lags one step behind. Unlike there, a warm-up longer than an
    epoch is not squeezed into that epoch.

    Raises:
        ValueError: when a value is out of range, or the warm-up leaves no step for the rest.
    """

    learning_rate: float
    total_steps: int
    warmup_steps: int = 0
    initial_learning_rate: float = 1e-6
    final_ratio: float = 0.1

    def __post_init__(self) -> None:
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate must be positive, got {self.learning_rate}")
        if self.total_steps < 1:
            raise ValueError(f"total_steps must be at least 1, got {self.total_steps}")
        if not 0 <= self.warmup_steps < self.total_steps:
            raise ValueError(f"warmup_steps must lie in [0, total_steps={self.total_steps}), got {self.warmup_steps}")
        if not 0 <= self.final_ratio <= 1:
            raise ValueError(f"final_ratio must lie in [0, 1], got {self.final_ratio}")

    def at(self, step: int) -> float:
        """Learning rate that optimiser step ``step`` uses."""
        if step < self.warmup_steps:
            return self._warmup(step)
        position = max(0, step - 1 - self.warmup_steps)
        cosine = 0.5 * (1.0 + math.cos(math.pi * position / (self.total_steps - self.warmup_steps + 1)))
        return self.learning_rate * (self.final_ratio + (1.0 - self.final_ratio) * cosine)

    def _warmup(self, step: int) -> float:
        first = min(self.initial_learning_rate, self.learning_rate)  # a warm-up never runs downhill
        if self.warmup_steps == 1:
            return first
        return first + step / (self.warmup_steps - 1) * (self.learning_rate - first)


def fitting_warmup_steps(warmup_steps: int, total_steps: int) -> int:
    """``warmup_steps``, or a tenth of the run where that is too short for a warm-up of this length."""
    return warmup_steps if 2 * warmup_steps <= total_steps else total_steps // 10
