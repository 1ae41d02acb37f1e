"""Decay groups on the real network."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import model
from model.optimizer import build_optimizer, rate_factors, set_learning_rate


def test_norms_biases_and_shortcut_factors_are_free_of_decay() -> None:
    network = model.build("pico", 3)
    optimizer = build_optimizer(network, learning_rate=1e-3, weight_decay=0.05)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert len(decay) == len(list(network.parameters()))
    for name, parameter in network.named_parameters():
        is_kernel = name.endswith(".weight") and parameter.ndim == 4
        assert decay[id(parameter)] == (0.05 if is_kernel else 0.0), name
    assert any(name.endswith(".alpha") for name, _ in network.named_parameters())


def test_decay_moves_kernels_only() -> None:
    layer = nn.Conv2d(2, 2, 1)
    kernel, bias = layer.weight.detach().clone(), layer.bias.detach().clone()  # type: ignore[union-attr]
    optimizer = build_optimizer(layer, learning_rate=0.1, weight_decay=0.5)
    for parameter in layer.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    torch.testing.assert_close(layer.weight, kernel * (1 - 0.1 * 0.5))
    assert torch.equal(layer.bias, bias)  # type: ignore[arg-type]


def test_frozen_parameters_are_left_out() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3))
    network[0].requires_grad_(False)
    groups = build_optimizer(network, 1e-3, 1e-4).param_groups
    chosen = {id(parameter) for group in groups for parameter in group["params"]}
    assert chosen == {id(parameter) for parameter in network[1].parameters()}
    with pytest.raises(ValueError, match="no trainable parameter"):
        build_optimizer(network.requires_grad_(False), 1e-3, 1e-4)


def test_negative_decay_is_refused() -> None:
    with pytest.raises(ValueError, match=r"weight_decay must not be negative, got -0\.1"):
        build_optimizer(nn.Linear(2, 2), 1e-3, -0.1)


def test_learning_rate_reaches_every_group() -> None:
    optimizer = build_optimizer(nn.Conv2d(2, 2, 1), 1e-3, 1e-4)
    set_learning_rate(optimizer, 0.25)
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.25]


def test_rates_fall_from_the_heads_to_the_stem() -> None:
    factors = rate_factors([name for name, _ in model.build("pico", 3).named_parameters()], 0.5)
    expected = {
        "heads.head1": 1.0, "heads.head3": 1.0, "neck.neck4": 0.5, "neck.neck1": 0.5, "backbone.context_module": 0.25,
        "backbone.stage4": 0.25, "backbone.stage3": 0.125, "backbone.stage2": 2**-4, "backbone.stage1": 2**-5,
        "backbone.stem": 2**-6,
    }  # fmt: skip
    found = {".".join(name.split(".")[:2]): factor for name, factor in factors.items()}
    assert expected.items() <= found.items()
    assert len(set(factors.values())) == 7
    assert rate_factors(["feature_adapters.levels.0.weight"], 0.5) == {"feature_adapters.levels.0.weight": 1.0}


def test_fresh_parameters_keep_the_full_rate() -> None:
    names = ["backbone.stem.conv.post_bn.weight", "backbone.stem.conv.post_bn.bias"]
    assert rate_factors(names, 0.5, names[:1]) == {names[0]: 1.0, names[1]: 2**-6}


def test_layer_decay_reaches_every_parameter_with_its_rate_and_decay() -> None:
    network = model.build("pico", 3)
    optimizer = build_optimizer(network, 1.0, 0.05, layer_decay=0.8)
    set_learning_rate(optimizer, 0.25)
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    factors = rate_factors([name for name, _ in network.named_parameters()], 0.8)
    assert len(groups) == len(factors)
    for name, parameter in network.named_parameters():
        group = groups[id(parameter)]
        assert group["lr"] == pytest.approx(0.25 * factors[name], rel=1e-12), name
        assert group["weight_decay"] == (0.05 if parameter.ndim > 1 else 0.0), name


def test_one_rate_for_all_makes_the_two_groups_alone() -> None:
    assert len(build_optimizer(model.build("pico", 3), 1.0, 0.05).param_groups) == 2
