"""Which anchors learn which object: task-aligned and ATSS assignment, batched over images and padded objects.

Extra shape legend: N objects per image after padding, claims are (B, N, A).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

TASK_ALIGNED_TOP_K = 13
TASK_ALIGNED_SCORE_POWER = 1.0
TASK_ALIGNED_IOU_POWER = 6.0
ATSS_ANCHORS_PER_LEVEL = 9
EPSILON = 1e-9


@dataclass
class Targets:
    """Objects of a batch, padded to the largest image; rows where ``mask`` is False are padding and never read.

    ``weights`` is 1 for human labels and the score, in [0, 1], for pseudo-labels.
    """

    boxes_xyxy: Float[Tensor, "B N 4"]  # network input pixels
    labels: Int64[Tensor, "B N"]
    weights: Float[Tensor, "B N"]
    mask: Bool[Tensor, "B N"]

    def to(self, device: torch.device | str) -> Targets:
        """The same targets on another device."""
        return Targets(*(getattr(self, field.name).to(device, non_blocking=True) for field in fields(self)))


class Assignment(NamedTuple):
    """The owner of each anchor.  At background anchors ``owners`` is 0 and ``soft_scores`` is 0."""

    positive: Bool[Tensor, "B A"]
    owners: Int64[Tensor, "B A"]  # index into the image's objects
    soft_scores: Float[Tensor, "B A"]  # classification target of the owner's class before the owner's weight, in [0, 1]


def pairwise_iou(
    first_xyxy: Float[Tensor, "*batch n 4"], second_xyxy: Float[Tensor, "*batch m 4"], epsilon: float = EPSILON
) -> Float[Tensor, "*batch n m"]:
    """Intersection over union of every pair; areas of inverted boxes count as 0."""
    # coordinate by coordinate and in place: arrays (n, m) are written once where (n, m, 2) would be several times
    left, top, right, bottom = (side[..., :, None] for side in first_xyxy.unbind(dim=-1))
    others = (side.contiguous()[..., None, :] for side in second_xyxy.unbind(dim=-1))
    other_left, other_top, other_right, other_bottom = others
    intersection = torch.minimum(right, other_right).sub_(torch.maximum(left, other_left)).clamp_(min=0)
    height = torch.minimum(bottom, other_bottom).sub_(torch.maximum(top, other_top)).clamp_(min=0)
    intersection.mul_(height)
    areas = [(boxes[..., 2:] - boxes[..., :2]).clamp(min=0).prod(dim=-1) for boxes in (first_xyxy, second_xyxy)]
    union = (areas[0][..., :, None] + areas[1][..., None, :]).sub_(intersection).add_(epsilon)
    return intersection.div_(union)


def points_inside(
    points: Float[Tensor, "A 2"], boxes_xyxy: Float[Tensor, "B N 4"], epsilon: float = EPSILON
) -> Bool[Tensor, "B N A"]:
    """Whether each point lies strictly inside each box."""
    x, y = (coordinate.contiguous() for coordinate in points.unbind(dim=-1))
    left, top, right, bottom = (side[..., None] for side in boxes_xyxy.unbind(dim=-1))
    nearest_side = torch.minimum(torch.minimum(x - left, right - x), torch.minimum(y - top, bottom - y))
    return nearest_side > epsilon


def _settle_claims(
    claims: Bool[Tensor, "B N A"], overlaps: Float[Tensor, "B N A"], mask: Bool[Tensor, "B N"]
) -> tuple[Bool[Tensor, "B A"], Int64[Tensor, "B A"]]:
    """Positive anchors and their owners.

    An anchor that several objects claim goes to the object it overlaps most, even to one that did not claim it.
    """
    num_claims = claims.sum(dim=1)
    owners = torch.zeros_like(num_claims)
    image, claimant, anchor = claims.nonzero(as_tuple=True)
    owners[image, anchor] = claimant
    # few anchors have several claimants: only for these, whatever was written above, is the closest object looked for
    image, anchor = (num_claims > 1).nonzero(as_tuple=True)
    candidates = overlaps[image, :, anchor].masked_fill(~mask[image], -1.0)  # (contested anchors, N)
    owners[image, anchor] = candidates.argmax(dim=1)
    return num_claims > 0, owners


def _at_owner(values: Float[Tensor, "B N A"], owners: Int64[Tensor, "B A"]) -> Float[Tensor, "B A"]:
    return values.gather(1, owners[:, None, :]).squeeze(1)


def _background(scores: Float[Tensor, "B A C"]) -> Assignment:
    flat = scores[..., 0]
    return Assignment(torch.zeros_like(flat, dtype=torch.bool), torch.zeros_like(flat, dtype=torch.int64), flat * 0.0)


@torch.no_grad()
def assign_task_aligned(
    scores: Float[Tensor, "B A C"],
    boxes_xyxy: Float[Tensor, "B A 4"],
    anchor_points: Float[Tensor, "A 2"],
    targets: Targets,
) -> Assignment:
    """Task-aligned assignment of TOOD (arXiv 2108.07755, section 3.2) with the constants of PP-YOLOE.

    Every object claims the 13 anchors inside it with the largest ``score * IoU^6``; anchors whose product is 0 are not
    claimed.  The soft score is that product, scaled so that the best anchor of an object gets the object's best IoU.
    """
    if targets.labels.shape[1] == 0:
        return _background(scores)
    overlaps = pairwise_iou(targets.boxes_xyxy, boxes_xyxy)  # (B, N, A)
    labels = targets.labels.clamp(0, scores.shape[2] - 1)[:, :, None].expand_as(overlaps)
    class_scores = scores.transpose(1, 2).gather(1, labels)
    alignment = class_scores.pow(TASK_ALIGNED_SCORE_POWER) * overlaps.pow(TASK_ALIGNED_IOU_POWER)
    inside = points_inside(anchor_points, targets.boxes_xyxy) & targets.mask[:, :, None]
    best = (alignment * inside).topk(min(TASK_ALIGNED_TOP_K, alignment.shape[2]), dim=2)
    claims = torch.zeros_like(inside).scatter_(2, best.indices, best.values > 0)
    positive, owners = _settle_claims(claims, overlaps, targets.mask)
    soft_scores = _normalise_alignment(alignment, overlaps, positive, owners)
    return Assignment(positive, owners * positive, soft_scores)


def _normalise_alignment(
    alignment: Float[Tensor, "B N A"],
    overlaps: Float[Tensor, "B N A"],
    positive: Bool[Tensor, "B A"],
    owners: Int64[Tensor, "B A"],
) -> Float[Tensor, "B A"]:
    """Alignment of each positive anchor, scaled per object from [0, max alignment] to [0, max IoU]."""
    owned = torch.zeros_like(alignment).scatter_(1, owners[:, None, :], positive[:, None, :].to(alignment.dtype))
    largest_overlap = (overlaps * owned).amax(dim=2, keepdim=True)  # (B, N, 1)
    largest_alignment = (alignment * owned).amax(dim=2, keepdim=True)
    scale = largest_overlap / (largest_alignment + EPSILON)
    return _at_owner(alignment * scale, owners) * positive


def _nearest_anchors(
    distances: Float[Tensor, "B N A"], anchors_per_level: Sequence[int]
) -> Int64[Tensor, "B N candidates"]:
    """Indices of the anchors of each level that are nearest to each object."""
    nearest, first = [], 0
    for level in torch.split(distances, list(anchors_per_level), dim=2):
        count = min(ATSS_ANCHORS_PER_LEVEL, level.shape[2])
        nearest.append(level.topk(count, dim=2, largest=False).indices + first)
        first += level.shape[2]
    return torch.cat(nearest, dim=2)


@torch.no_grad()
def assign_atss(
    boxes_xyxy: Float[Tensor, "B A 4"],
    scores: Float[Tensor, "B A C"],
    anchors_xyxy: Float[Tensor, "A 4"],
    anchor_points: Float[Tensor, "A 2"],
    anchors_per_level: Sequence[int],
    targets: Targets,
) -> Assignment:
    """Adaptive training sample selection (arXiv 1912.02424, section 4) on static anchors.

    Of the 9 anchors per level nearest to an object, those inside it are claimed whose IoU exceeds mean + standard
    deviation of the candidates' IoU.  The soft score is the IoU of the owner with the predicted box.
    """
    if targets.labels.shape[1] == 0:
        return _background(scores)
    anchors = anchors_xyxy.expand(len(targets.labels), -1, -1)
    anchor_overlaps = pairwise_iou(targets.boxes_xyxy, anchors, epsilon=1e-10)
    centres = (targets.boxes_xyxy[..., :2] + targets.boxes_xyxy[..., 2:]) / 2
    distances = torch.linalg.vector_norm(centres[:, :, None, :] - anchor_points, dim=-1)
    nearest = _nearest_anchors(distances, anchors_per_level)
    candidate_overlaps = anchor_overlaps.gather(2, nearest)
    threshold = candidate_overlaps.mean(dim=2, keepdim=True) + candidate_overlaps.std(dim=2, keepdim=True)
    inside = points_inside(anchor_points, targets.boxes_xyxy) & targets.mask[:, :, None]
    claims = torch.zeros_like(inside).scatter_(2, nearest, candidate_overlaps > threshold) & inside
    positive, owners = _settle_claims(claims, anchor_overlaps, targets.mask)
    soft_scores = _at_owner(pairwise_iou(targets.boxes_xyxy, boxes_xyxy), owners) * positive
    return Assignment(positive, owners * positive, soft_scores)
