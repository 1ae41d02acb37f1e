"""Assigners against the golden vectors, worked examples and padding."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from model.assigner import Assignment, Targets, assign_atss, assign_task_aligned, pairwise_iou, points_inside
from model.head import make_anchor_grid

LEVELS = [(12, 16), (6, 8), (3, 4)]  # of the golden 96x128 input
ANCHORS_PER_LEVEL = [192, 48, 12]


def make_targets(boxes: list[list[float]], labels: list[int], padding: int = 0) -> Targets:
    """Targets of one image; padding rows hold boxes that would claim anchors if they were read."""
    rows = len(boxes) + padding
    boxes_xyxy = torch.tensor([boxes + [[0.0, 0.0, 500.0, 500.0]] * padding]).reshape(1, rows, 4)
    mask = torch.arange(rows)[None] < len(boxes)
    labels_with_padding = torch.tensor([labels + [0] * padding], dtype=torch.int64)
    return Targets(boxes_xyxy, labels_with_padding, torch.ones(1, rows), mask)


@pytest.fixture
def golden_case(golden) -> tuple[dict[str, Tensor], Targets]:
    tensors = golden.tensors("loss_and_assigners")
    mask = tensors["pad_gt_mask"].squeeze(-1)
    targets = Targets(tensors["gt_bbox"], tensors["gt_class"].squeeze(-1), torch.ones(mask.shape), mask)
    return tensors, targets


def _assign(name: str, tensors: dict[str, Tensor], targets: Targets) -> Assignment:
    scores = tensors["logits"].sigmoid()
    if name == "tal":
        return assign_task_aligned(scores, tensors["pred_boxes"], tensors["anchor_points"], targets)
    return assign_atss(
        tensors["pred_boxes"],
        scores,
        tensors["anchors"],
        tensors["anchor_points"],
        tensors["num_anchors"].tolist(),
        targets,
    )


@pytest.mark.parametrize("name", ["tal", "atss"])
def test_assignment_equals_golden(golden, golden_case, name):
    tensors, targets = golden_case
    assignment = _assign(name, tensors, targets)
    labels = torch.where(assignment.positive, targets.labels.gather(1, assignment.owners), 5)
    assert torch.equal(labels, tensors[f"{name}_labels"])
    assert assignment.positive.sum(1).tolist() == golden.json("loss_and_assigners")["losses"][f"{name}_positives"]
    boxes = targets.boxes_xyxy.gather(1, assignment.owners[..., None].expand(-1, -1, 4))
    chosen = assignment.positive
    torch.testing.assert_close(boxes[chosen], tensors[f"{name}_boxes"][chosen], rtol=0, atol=1e-4)
    expected = tensors[f"{name}_scores"].sum(-1)  # one class per anchor
    torch.testing.assert_close(assignment.soft_scores, expected, rtol=1e-4, atol=1e-7)  # golden README, float32 zeros


@pytest.mark.parametrize("name", ["tal", "atss"])
def test_padding_changes_nothing(golden_case, name):
    """Padding rows are never read, whatever they hold, wherever they stand."""
    tensors, targets = golden_case
    junk = torch.tensor([3.0, 2.0, 120.0, 90.0]).expand(3, 1, 4)
    padded = Targets(
        torch.cat([junk, targets.boxes_xyxy, junk], 1),
        torch.nn.functional.pad(targets.labels, (1, 1), value=99),
        torch.nn.functional.pad(targets.weights, (1, 1)),
        torch.nn.functional.pad(targets.mask, (1, 1)),
    )
    expected, actual = _assign(name, tensors, targets), _assign(name, tensors, padded)
    assert torch.equal(actual.positive, expected.positive)
    assert torch.equal(actual.owners - 1 * actual.positive.long(), expected.owners)
    assert torch.equal(actual.soft_scores, expected.soft_scores)


@pytest.mark.parametrize("name", ["tal", "atss"])
def test_images_are_assigned_independently(golden_case, name):
    tensors, targets = golden_case
    together = _assign(name, tensors, targets)
    for image in range(3):
        one = slice(image, image + 1)
        alone_tensors = {**tensors, "logits": tensors["logits"][one], "pred_boxes": tensors["pred_boxes"][one]}
        fields = (targets.boxes_xyxy, targets.labels, targets.weights, targets.mask)
        alone = _assign(name, alone_tensors, Targets(*(field[one] for field in fields)))
        for ours, theirs in zip(alone, together, strict=True):
            assert torch.equal(ours, theirs[one])


@pytest.mark.parametrize("name", ["tal", "atss"])
@pytest.mark.parametrize("rows", [0, 2])
def test_no_objects_make_everything_background(golden_case, name, rows):
    """Both without rows and with padding rows only."""
    tensors, _ = golden_case
    empty = Targets(
        torch.zeros(3, rows, 4),
        torch.zeros(3, rows, dtype=torch.int64),
        torch.zeros(3, rows),
        torch.zeros(3, rows, dtype=torch.bool),
    )
    assignment = _assign(name, tensors, empty)
    assert not assignment.positive.any()
    assert not assignment.soft_scores.any()


def test_task_aligned_worked_example():
    """One object of 16 px around four stride-8 anchors; predictions with known IoU and score.

    t = score * IoU^6, scaled so that the best anchor gets the best IoU.
    """
    grid = make_anchor_grid([(4, 4), (0, 0), (0, 0)], torch.device("cpu"), torch.float64)
    targets = make_targets([[8.0, 8.0, 24.0, 24.0]], [1])
    targets.boxes_xyxy = targets.boxes_xyxy.double()
    boxes = torch.zeros(1, 16, 4, dtype=torch.float64)
    boxes[0, 5] = torch.tensor([8.0, 8.0, 24.0, 24.0])  # IoU 1
    boxes[0, 6] = torch.tensor([8.0, 8.0, 24.0, 16.0])  # IoU 1/2
    boxes[0, 0] = torch.tensor([8.0, 8.0, 24.0, 24.0])  # IoU 1, but its anchor point (4, 4) lies outside
    scores = torch.zeros(1, 16, 2, dtype=torch.float64)
    scores[0, :, 1] = 0.5
    scores[0, 6, 1] = 0.8
    assignment = assign_task_aligned(scores, boxes, grid.anchor_points, targets)
    assert assignment.positive[0].nonzero().flatten().tolist() == [5, 6]
    expected = torch.tensor([1.0, 0.8 * 0.5**6 / 0.5], dtype=torch.float64)
    torch.testing.assert_close(assignment.soft_scores[0, [5, 6]], expected, rtol=1e-6, atol=0)  # epsilon 1e-9 / 0.5


def test_task_aligned_claims_thirteen_anchors():
    grid = make_anchor_grid([(8, 8), (0, 0), (0, 0)], torch.device("cpu"), torch.float32)
    targets = make_targets([[0.0, 0.0, 64.0, 64.0]], [0])
    boxes = targets.boxes_xyxy.expand(1, 64, 4)
    scores = torch.linspace(0.1, 0.9, 64).reshape(1, 64, 1)
    positive = assign_task_aligned(scores, boxes, grid.anchor_points, targets).positive[0]
    assert positive.nonzero().flatten().tolist() == list(range(51, 64))  # the highest scores


@pytest.mark.parametrize("height, width", [(1, 1), (2, 3)])
def test_fewer_anchors_than_candidates(height, width):
    """Inputs of 32 or 64 pixels have levels with fewer anchors than either assigner wants to look at."""
    grid = make_anchor_grid(
        [(4 * height, 4 * width), (2 * height, 2 * width), (height, width)], torch.device("cpu"), torch.float32
    )
    targets = make_targets([[1.0, 1.0, 30.0, 30.0]], [0], padding=1)
    boxes = grid.anchors_xyxy[None]
    scores = torch.full((1, len(grid.anchor_points), 1), 0.3)
    counts = [16 * height * width, 4 * height * width, height * width]
    for assignment in (
        assign_task_aligned(scores, boxes, grid.anchor_points, targets),
        assign_atss(boxes, scores, grid.anchors_xyxy, grid.anchor_points, counts, targets),
    ):
        assert assignment.positive.any()
        assert assignment.soft_scores.isfinite().all()


def test_contested_anchor_goes_to_the_larger_overlap():
    """Both objects claim all anchors; each prediction belongs to the object it overlaps most."""
    grid = make_anchor_grid([(2, 2), (0, 0), (0, 0)], torch.device("cpu"), torch.float32)
    targets = make_targets([[0.0, 0.0, 16.0, 16.0], [0.0, 0.0, 15.0, 13.0]], [0, 1])
    boxes = targets.boxes_xyxy[:, [0, 1, 0, 1]]
    scores = torch.full((1, 4, 2), 0.5)
    assignment = assign_task_aligned(scores, boxes, grid.anchor_points, targets)
    assert assignment.positive.all()
    assert assignment.owners.tolist() == [[0, 1, 0, 1]]


def test_pairwise_iou_and_inside_worked_examples():
    first = torch.tensor([[0.0, 0.0, 2.0, 2.0], [3.0, 3.0, 1.0, 1.0]])  # the second is inverted: area 0
    second = torch.tensor([[1.0, 1.0, 3.0, 3.0], [5.0, 5.0, 6.0, 6.0]])
    torch.testing.assert_close(pairwise_iou(first, second), torch.tensor([[1 / 7, 0.0], [0.0, 0.0]]))
    points = torch.tensor([[1.0, 1.0], [2.0, 1.0]])  # the second lies on the border
    assert points_inside(points, first[None, :1]).tolist() == [[[True, False]]]
