"""Observers: how the clipping range of an activation is found from calibration images.

Ranges are symmetric, so an observer answers one number, ``amax``: values in [-amax, amax] are kept, the rest is
clipped. The histogram observers follow the comparison of calibrators in arXiv 2004.09602, section 5.1.

Observers that saw parts of the data can be merged, and answer to the bit what one would that saw all of it, in any
order: counts are whole numbers, and the edges of the bins do not depend on what came first.
"""

from __future__ import annotations

import math
from typing import Any, Literal, Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from model.quantization import QUANTIZED_MAXIMUM

ObserverName = Literal["max", "percentile", "mse"]

HISTOGRAM_BINS = 8192  # at least half of them are in use, so amax is known to 0.025 % of the range
MSE_CANDIDATES = 128
MSE_OCTAVES = 4  # below a sixteenth of the maximum a step of the grid would be narrower than two bins


class Observer(Protocol):
    """Collects the values one activation takes and proposes its clipping range."""

    def observe(self, values: Float[Tensor, " *shape"]) -> None:
        """Add one batch of values."""
        ...

    def merge(self, other: Any) -> None:
        """Add what another observer of the same kind has seen."""
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

    def merge(self, other: MaxObserver) -> None:
        """Raise the maximum to the other's."""
        self._maximum = max(self._maximum, other._maximum)

    def amax(self) -> float:
        """Largest magnitude seen."""
        return self._maximum


class MagnitudeHistogram:
    """Histogram of magnitudes over [0, limit), whose limit is a power of two that doubles when a larger value arrives.

    Doubling merges neighbouring bins, so no value is ever counted twice or lost, and what is counted where depends on
    the values alone, neither on their order nor on how they came in batches.
    """

    def __init__(self, bins: int = HISTOGRAM_BINS) -> None:
        self.counts = torch.zeros(bins, dtype=torch.float64)
        self.limit = 0.0  # 0 until something other than zero was seen
        self.maximum = 0.0

    def add(self, values: Float[Tensor, " *shape"]) -> None:
        """Count the magnitudes of ``values``."""
        largest = _largest_magnitude(values)
        if largest == 0.0:
            self.counts[0] += values.numel()
            return
        self._grow(_power_of_two_above(largest))
        self.maximum = max(self.maximum, largest)
        magnitudes = values.detach().abs().float().flatten()
        counts = torch.histc(magnitudes, bins=len(self.counts), min=0.0, max=self.limit)
        self.counts += counts.to("cpu", torch.float64)

    def merge(self, other: MagnitudeHistogram) -> None:
        """Count what the other has counted."""
        self._grow(other.limit)
        counts, limit = other.counts, other.limit
        while 0.0 < limit < self.limit:
            counts, limit = _halved(counts), 2 * limit
        self.counts = self.counts + counts
        self.maximum = max(self.maximum, other.maximum)

    def centres(self) -> Float[Tensor, " bins"]:
        """Middle of every bin, in the unit of the activation."""
        bins = len(self.counts)
        return (torch.arange(bins, dtype=torch.float64) + 0.5) * (self.limit / bins)

    def _grow(self, limit: float) -> None:
        if self.limit == 0.0:  # zeros, if any, lie in the first bin whatever the limit
            self.limit = limit
        while self.limit < limit:
            self.counts = _halved(self.counts)
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

    def merge(self, other: PercentileObserver) -> None:
        """Count what the other has seen."""
        self._histogram.merge(other._histogram)

    def amax(self) -> float:
        """Upper edge of the bin in which the percentile falls, at most the largest magnitude seen."""
        counts, limit = self._histogram.counts, self._histogram.limit
        cumulative = counts.cumsum(0)
        target = self._fraction * float(cumulative[-1])
        index = int(torch.searchsorted(cumulative, torch.tensor(target, dtype=torch.float64)))
        return min(limit * (index + 1) / len(counts), self._histogram.maximum)


class MeanSquaredErrorObserver:
    """Balances clipping against rounding: amax with the least mean squared quantization error.

    The error is evaluated at the centres of the histogram's bins, of which each step of the grid holds at least two.
    """

    def __init__(self) -> None:
        self._histogram = MagnitudeHistogram()

    def observe(self, values: Float[Tensor, " *shape"]) -> None:
        """Count the magnitudes of these values."""
        self._histogram.add(values)

    def merge(self, other: MeanSquaredErrorObserver) -> None:
        """Count what the other has seen."""
        self._histogram.merge(other._histogram)

    def amax(self) -> float:
        """Best of ``MSE_CANDIDATES`` ranges, the largest magnitude seen and equal ratios (2.2 %) down from it."""
        histogram = self._histogram
        if histogram.maximum == 0.0:
            return 0.0
        seen = histogram.counts > 0
        values, counts = histogram.centres()[seen], histogram.counts[seen]
        exponents = torch.arange(MSE_CANDIDATES, dtype=torch.float64) * (MSE_OCTAVES / MSE_CANDIDATES)
        candidates = histogram.maximum * torch.exp2(-exponents)
        scales = (candidates / QUANTIZED_MAXIMUM)[:, None]
        rounded = (values / scales).round_().clamp_(max=QUANTIZED_MAXIMUM).mul_(scales)
        errors = (rounded - values).square_() @ counts
        return float(candidates[errors.argmin()])


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


def _power_of_two_above(value: float) -> float:
    return math.ldexp(1.0, math.frexp(value)[1])


def _halved(counts: Tensor) -> Tensor:
    """The same counts in bins of twice the width."""
    merged = counts.view(-1, 2).sum(dim=1)
    return torch.cat([merged, torch.zeros_like(merged)])
