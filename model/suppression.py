"""Non-maximum suppression as a network of fixed shapes, for engines that must do it inside their graph.

It gives what ``model.boxes.postprocess`` gives: candidates in falling score order, a box falls when its IoU with a
better kept box of its class is above the threshold. Greedy suppression is a loop over boxes; here every candidate is
judged at once, again and again. Starting from "all kept", a sweep keeps each box that no kept better box overlaps. A
box is right after as many sweeps as the longest chain of suppressions that leads to it (b falls by a, so c, which b
overlaps, stays), so a fixed number of sweeps equals the greedy result on all pictures whose chains are no longer.

Multiplications and maxima only, no matrix product: TensorRT-RTX has none in float32 for Turing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

MOST_CANDIDATES = 3840  # TensorRT's top-k takes no more
PADDING_LABEL = -1


@dataclass(frozen=True)
class SuppressionConfig:
    """What enters and leaves suppression; the fields mean what the arguments of ``boxes.postprocess`` mean.

    multi_label: every class of an anchor may be a candidate, else only its best one. candidates: how many of the best
    scores enter, over all classes. sweeps: see the module; each costs one pass over candidates x candidates.
    """

    score_threshold: float = 0.25
    iou_threshold: float = 0.7
    multi_label: bool = True
    candidates: int = 1000
    max_detections: int = 300
    sweeps: int = 12

    def __post_init__(self) -> None:
        for name in ("score_threshold", "iou_threshold"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be between 0 and 1, got {getattr(self, name)}")
        if not 1 <= self.candidates <= MOST_CANDIDATES:
            raise ValueError(f"candidates must be from 1 to {MOST_CANDIDATES}, got {self.candidates}")
        for name in ("max_detections", "sweeps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


class StaticSuppression(nn.Module):
    """Boxes and scores in, a table of fixed length out. Legend: B batch, A anchors, C classes, M rows of the table."""

    def __init__(self, config: SuppressionConfig) -> None:
        super().__init__()
        self.config = config

    def forward(
        self, boxes_xyxy: Float[Tensor, "B A 4"], scores: Float[Tensor, "B A C"]
    ) -> tuple[Float[Tensor, "B M 4"], Float[Tensor, "B M"], Int64[Tensor, "B M"], Int64[Tensor, " B"]]:
        """Boxes, scores and labels of the kept candidates, best first, then rows of 0, 0 and -1; and how many are kept.

        M is ``max_detections``, or the number of candidates where that is smaller.
        """
        candidate_scores, anchors, labels = self._candidates(scores)
        valid = self._above_threshold(candidate_scores)  # (B, K)
        candidate_boxes = boxes_xyxy.gather(1, anchors.unsqueeze(2).expand(-1, -1, 4))  # (B, K, 4)
        kept = self._keep(candidate_boxes, labels, valid)
        rows, filled = self._first_kept(kept)
        found = filled.unsqueeze(2).expand(-1, -1, 4)
        picked_boxes = candidate_boxes.gather(1, rows.unsqueeze(2).expand(-1, -1, 4))
        return (
            torch.where(found, picked_boxes, torch.zeros_like(picked_boxes)),
            candidate_scores.gather(1, rows) * filled.to(scores.dtype),
            torch.where(filled, labels.gather(1, rows), PADDING_LABEL),
            filled.to(torch.int64).sum(dim=1),
        )

    def _candidates(
        self, scores: Float[Tensor, "B A C"]
    ) -> tuple[Float[Tensor, "B K"], Int64[Tensor, "B K"], Int64[Tensor, "B K"]]:
        """The best scores of each image in falling order, with their anchors and classes."""
        anchors, classes = scores.shape[1], scores.shape[2]
        if self.config.multi_label:
            best, places = scores.flatten(1).topk(min(self.config.candidates, anchors * classes), dim=1)
            rows = places // classes
            return best, rows, places - rows * classes
        strongest, labels = scores.max(dim=2)
        best, rows = strongest.topk(min(self.config.candidates, anchors), dim=1)
        return best, rows, labels.gather(1, rows)

    def _above_threshold(self, candidate_scores: Float[Tensor, "B K"]) -> Bool[Tensor, "B K"]:
        if self.config.multi_label:
            return candidate_scores > self.config.score_threshold
        return candidate_scores >= self.config.score_threshold

    def _keep(
        self, boxes_xyxy: Float[Tensor, "B K 4"], labels: Int64[Tensor, "B K"], valid: Bool[Tensor, "B K"]
    ) -> Float[Tensor, "B K"]:
        """1 for every candidate that no better one suppresses, else 0."""
        overlapping = _pairwise_iou(boxes_xyxy) > self.config.iou_threshold
        same_class = labels.unsqueeze(2) == labels.unsqueeze(1)
        count = boxes_xyxy.shape[1]
        better = torch.ones(count, count, dtype=torch.bool, device=boxes_xyxy.device).triu(1)
        suppresses = (overlapping & same_class & better).to(boxes_xyxy.dtype)  # (B, K, K), row suppresses column
        possible = valid.to(boxes_xyxy.dtype)
        kept = possible
        for _ in range(self.config.sweeps):
            kept = possible * (1 - (kept.unsqueeze(2) * suppresses).amax(dim=1))
        return kept

    def _first_kept(self, kept: Float[Tensor, "B K"]) -> tuple[Int64[Tensor, "B M"], Bool[Tensor, "B M"]]:
        """Places of the kept candidates in their order, and which of these places are real."""
        count = kept.shape[1]
        falling = torch.arange(count, 0, -1, dtype=kept.dtype, device=kept.device)  # no two alike, so top-k has no ties
        rank, rows = (kept * falling).topk(min(self.config.max_detections, count), dim=1)
        return rows, rank > 0


def _pairwise_iou(boxes_xyxy: Float[Tensor, "B K 4"]) -> Float[Tensor, "B K K"]:
    """Intersection over union of every pair within an image; 0 where both are empty, as ``boxes.box_iou``."""
    left, top, right, bottom = boxes_xyxy.unbind(dim=2)
    width = torch.minimum(right.unsqueeze(2), right.unsqueeze(1)) - torch.maximum(left.unsqueeze(2), left.unsqueeze(1))
    height = torch.minimum(bottom.unsqueeze(2), bottom.unsqueeze(1)) - torch.maximum(top.unsqueeze(2), top.unsqueeze(1))
    intersection = width.clamp(min=0) * height.clamp(min=0)
    area = (right - left).clamp(min=0) * (bottom - top).clamp(min=0)
    union = area.unsqueeze(2) + area.unsqueeze(1) - intersection
    return torch.where(union > 0, intersection / torch.where(union > 0, union, torch.ones_like(union)), 0.0)
