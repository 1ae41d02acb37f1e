"""Every distillation term: worked examples, zero at agreement, gradients to the student and never to the teacher."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import model
from model.distillation import (
    DistillationConfig,
    DistillationLoss,
    FeatureAdapters,
    binary_divergence,
    distribution_divergence,
)
from model.head import RawOutput

TERMS = {
    "class_logits": "class_logits_weight",
    "box_distribution": "box_distribution_weight",
    "features": "feature_weight",
}
WIDTHS = (8, 12, 16)


def _raw(seed: int, *, requires_grad: bool = False, widths: tuple[int, ...] = WIDTHS, classes: int = 3) -> RawOutput:
    """Random outputs of two images with five anchors, of which the first has a confident class."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, offset: float = 0.0) -> Tensor:
        values = torch.randn(shape, generator=generator, dtype=torch.float64) + offset
        return values.requires_grad_(requires_grad)

    features = tuple(draw(2, width, 4, 4) for width in widths)
    zeros = torch.zeros(5, 4)
    return RawOutput(draw(2, 5, classes), draw(2, 5, 68), zeros, zeros[:, :2], [5], zeros[:, :1], features)


def _only(term: str, **settings) -> DistillationConfig:
    return DistillationConfig(**{weight: float(name == term) for name, weight in TERMS.items()}, **settings)


@pytest.mark.parametrize("term", list(TERMS))
def test_gradient_reaches_the_student_and_not_the_teacher(term):
    student, teacher = _raw(1, requires_grad=True), _raw(2, requires_grad=True)
    terms = DistillationLoss(_only(term))(student, teacher, teacher.class_logits.sigmoid())
    assert list(terms) == [term]
    terms[term].backward()
    reached = {
        "class_logits": [student.class_logits],
        "box_distribution": [student.box_distribution_logits],
        "features": list(student.features),
    }
    for name, leaves in reached.items():
        for leaf in leaves:
            assert (leaf.grad is not None and leaf.grad.abs().max() > 1e-6) == (name == term)
    for leaf in (teacher.class_logits, teacher.box_distribution_logits, *teacher.features):
        assert leaf.grad is None


@pytest.mark.parametrize("term", list(TERMS))
def test_gradient_reaches_every_layer_of_a_real_student(term):
    """A pico student of a nano teacher: through each term, every parameter that feeds it gets a nonzero gradient."""
    student, teacher = model.build("pico", 2).train(), model.build("n", 2).eval()
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        (_, teacher_scores), teacher_raw = teacher(images)
    _, student_raw = student(images)
    widths = [[level.shape[1] for level in raw.features] for raw in (student_raw, teacher_raw)]
    loss = DistillationLoss(_only(term, foreground_threshold=0.0), FeatureAdapters(*widths))
    loss(student_raw, teacher_raw, teacher_scores)[term].backward()
    predictions = {"class_logits": "cls_", "box_distribution": "reg_", "features": "no head"}
    gradients = {name: parameter.grad for name, parameter in student.named_parameters()}
    assert gradients["backbone.stem.conv.branch_3x3.conv.weight"].abs().max() > 0
    for name, gradient in gradients.items():
        if name.startswith("heads") and ".stem." not in name:
            feeds = predictions[term] in name
            assert (gradient is not None and bool(gradient.any())) == feeds, name
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_adapters_learn_with_the_features_term():
    student, teacher = _raw(1, widths=(4, 4, 4)), _raw(2)
    adapters = FeatureAdapters((4, 4, 4), WIDTHS).double()
    DistillationLoss(_only("features"), adapters)(student, teacher, teacher.class_logits.sigmoid())[
        "features"
    ].backward()
    assert all(level.weight.grad.abs().max() > 1e-6 for level in adapters.levels)


def test_everything_is_zero_when_student_equals_teacher():
    raw = _raw(3)
    config = DistillationConfig(feature_weight=1.0)
    terms = DistillationLoss(config)(raw, raw, raw.class_logits.sigmoid())
    assert set(terms) == set(TERMS)
    for name, value in terms.items():
        assert value.item() == pytest.approx(0.0, abs=1e-14), name  # float64 rounding


def test_binary_divergence_worked_example():
    """Teacher 3/4, student 1/2: 3/4 ln(3/2) + 1/4 ln(1/2); with temperature 2 the halved logits, four times."""
    teacher, student = torch.tensor(3.0, dtype=torch.float64).log(), torch.tensor(0.0, dtype=torch.float64)
    expected = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert binary_divergence(student, teacher, 1.0).item() == pytest.approx(expected)
    assert binary_divergence(2 * student, 2 * teacher, 2.0).item() == pytest.approx(4 * expected)


def test_binary_divergence_is_cross_entropy_minus_entropy_also_far_out():
    """Logits of +-80 saturate the sigmoid; the divergence stays finite and exact there."""
    student = torch.tensor([80.0, -80.0, 1.0, -3.0], dtype=torch.float64)
    teacher = torch.tensor([-80.0, 80.0, 2.0, 0.5], dtype=torch.float64)
    probabilities = teacher.sigmoid()
    cross_entropy = functional.binary_cross_entropy_with_logits(student, probabilities, reduction="none")
    entropy = functional.binary_cross_entropy_with_logits(teacher, probabilities, reduction="none")
    torch.testing.assert_close(binary_divergence(student, teacher, 1.0), cross_entropy - entropy)


def test_distribution_divergence_worked_example():
    """Teacher certain of one bin on one side, student uniform: ln 17 on that side, a quarter of it in the mean."""
    teacher, student = torch.zeros(1, 4, 17, dtype=torch.float64), torch.zeros(1, 68, dtype=torch.float64)
    teacher[0, 2, 5] = 200.0
    divergence = distribution_divergence(student, teacher.reshape(1, 68), 1.0)
    assert divergence.item() == pytest.approx(math.log(17) / 4)
    warm = distribution_divergence(student, teacher.reshape(1, 68) * 3, 3.0)
    assert warm.item() == pytest.approx(9 * math.log(17) / 4)


def _one_anchor(class_logit: float, left_logit: float = 0.0) -> RawOutput:
    sides = torch.zeros(1, 1, 68, dtype=torch.float64)
    sides[0, 0, 0] = left_logit
    zeros = torch.zeros(1, 4)
    return RawOutput(
        torch.full((1, 1, 1), class_logit, dtype=torch.float64), sides, zeros, zeros[:, :2], [1], zeros[:, :1]
    )


def test_terms_worked_example():
    """One anchor, teacher 3/4 sure: normaliser max(3/4, 1) = 1, weight max(3/4, |1/2 - 3/4|) = 3/4."""
    student, teacher = _one_anchor(0.0), _one_anchor(math.log(3), left_logit=200.0)
    config = DistillationConfig(class_logits_weight=2.0, box_distribution_weight=3.0, box_temperature=1.0)
    terms = DistillationLoss(config)(student, teacher, teacher.class_logits.sigmoid())
    divergence = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert terms["class_logits"].item() == pytest.approx(2.0 * 0.75 * divergence)
    assert terms["box_distribution"].item() == pytest.approx(3.0 * 0.75 * math.log(17) / 4)


def test_background_counts_for_classes_by_disagreement_only():
    """Below the threshold: no box term, and a false alarm weighs the difference of the probabilities."""
    student, teacher = _one_anchor(0.0), _one_anchor(-math.log(99), left_logit=200.0)  # 1/2 and 1/100
    terms = DistillationLoss(DistillationConfig())(student, teacher, teacher.class_logits.sigmoid())
    divergence = 0.01 * math.log(0.02) + 0.99 * math.log(1.98)
    assert terms["class_logits"].item() == pytest.approx(0.49 * divergence)
    assert terms["box_distribution"].item() == 0.0


def test_schedule_scales_every_term():
    student, teacher = _raw(1), _raw(2)
    config = DistillationConfig(feature_weight=1.0, schedule="cosine", final_weight_ratio=0.2)
    scores = teacher.class_logits.sigmoid()
    start, middle, end = (DistillationLoss(config)(student, teacher, scores, progress) for progress in (0.0, 0.5, 1.0))
    for term in TERMS:
        assert middle[term].item() == pytest.approx(0.6 * start[term].item())
        assert end[term].item() == pytest.approx(0.2 * start[term].item())
    assert DistillationConfig().weight_factor(0.7) == 1.0
    assert config.weight_factor(1.5) == config.weight_factor(1.0)


def test_schedule_ends_with_the_teachers_share():
    """Half of the training with a teacher: the cosine has fallen to its end there, and nothing is asked after it."""
    config = DistillationConfig(schedule="cosine", final_weight_ratio=0.2, teacher_share=0.5)
    assert config.weight_factor(0.25) == pytest.approx(0.6)
    assert config.weight_factor(0.4999) == pytest.approx(0.2, abs=1e-4)  # the cosine is flat there
    assert [config.weight_factor(progress) for progress in (0.5, 0.9, 1.0)] == [0.0, 0.0, 0.0]
    assert config.asks_teacher(0.49) and not config.asks_teacher(0.5)
    assert not DistillationConfig(teacher_share=0.0).asks_teacher(0.0)
    student, teacher = _raw(1), _raw(2)
    assert DistillationLoss(config)(student, teacher, teacher.class_logits.sigmoid(), progress=0.5) == {}


def test_teacher_is_not_asked_for_terms_without_a_weight():
    config = DistillationConfig(class_logits_weight=0.0, box_distribution_weight=0.0)
    assert config.terms == [] and not config.asks_teacher(0.0)
    assert DistillationConfig(feature_weight=0.5).terms == list(TERMS)


def test_weight_zero_leaves_a_term_out():
    student, teacher = _raw(1, widths=(1, 1, 1)), _raw(2)
    terms = DistillationLoss(DistillationConfig(class_logits_weight=0.0))(
        student, teacher, teacher.class_logits.sigmoid()
    )
    assert list(terms) == ["box_distribution"]


def test_outputs_must_correspond():
    student, teacher = _raw(1, classes=2), _raw(2)
    with pytest.raises(ValueError, match=r"\(2, 5, 2\) for the student, \(2, 5, 3\) for the teacher"):
        DistillationLoss(DistillationConfig())(student, teacher, teacher.class_logits.sigmoid())


def test_features_of_other_widths_need_adapters():
    student, teacher = _raw(1, widths=(4, 4, 4)), _raw(2)
    with pytest.raises(ValueError, match=r"FeatureAdapters\(\[4, 4, 4\], \[8, 12, 16\]\)"):
        DistillationLoss(_only("features"))(student, teacher, teacher.class_logits.sigmoid())


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"class_temperature": 0.0}, "distill.class_temperature must be positive, got 0.0"),
        ({"box_temperature": float("nan")}, "distill.box_temperature must be positive"),
        ({"box_distribution_weight": -1.0}, "distill.box_distribution_weight must not be negative"),
        ({"foreground_threshold": 1.5}, "distill.foreground_threshold must be from 0 to 1"),
        ({"schedule": "linear"}, "distill.schedule must be one of"),
        ({"feature_kind": "mimic"}, "distill.feature_kind must be one of"),
        ({"feature_temperature": 0.0}, "distill.feature_temperature must be positive"),
        ({"teacher_share": 1.1}, "distill.teacher_share must be from 0 to 1"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(ValueError, match=message):
        DistillationConfig(**settings)
