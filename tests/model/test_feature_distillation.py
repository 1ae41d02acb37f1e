"""Every way to compare neck features: worked examples, invariance, and the strengths they were published with."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from model.distillation import DistillationConfig, DistillationLoss
from model.feature_distillation import (
    PUBLISHED_STRENGTH,
    channel_divergence,
    correlation_loss,
    features_loss,
    foreground_correlation_loss,
)
from model.head import RawOutput

EPSILON = 1e-5  # the losses add 1e-6 to the variance


def _draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _row(*values: float) -> Tensor:
    """One image, one channel, one row of cells."""
    return torch.tensor(values, dtype=torch.float64).reshape(1, 1, 1, -1)


def test_correlation_loss_is_one_minus_pearson():
    student, teacher = _draw(0, 2, 3, 5, 5), _draw(1, 2, 3, 5, 5)
    pearson = [
        torch.corrcoef(torch.stack([student[:, channel].flatten(), teacher[:, channel].flatten()]))[0, 1].item()
        for channel in range(3)
    ]
    assert correlation_loss(student, teacher).item() == pytest.approx(1 - sum(pearson) / 3, abs=EPSILON)


def test_foreground_correlation_worked_example():
    """Standardised: teacher (1, 1, -1, -1), student (1, -1, -1, 1).  Half squared differences: 0, 2, 0, 2."""
    student, teacher = _row(3, 1, 1, 3), _row(7, 7, 5, 5)
    first_two = torch.tensor([[[1.0, 0.5, 0.0, 0.0]]])
    assert foreground_correlation_loss(student, teacher, first_two).item() == pytest.approx(2 * 0.5 / 1.5, abs=EPSILON)
    everywhere = torch.ones(1, 1, 4)
    assert foreground_correlation_loss(student, teacher, everywhere).item() == pytest.approx(1.0, abs=EPSILON)
    assert correlation_loss(student, teacher).item() == pytest.approx(1.0, abs=EPSILON)
    faint = torch.tensor([[[0.0, 0.1, 0.0, 0.0]]])  # less than one cell in all: the normaliser stays 1
    assert foreground_correlation_loss(student, teacher, faint).item() == pytest.approx(0.2, abs=EPSILON)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_channel_divergence_worked_example(temperature):
    """Standardised: teacher (1, -1), student (-1, 1).  With p = sigmoid(2 / T) the KL is (2p - 1) * 2 / T."""
    share = 1 / (1 + math.exp(-2 / temperature))
    expected = (2 * share - 1) * (2 / temperature) * temperature**2
    found = channel_divergence(_row(0, 10), _row(5, 3), temperature)
    assert found.item() == pytest.approx(expected, abs=EPSILON)


def test_channel_divergence_is_a_mean_over_images_and_channels():
    """Channels 1 and 2 agree, channel 0 is reversed: a third of that channel's divergence."""
    teacher = torch.cat([_row(5, 3), _row(1, 2), _row(0, 9)], dim=1)
    student = torch.cat([_row(0, 10), _row(1, 2), _row(0, 9)], dim=1)
    alone = channel_divergence(_row(0, 10), _row(5, 3), 1.0)
    assert channel_divergence(student, teacher, 1.0).item() == pytest.approx(alone.item() / 3)
    doubled = channel_divergence(torch.cat([student, student]), torch.cat([teacher, teacher]), 1.0)
    assert doubled.item() == pytest.approx(alone.item() / 3, abs=EPSILON)


def test_scale_and_offset_of_a_map_mean_nothing():
    teacher = _draw(3, 2, 4, 6, 6)
    other = teacher * torch.tensor([2.0, 5.0, 0.1, 40.0]).reshape(1, 4, 1, 1) - 7
    confidence = torch.rand(2, 6, 6)
    assert correlation_loss(other, teacher).item() == pytest.approx(0.0, abs=1e-4)  # 1e-6 of a variance of 0.01
    assert foreground_correlation_loss(other, teacher, confidence).item() == pytest.approx(0.0, abs=1e-4)
    assert channel_divergence(other, teacher, 1.0).item() == pytest.approx(0.0, abs=1e-4)


@pytest.mark.parametrize("kind", list(PUBLISHED_STRENGTH))
def test_levels_are_summed_at_the_published_strength(kind):
    """Three levels of 4x4, 2x2 and 1x1 cells: 21 anchors."""
    shapes = [(2, 3, side, side) for side in (4, 2, 1)]
    student, teacher = ([_draw(seed + place, *shape) for place, shape in enumerate(shapes)] for seed in (10, 20))
    scores = torch.rand(2, 21, 5, generator=torch.Generator().manual_seed(0))
    best = scores.amax(dim=-1)
    maps = [best[:, :16].reshape(2, 4, 4), best[:, 16:20].reshape(2, 2, 2), best[:, 20:].reshape(2, 1, 1)]
    single = {
        "pkd": lambda level: correlation_loss(student[level], teacher[level]),
        "pkd_foreground": lambda level: foreground_correlation_loss(student[level], teacher[level], maps[level]),
        "cwd": lambda level: channel_divergence(student[level], teacher[level], 2.0),
    }[kind]
    expected = {"pkd": 6.0, "pkd_foreground": 6.0, "cwd": 0.5}[kind] * sum(single(level).item() for level in range(3))
    assert features_loss(kind, student, teacher, scores, 2.0).item() == pytest.approx(expected)


@pytest.mark.parametrize("kind", list(PUBLISHED_STRENGTH))
def test_half_precision_features_are_compared_in_full(kind):
    """bfloat16 holds 8 bits: summed in it, a thousand cells would be off by percents, and 3e-4 would be lost."""
    scores = torch.rand(2, 1024, 1)
    student, teacher = (_draw(seed, 2, 3, 32, 32).to(torch.bfloat16) for seed in (1, 2))
    found = features_loss(kind, [student], [teacher], scores, 1.0)
    exact = features_loss(kind, [student.double()], [teacher.double()], scores, 1.0)
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(exact.item(), rel=1e-4)


@pytest.mark.parametrize("kind", list(PUBLISHED_STRENGTH))
def test_gradient_reaches_the_students_features_only(kind):
    student, teacher = _draw(1, 2, 3, 4, 4).requires_grad_(), _draw(2, 2, 3, 4, 4).requires_grad_()
    scores = torch.rand(2, 16, 2, requires_grad=True)
    zeros = torch.zeros(16, 4)
    raws = [
        RawOutput(torch.zeros(2, 16, 2), torch.zeros(2, 16, 68), zeros, zeros[:, :2], [16], zeros[:, :1], (features,))
        for features in (student, teacher)
    ]
    config = DistillationConfig(feature_weight=0.5, feature_kind=kind, class_logits_weight=0, box_distribution_weight=0)
    terms = DistillationLoss(config)(*raws, scores)
    assert terms["features"].item() == pytest.approx(
        0.5 * features_loss(kind, [student], [teacher], scores, 1.0).item()
    )
    terms["features"].backward()
    assert student.grad is not None and student.grad.abs().max() > 1e-6
    assert teacher.grad is None and scores.grad is None
