"""Observers against values that can be worked out by hand."""

from __future__ import annotations

import pytest
import torch

from model.quantization.observers import (
    HISTOGRAM_BINS,
    MagnitudeHistogram,
    MaxObserver,
    MeanSquaredErrorObserver,
    Observer,
    ObserverName,
    PercentileObserver,
    make_observer,
)

BIN = 1 / HISTOGRAM_BINS  # ranges are known to one bin of up to twice the largest value


def observed(observer: Observer, *batches: torch.Tensor) -> float:
    for batch in batches:
        observer.observe(batch)
    return observer.amax()


def test_max_is_the_largest_magnitude_of_all_batches() -> None:
    assert observed(MaxObserver(), torch.tensor([0.5, -3.0]), torch.tensor([2.0])) == 3.0


def test_percentile_of_a_uniform_distribution() -> None:
    values = torch.linspace(-1, 1, 200_001)
    assert observed(PercentileObserver(90.0), values) == pytest.approx(0.9, abs=2 * BIN)


def test_percentile_drops_an_outlier_and_hundred_keeps_it() -> None:
    values = torch.cat([torch.linspace(0, 1, 100_000), torch.tensor([100.0])])
    assert observed(PercentileObserver(99.9), values) == pytest.approx(1.0, abs=100 * BIN)
    assert observed(PercentileObserver(100.0), values) == pytest.approx(100.0, rel=BIN)


@pytest.mark.parametrize("name", ["max", "percentile", "mse"])
def test_order_and_merging_change_nothing(name: ObserverName) -> None:
    parts = [torch.zeros(9), 3e-3 * torch.rand(500), torch.randn(5000), 7 * torch.rand(5000), torch.tensor([-90.0])]
    whole = observed(make_observer(name, 99.0), torch.cat(parts))
    assert observed(make_observer(name, 99.0), *parts) == whole
    assert observed(make_observer(name, 99.0), *reversed(parts)) == whole
    for order in (parts, parts[::-1]):
        first, *others = (make_observer(name, 99.0) for _ in parts)
        for observer, part in zip((first, *others), order, strict=True):
            observer.observe(part)
        for other in others:
            first.merge(other)
        assert first.amax() == whole


def test_no_range_is_wider_than_what_was_seen() -> None:
    values = torch.tensor([1.0, 2.0, 2.5, 4.1])
    for observer in (MaxObserver(), PercentileObserver(100.0), MeanSquaredErrorObserver()):
        assert observed(observer, values) <= values.max().item()


def test_mean_squared_error_of_a_heavy_tail_is_near_the_best() -> None:
    """An outlier of ten times the largest other value: the best range is far below it."""
    values = torch.cat([torch.rand(400_000), torch.tensor([10.0])])
    candidates = torch.linspace(0.6, 10, 200)
    errors = torch.stack([squared_error(values, float(amax)) for amax in candidates])
    found = observed(MeanSquaredErrorObserver(), values)
    assert float(candidates[errors.argmin()]) < 5
    assert float(squared_error(values, found)) <= 1.01 * float(errors.min())


def squared_error(values: torch.Tensor, amax: float) -> torch.Tensor:
    return torch.mean((values - torch.fake_quantize_per_tensor_affine(values, amax / 127, 0, -128, 127)) ** 2)


def test_histogram_counts_every_value_once_while_it_grows() -> None:
    histogram = MagnitudeHistogram(bins=8)
    for batch in (torch.zeros(3), torch.tensor([1.0, -0.9]), torch.tensor([5.0, 0.1])):
        histogram.add(batch)
    assert histogram.counts.sum() == 7
    assert histogram.limit == 8.0


def test_mean_squared_error_finds_the_range_of_least_error() -> None:
    """A few far values among many: the best range by brute force over the values themselves."""
    values = torch.cat([torch.randn(200_000), torch.tensor([30.0, -25.0])])
    candidates = torch.linspace(0.5, 30, 300)
    errors = torch.stack([squared_error(values, float(amax)) for amax in candidates])
    assert float(candidates[errors.argmin()]) < 20  # clipping pays here, else the test would prove nothing
    found = observed(MeanSquaredErrorObserver(), values)
    assert float(squared_error(values, found)) == pytest.approx(float(errors.min()), rel=0.01)


@pytest.mark.parametrize("name", ["max", "percentile", "mse"])
def test_zeros_alone_give_no_range(name: str) -> None:
    assert observed(make_observer(name, 99.99), torch.zeros(10)) == 0.0  # type: ignore[arg-type]


@pytest.mark.parametrize("percentile", [0.0, 50.0, 100.1, float("nan")])
def test_percentile_out_of_range_is_refused(percentile: float) -> None:
    with pytest.raises(ValueError, match=r"quantize\.percentile"):
        PercentileObserver(percentile)


def test_unknown_observer_is_refused() -> None:
    with pytest.raises(ValueError, match="entropy"):
        make_observer("entropy", 99.9)  # type: ignore[arg-type]
