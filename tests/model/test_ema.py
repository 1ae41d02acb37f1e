"""The average of weights: decay, integer buffers, independence from the network."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from model.ema import ExponentialMovingAverage, threshold_decay


def test_decay_equals_the_published_threshold_form(shared: Path) -> None:
    golden = json.loads((shared / "golden" / "schedules.json").read_text())["ema"]
    for decay in (0.9997, 0.9):
        values = golden[f"threshold_{decay}"]
        computed = {update: threshold_decay(decay, int(update)) for update in values}
        assert computed == pytest.approx(values, rel=1e-12)


def test_parameters_and_statistics_follow_the_formula_and_counters_are_copied() -> None:
    torch.manual_seed(0)
    convolution = nn.Conv2d(3, 4, 3)
    network = nn.Sequential(convolution, nn.BatchNorm2d(4))
    average = ExponentialMovingAverage(network, decay=0.5)
    expected = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    for update in (1, 2, 3):
        network(torch.randn(2, 3, 8, 8))
        with torch.no_grad():
            convolution.weight.add_(1.0)
        average.update(network, update)
        decay = min(0.5, (1 + update) / (10 + update))
        for name, tensor in network.state_dict().items():
            floating = tensor.is_floating_point()
            expected[name] = decay * expected[name] + (1 - decay) * tensor if floating else tensor.clone()
    state = average.network.state_dict()
    assert state["1.num_batches_tracked"].item() == 3
    for name, tensor in expected.items():
        torch.testing.assert_close(state[name], tensor, rtol=1e-6, atol=1e-6, msg=name)  # order of two roundings


def test_equal_weights_stay_equal_to_the_bit() -> None:
    network = nn.Linear(7, 5)
    average = ExponentialMovingAverage(network, decay=0.9997)
    for update in range(1, 50):
        average.update(network, update)
    assert torch.equal(average.network.weight, network.weight)  # type: ignore[arg-type]


def test_the_average_is_an_evaluation_copy_that_shares_nothing() -> None:
    convolution = nn.Conv2d(3, 4, 3)
    network = nn.Sequential(convolution, nn.BatchNorm2d(4))
    average = ExponentialMovingAverage(network, decay=0.9)
    assert not average.network.training and network.training
    assert not any(parameter.requires_grad for parameter in average.network.parameters())
    before = average.network.state_dict()["0.weight"].clone()
    with torch.no_grad():
        convolution.weight.zero_()
    assert torch.equal(average.network.state_dict()["0.weight"], before)


def test_decay_zero_is_the_network_itself() -> None:
    network = nn.Linear(3, 3)
    average = ExponentialMovingAverage(network, decay=0.0)
    with torch.no_grad():
        network.weight.mul_(3.0)
    average.update(network, 1)
    assert torch.equal(average.network.weight, network.weight)  # type: ignore[arg-type]


def test_decay_outside_its_range_is_refused() -> None:
    with pytest.raises(ValueError, match="ema_decay must lie in"):
        ExponentialMovingAverage(nn.Linear(1, 1), decay=1.0)
