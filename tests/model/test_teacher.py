"""The teacher answers as its networks do: fused, in channels-last order, in half precision, and averaged."""

from __future__ import annotations

import math

import pytest
import torch

import model
from model.head import NUM_BINS
from model.teacher import Teacher, average_box_distributions, average_class_logits
from model.yolo_nas import YoloNAS


def _lively(variant: str, seed: int, classes: int = 3) -> YoloNAS:
    """A network with norm statistics and branches that fusing cannot ignore."""
    torch.manual_seed(seed)
    network = model.build(variant, classes)
    with torch.no_grad():
        for name, tensor in network.state_dict().items():
            if name.endswith("running_mean"):
                tensor.normal_(0, 0.1)
            elif name.endswith("running_var"):
                tensor.uniform_(0.5, 1.5)
    return network.eval()


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(1))


def test_one_network_answers_as_before(images):
    """Fusing and memory order change the order of sums: float32 rounding through some sixty layers, no more."""
    network = _lively("pico", 0)
    with torch.no_grad():
        (boxes_xyxy, scores), raw = network(images)
    (teacher_boxes, teacher_scores), teacher_raw = Teacher([network])(images)
    torch.testing.assert_close(teacher_boxes, boxes_xyxy, rtol=1e-4, atol=1e-3)  # pixels
    torch.testing.assert_close(teacher_scores, scores, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(teacher_raw.box_distribution_logits, raw.box_distribution_logits, rtol=1e-4, atol=1e-4)
    for ours, theirs in zip(teacher_raw.features, raw.features, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_network_itself_is_left_alone(images):
    network = _lively("pico", 0).train()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    teacher = Teacher([network])
    teacher(images)
    assert network.training and not network.fused
    assert all(parameter.requires_grad for parameter in network.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    assert not any(parameter.requires_grad for parameter in teacher.parameters()) and not teacher.training


def test_a_fused_network_may_teach_too(images):
    network = _lively("pico", 0)
    expected = Teacher([network])(images)[1].class_logits
    torch.testing.assert_close(Teacher([network.fused_copy()])(images)[1].class_logits, expected, rtol=0, atol=0)


def test_bfloat16_stays_near_and_answers_in_float32(images):
    """Eight bits of mantissa through sixty layers: scores move by less than 0.01, boxes by less than half a pixel."""
    network = _lively("pico", 0)
    (boxes_xyxy, scores), _ = Teacher([network])(images)
    (near_boxes, near_scores), raw = Teacher([network], "bfloat16")(images)
    assert near_boxes.dtype == near_scores.dtype == raw.class_logits.dtype == torch.float32
    torch.testing.assert_close(near_scores, scores, rtol=0, atol=0.01)
    torch.testing.assert_close(near_boxes, boxes_xyxy, rtol=0, atol=0.5)
    assert not torch.equal(near_scores, scores)


def test_networks_of_different_variants_are_averaged_in_probability_space(images):
    networks = [_lively("pico", 0), _lively("t", 1)]
    with torch.no_grad():
        outputs = [network(images) for network in networks]
    (boxes_xyxy, scores), raw = Teacher(networks)(images)
    mean_scores = (outputs[0][0][1] + outputs[1][0][1]) / 2
    torch.testing.assert_close(scores, mean_scores, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(raw.class_logits.sigmoid(), mean_scores, rtol=1e-4, atol=1e-6)
    # a box is linear in its distributions, so the mean distribution gives the mean box
    torch.testing.assert_close(boxes_xyxy, (outputs[0][0][0] + outputs[1][0][0]) / 2, rtol=1e-4, atol=1e-3)
    sides = [
        torch.unflatten(output.box_distribution_logits, -1, (4, NUM_BINS)).softmax(-1)
        for output in (outputs[0][1], outputs[1][1], raw)
    ]
    torch.testing.assert_close(sides[2], (sides[0] + sides[1]) / 2, rtol=1e-4, atol=1e-6)
    for ours, first in zip(raw.features, outputs[0][1].features, strict=True):
        torch.testing.assert_close(ours, first, rtol=1e-4, atol=1e-4)


def test_two_equal_networks_are_one(images):
    network = _lively("pico", 0)
    (boxes_xyxy, scores), _ = Teacher([network])(images)
    (twice_boxes, twice_scores), _ = Teacher([network, network])(images)
    torch.testing.assert_close(twice_scores, scores, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(twice_boxes, boxes_xyxy, rtol=1e-5, atol=1e-4)


def test_average_of_logits_worked_example():
    """Probabilities 3/4 and 1/4 average to 1/2, logit 0; far out, where sigmoids are 1, the logit stays finite."""
    logits = torch.tensor([[math.log(3), 200.0, -90.0], [-math.log(3), 200.0, 90.0]]).reshape(2, 1, 1, 3)
    torch.testing.assert_close(average_class_logits(logits).flatten(), torch.tensor([0.0, 200.0, 0.0]))


def test_average_of_sides_worked_example():
    """Certain of bin 2, and of bin 4: half each, which is a side of 3 strides."""
    logits = torch.zeros(2, 1, 1, 4, NUM_BINS)
    logits[0, ..., 2] = logits[1, ..., 4] = 60.0
    mean = average_box_distributions(logits.flatten(-2)).reshape(4, NUM_BINS).exp()
    torch.testing.assert_close(mean.sum(dim=-1), torch.ones(4))
    torch.testing.assert_close(mean @ torch.arange(NUM_BINS).float(), torch.full((4,), 3.0))


@pytest.mark.parametrize(
    ("networks", "message"),
    [([], "one or more networks"), ([("pico", 3), ("pico", 4)], r"got class counts \[3, 4\]")],
)
def test_networks_must_fit(networks, message):
    with pytest.raises(ValueError, match=message):
        Teacher([model.build(*arguments) for arguments in networks])


def test_unknown_precision_is_refused():
    with pytest.raises(ValueError, match="teacher precision must be one of"):
        Teacher([model.build("pico", 1)], "int8")
