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
    PercentileObserver,
    make_observer,
)

BIN = 1 / HISTOGRAM_BINS  # ranges are known to one bin; doubling may make it two


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


@pytest.mark.parametrize("name", ["percentile", "mse"])
def test_order_of_batches_does_not_matter(name: str) -> None:
    """The histogram grows by doubling from the first batch's maximum, so only the bin width can differ."""
    small, large = torch.rand(5000), 7 * torch.rand(5000)
    forward = observed(make_observer(name, 99.0), small, large)  # type: ignore[arg-type]
    backward = observed(make_observer(name, 99.0), large, small)  # type: ignore[arg-type]
    assert forward == pytest.approx(backward, rel=0.02)


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
    errors = [
        torch.mean((values - torch.fake_quantize_per_tensor_affine(values, float(amax) / 127, 0, -128, 127)) ** 2)
        for amax in candidates
    ]
    best = float(candidates[int(torch.stack(errors).argmin())])
    found = observed(MeanSquaredErrorObserver(), values)
    found_error = torch.mean((values - torch.fake_quantize_per_tensor_affine(values, found / 127, 0, -128, 127)) ** 2)
    assert best < 20  # clipping pays here, else the test would prove nothing
    assert float(found_error) == pytest.approx(float(min(errors)), rel=0.05)  # 128 candidates instead of 300


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
