"""The loss of a distillation: when the teacher is asked, and what its terms are called."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import model
from model.distillation import DistillationConfig
from model.loss import Targets
from model.teacher import Teacher
from pipeline_tasks.distillation_task import add_feature_adapters, remove_feature_adapters, with_teacher


class CountedTeacher(Teacher):
    """Knows how often it was asked."""

    asked = 0

    def forward(self, images: torch.Tensor) -> Any:
        self.asked += 1
        return super().forward(images)


@pytest.fixture
def batch() -> tuple[torch.Tensor, Targets]:
    torch.manual_seed(0)
    boxes_xyxy = torch.tensor([[[8.0, 8.0, 40.0, 40.0]]] * 2)
    targets = Targets(boxes_xyxy, torch.zeros(2, 1, dtype=torch.int64), torch.ones(2, 1), torch.ones(2, 1).bool())
    return torch.rand(2, 3, 64, 64), targets


def test_teacher_is_asked_only_while_a_term_has_a_weight(batch: tuple[torch.Tensor, Targets]) -> None:
    student, teacher = model.build("pico", 2).train(), CountedTeacher([model.build("pico", 2)])
    add_feature_adapters(student, teacher)
    compute = with_teacher(teacher, 2, DistillationConfig(feature_weight=1.0, teacher_share=0.5))
    loss, terms = compute(student, *batch, 0.49)
    assert teacher.asked == 1
    assert loss.item() == pytest.approx(sum(value.item() for value in terms.values()))
    spared_loss, spared = compute(student, *batch, 0.5)
    assert teacher.asked == 1
    assert list(spared) == list(terms), "an epoch's means need the same names at each step"
    assert [spared[name].item() for name in spared if name.startswith("distill_")] == [0.0, 0.0, 0.0]
    spared_loss.backward()
    gradients = [parameter.grad for parameter in student.feature_adapters.parameters()]
    assert all(gradient is not None and not gradient.any() for gradient in gradients), "DDP waits for all of them"
    remove_feature_adapters(student)
    assert not any("adapters" in name for name in student.state_dict())


def test_without_weights_it_is_the_detection_loss(batch: tuple[torch.Tensor, Targets]) -> None:
    from pipeline_tasks.training_task import detection_loss

    student, teacher = model.build("pico", 2).eval(), CountedTeacher([model.build("pico", 2)])
    without = DistillationConfig(class_logits_weight=0.0, box_distribution_weight=0.0)
    loss, terms = with_teacher(teacher, 2, without)(student, *batch, 0.0)
    expected, expected_terms = detection_loss(2)(student, *batch, 0.0)
    assert teacher.asked == 0 and torch.equal(loss, expected) and list(terms) == list(expected_terms)
