"""The detection loss of YOLO-NAS: varifocal or focal classification, GIoU, and distribution focal loss.

A pseudo-label's score enters at one place: the soft score ``q`` of each of its positive anchors is multiplied by the
object's weight.  ``q`` is the classification target, the weight of positive classification elements, the weight of the
IoU and distribution terms, and what the normaliser sums, so an object of weight 0.5 counts half everywhere and teaches
half the confidence.  An object of weight 0 keeps its anchors from learning background but teaches nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import KW_ONLY, dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch.nn import functional

from model import processes
from model.assigner import Assignment, Targets, assign_atss, assign_task_aligned
from model.head import NUM_BINS, REG_MAX, RawOutput

__all__ = ["DetectionLoss", "LossParts", "Targets", "global_normalizer", "recorded_normalizers"]

AssignerName = Literal["task_aligned", "atss"]
ClassificationName = Literal["varifocal", "focal"]

VARIFOCAL_ALPHA = 0.75  # weight of negatives, arXiv 2008.13367
FOCAL_ALPHA = 0.25  # weight of positives; used with the static assigner only
LARGEST_DISTANCE = REG_MAX - 0.01  # in strides; keeps the right neighbour bin in range

_recorded: ContextVar[list[Tensor] | None] = ContextVar("recorded normalizers", default=None)


@dataclass
class LossParts:
    """Scalars (0-d); the parts are already weighted and normalised, ``total`` is their sum."""

    total: Float[Tensor, ""]
    classification: Float[Tensor, ""]
    iou: Float[Tensor, ""]
    distribution: Float[Tensor, ""]


def global_normalizer(local_sum: Float[Tensor, ""]) -> Float[Tensor, ""]:
    """What a process divides its local sum of losses by: the sum over all processes, at least 1, per process.

    Averaging gradients over processes, as DDP does, then gives the gradient one process would have on the whole batch.
    """
    total = local_sum.detach().clone()
    if processes.count() > 1:
        torch.distributed.all_reduce(total)
    recorded = _recorded.get()
    if recorded is not None:
        recorded.append(total)
    return total.clamp(min=1.0) / processes.count()


@contextmanager
def recorded_normalizers() -> Iterator[list[Float[Tensor, ""]]]:
    """The sums over all processes that ``global_normalizer`` is asked for inside the block, in order of the calls.

    Gradient accumulation needs them: a batch that is learned in parts divides by the sum over all parts.
    """
    sums: list[Tensor] = []
    token = _recorded.set(sums)
    try:
        yield sums
    finally:
        _recorded.reset(token)


def generalized_iou(
    first_xyxy: Float[Tensor, "n 4"], second_xyxy: Float[Tensor, "n 4"], epsilon: float = 1e-10
) -> Float[Tensor, " n"]:
    """GIoU (arXiv 1902.09630) of paired boxes, in [-1, 1]; areas are not clipped."""
    first_left_top, first_right_bottom = first_xyxy.chunk(2, dim=-1)
    second_left_top, second_right_bottom = second_xyxy.chunk(2, dim=-1)
    overlap = torch.minimum(first_right_bottom, second_right_bottom) - torch.maximum(first_left_top, second_left_top)
    hull = torch.maximum(first_right_bottom, second_right_bottom) - torch.minimum(first_left_top, second_left_top)
    intersection = overlap.clamp(min=0).prod(dim=-1)
    first_area = (first_right_bottom - first_left_top).prod(dim=-1)
    second_area = (second_right_bottom - second_left_top).prod(dim=-1)
    union = first_area + second_area - intersection + epsilon
    hull_area = hull.clamp(min=0).prod(dim=-1) + epsilon
    return intersection / union - (hull_area - union) / hull_area


def distribution_focal_loss(
    box_distribution_logits: Float[Tensor, "n 68"], distances: Float[Tensor, "n 4"]
) -> Float[Tensor, " n"]:
    """Cross-entropy with the two bins around each side's distance (arXiv 2006.04388, section 3), mean of the sides.

    ``distances`` are in strides and clipped to [0, 15.99].
    """
    distances = distances.clamp(0, LARGEST_DISTANCE)
    lower = distances.long()
    upper_share = distances - lower
    log_probabilities = torch.unflatten(box_distribution_logits, -1, (4, NUM_BINS)).log_softmax(dim=-1)
    at_lower = log_probabilities.gather(-1, lower[..., None]).squeeze(-1)
    at_upper = log_probabilities.gather(-1, lower[..., None] + 1).squeeze(-1)
    return -(at_lower * (1 - upper_share) + at_upper * upper_share).mean(dim=-1)


@dataclass(frozen=True)
class DetectionLoss:
    """Sum of classification, IoU and distribution terms over a batch, divided by the sum of the soft scores."""

    num_classes: int
    _: KW_ONLY
    classification_weight: float = 1.0
    iou_weight: float = 2.5
    distribution_weight: float = 0.5
    assigner: AssignerName = "task_aligned"
    classification: ClassificationName = "varifocal"

    def __post_init__(self) -> None:
        if self.assigner not in get_args(AssignerName):
            raise ValueError(f"loss.assigner must be one of {get_args(AssignerName)}, got {self.assigner!r}")
        if self.classification not in get_args(ClassificationName):
            names = get_args(ClassificationName)
            raise ValueError(f"loss.classification must be one of {names}, got {self.classification!r}")
        for name in ("classification_weight", "iou_weight", "distribution_weight"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"loss.{name} must not be negative, got {getattr(self, name)}")

    def __call__(
        self,
        raw: RawOutput,
        boxes_xyxy: Float[Tensor, "B A 4"],
        scores: Float[Tensor, "B A C"],
        targets: Targets,
    ) -> LossParts:
        """Loss of a forward pass ``(boxes_xyxy, scores), raw``; raises ValueError for labels without a class.

        With several processes each returns its share, scaled so that the mean over processes is what one would get.
        """
        self._check_labels(targets)
        assignment = self.assign(raw, boxes_xyxy, scores, targets)
        soft_scores = assignment.soft_scores
        if targets.labels.shape[1]:
            soft_scores = soft_scores * targets.weights.gather(1, assignment.owners)
        normalizer = global_normalizer(soft_scores.sum())
        classification = self._classification_term(raw.class_logits, assignment, soft_scores, targets)
        iou, distribution = _box_terms(raw, boxes_xyxy, assignment, soft_scores, targets)
        parts = (
            self.classification_weight * classification / normalizer,
            self.iou_weight * iou / normalizer,
            self.distribution_weight * distribution / normalizer,
        )
        return LossParts(parts[0] + parts[1] + parts[2], *parts)

    def assign(
        self,
        raw: RawOutput,
        boxes_xyxy: Float[Tensor, "B A 4"],
        scores: Float[Tensor, "B A C"],
        targets: Targets,
    ) -> Assignment:
        """The anchors' owners for this loss's assigner; no gradient flows through it."""
        if self.assigner == "task_aligned":
            return assign_task_aligned(scores, boxes_xyxy, raw.anchor_points, targets)
        return assign_atss(boxes_xyxy, scores, raw.anchors_xyxy, raw.anchor_points, raw.anchors_per_level, targets)

    def _check_labels(self, targets: Targets) -> None:
        labels = targets.labels[targets.mask]
        if labels.numel() and (int(labels.min()) < 0 or int(labels.max()) >= self.num_classes):
            raise ValueError(
                f"target labels must be from 0 to {self.num_classes - 1}, "
                f"got {int(labels.min())} to {int(labels.max())}; compare the data set's classes with the model's"
            )

    def _classification_term(
        self,
        class_logits: Float[Tensor, "B A C"],
        assignment: Assignment,
        soft_scores: Float[Tensor, "B A"],
        targets: Targets,
    ) -> Float[Tensor, ""]:
        """Sum over all anchors and classes; gradients also flow through the probabilities in the weights."""
        goal, assigned = _class_goals(class_logits, assignment, soft_scores, targets.labels)
        probabilities = class_logits.sigmoid()
        if self.classification == "varifocal":
            weight = VARIFOCAL_ALPHA * probabilities.square() * ~assigned + goal
        else:
            weight = (probabilities - goal).square()
            if self.assigner == "atss":
                weight = weight * (FOCAL_ALPHA * goal + (1 - FOCAL_ALPHA) * (1 - goal))
        cross_entropy = functional.binary_cross_entropy_with_logits(class_logits, goal, reduction="none")
        return (weight * cross_entropy).sum()


def _class_goals(
    class_logits: Float[Tensor, "B A C"],
    assignment: Assignment,
    soft_scores: Float[Tensor, "B A"],
    labels: Int64[Tensor, "B N"],
) -> tuple[Float[Tensor, "B A C"], Bool[Tensor, "B A C"]]:
    """Soft classification targets and where they belong to an owner; both are zero elsewhere."""
    goal = torch.zeros_like(class_logits)
    assigned = torch.zeros_like(class_logits, dtype=torch.bool)
    if labels.shape[1]:
        owner_labels = (labels.gather(1, assignment.owners) * assignment.positive)[..., None]
        goal.scatter_(2, owner_labels, soft_scores[..., None].to(goal.dtype))
        assigned.scatter_(2, owner_labels, assignment.positive[..., None])
    return goal, assigned


def _box_terms(
    raw: RawOutput,
    boxes_xyxy: Float[Tensor, "B A 4"],
    assignment: Assignment,
    soft_scores: Float[Tensor, "B A"],
    targets: Targets,
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """IoU and distribution sums over the positive anchors, each weighted by its soft score; in stride units."""
    image, anchor = assignment.positive.nonzero(as_tuple=True)
    weight, strides = soft_scores[image, anchor], raw.strides[anchor]  # (P,), (P, 1)
    owner_boxes = targets.boxes_xyxy[image, assignment.owners[image, anchor]] / strides
    points = raw.anchor_points[anchor] / strides
    iou = ((1 - generalized_iou(boxes_xyxy[image, anchor] / strides, owner_boxes)) * weight).sum()
    distances = torch.cat([points - owner_boxes[:, :2], owner_boxes[:, 2:] - points], dim=-1)
    distribution = distribution_focal_loss(raw.box_distribution_logits[image, anchor], distances)
    return iou, (distribution * weight).sum()
