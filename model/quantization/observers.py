"""Observers: how the clipping range of an activation is found from calibration images.

Ranges are symmetric, so an observer answers one number, ``amax``: values in [-amax, amax] are kept, the rest is
clipped. The histogram observers follow the comparison of calibrators in arXiv 2004.09602, section 5.1.
"""

from __future__ import annotations

from typing import Literal, Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from model.quantization import QUANTIZED_MAXIMUM

ObserverName = Literal["max", "percentile", "mse"]

HISTOGRAM_BINS = 4096  # a doubling keeps at least half of them in use, so amax is known to 0.05 % of the range
MSE_CANDIDATES = 128


class Observer(Protocol):
    """Collects the values one activation takes and proposes its clipping range."""

    def observe(self, values: Float[Tensor, " *shape"]) -> None:
        """Add one batch of values."""
        ...

    def amax(self) -> float:
        """Clipping range; 0 when nothing but zeros was seen."""
        ...


class MaxObserver:
    """Keeps everything: amax is the largest magnitude seen."""

    def __init__(self) -> None:
        self._maximum = 0.0

    def observe(self, values: Float[Tensor, " *shape"]) -> None:
        """Raise the maximum to that of these values."""
        self._maximum = max(self._maximum, _largest_magnitude(values))

    def amax(self) -> float:
        """Largest magnitude seen."""
        return self._maximum


class MagnitudeHistogram:
    """Histogram of magnitudes over [0, limit) whose limit doubles when a larger value arrives.

    Doubling merges neighbouring bins, so no value is ever counted twice or lost and the result does not depend on
    which batch held the maximum.
    """

    def __init__(self, bins: int = HISTOGRAM_BINS) -> None:
        self.counts = torch.zeros(bins, dtype=torch.float64)
        self.limit = 0.0

    def add(self, values: Float[Tensor, " *shape"]) -> None:
        """Count the magnitudes of ``values``."""
        largest = _largest_magnitude(values)
        if self.limit == 0.0:
            if largest == 0.0:
                self.counts[0] += values.numel()
                return
            self.limit = largest
        while largest > self.limit:
            self._double()
        magnitudes = values.detach().abs().float().flatten()
        counts = torch.histc(magnitudes, bins=len(self.counts), min=0.0, max=self.limit)
        self.counts += counts.to("cpu", torch.float64)

    def centres(self) -> Float[Tensor, " bins"]:
        """Middle of every bin, in the unit of the activation."""
        bins = len(self.counts)
        return (torch.arange(bins, dtype=torch.float64) + 0.5) * (self.limit / bins)

    def _double(self) -> None:
        half = len(self.counts) // 2
        merged = self.counts.view(half, 2).sum(dim=1)
        self.counts = torch.cat([merged, torch.zeros_like(merged)])
        self.limit *= 2


class PercentileObserver:
    """Clips the rarest values: amax is the given percentile of the magnitudes."""

    def __init__(self, percentile: float) -> None:
        if not 50.0 < percentile <= 100.0:
            raise ValueError(f"quantize.percentile must be above 50 and at most 100, got {percentile:g}")
        self._fraction = percentile / 100.0
        self._histogram = MagnitudeHistogram()

    def observe(self, values: Float[Tensor, " *shape"]) -> None:
        """Count the magnitudes of these values."""
        self._histogram.add(values)

    def amax(self) -> float:
        """Upper edge of the bin in which the percentile falls."""
        counts, limit = self._histogram.counts, self._histogram.limit
        cumulative = counts.cumsum(0)
        target = self._fraction * float(cumulative[-1])
        index = int(torch.searchsorted(cumulative, torch.tensor(target, dtype=torch.float64)))
        return limit * min(index + 1, len(counts)) / len(counts)


class MeanSquaredErrorObserver:
    """Balances clipping against rounding: amax with the least mean squared quantization error.

    Rounding inside the range costs step**2 / 12 on average for the bins wider than a step; narrower ones are rounded
    exactly at their centre, so the error is evaluated at the bin centres.
    """

    def __init__(self) -> None:
        self._histogram = MagnitudeHistogram()

    def observe(self, values: Float[Tensor, " *shape"]) -> None:
        """Count the magnitudes of these values."""
        self._histogram.add(values)

    def amax(self) -> float:
        """Best of ``MSE_CANDIDATES`` evenly spaced ranges up to the largest magnitude seen."""
        limit = self._histogram.limit
        if limit == 0.0:
            return 0.0
        errors = [self._error(limit * step / MSE_CANDIDATES) for step in range(1, MSE_CANDIDATES + 1)]
        return limit * (errors.index(min(errors)) + 1) / MSE_CANDIDATES

    def _error(self, amax: float) -> float:
        centres = self._histogram.centres()
        scale = amax / QUANTIZED_MAXIMUM
        rounded = (centres / scale).round().clamp(max=QUANTIZED_MAXIMUM) * scale
        return float((self._histogram.counts * (centres - rounded) ** 2).sum())


def make_observer(name: ObserverName, percentile: float) -> Observer:
    """Observer by its name in the parameters; ValueError for an unknown one."""
    if name == "max":
        return MaxObserver()
    if name == "percentile":
        return PercentileObserver(percentile)
    if name == "mse":
        return MeanSquaredErrorObserver()
    raise ValueError(f"quantize.observer must be max, percentile or mse, got {name!r}")


def _largest_magnitude(values: Tensor) -> float:
    return float(values.detach().abs().max()) if values.numel() else 0.0
