"""What a student learns from a teacher's neck: three ways to compare feature maps, and layers that fit their widths.

All three compare maps whose channels are brought to mean 0 and deviation 1 over the batch, as DAMO-YOLO (arXiv
2211.15444) and RTMDet's distillation do with a batch norm without parameters: scale and offset differ between
architectures and mean nothing.  Computed in float32 whatever the networks' precision.

Legend: B batch, D channels of the teacher, H and W cells of a level.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from model.loss import global_normalizer

FeatureKind = Literal["pkd", "pkd_foreground", "cwd"]

PUBLISHED_STRENGTH: dict[FeatureKind, float] = {"pkd": 6.0, "pkd_foreground": 6.0, "cwd": 0.5}
"""Weight of each level's term as published: PKD in its authors' RetinaNet configurations (mmrazor), score-weighted
features in YOLO26's documentation, CWD in DAMO-YOLO (which lets it fall to a tenth by a cosine)."""


class FeatureAdapters(nn.Module):
    """1x1 convolutions that bring the student's P3, P4 and P5 to the teacher's widths for the features term.

    They must be trained with the student and are of no use afterwards.  Set them as an attribute of the student while
    it learns (``student.feature_adapters = adapters``: optimiser, checkpoints and device then include them) and delete
    the attribute at the end.
    """

    def __init__(self, student_channels: Sequence[int], teacher_channels: Sequence[int]) -> None:
        super().__init__()
        pairs = zip(student_channels, teacher_channels, strict=True)
        self.levels = nn.ModuleList(nn.Conv2d(student, teacher, 1) for student, teacher in pairs)

    def forward(self, features: Sequence[Float[Tensor, "B _ _ _"]]) -> list[Float[Tensor, "B _ _ _"]]:
        return [level(feature) for level, feature in zip(self.levels, features, strict=True)]


def correlation_loss(student: Float[Tensor, "B D H W"], teacher: Float[Tensor, "B D H W"]) -> Float[Tensor, ""]:
    """Half the squared difference of the standardised maps.

    PKD, arXiv 2207.02039: it is 1 minus the Pearson correlation, averaged over channels.
    """
    return (_standardise(student) - _standardise(teacher.detach())).square().mean() / 2


def foreground_correlation_loss(
    student: Float[Tensor, "B D H W"], teacher: Float[Tensor, "B D H W"], confidence: Float[Tensor, "B H W"]
) -> Float[Tensor, ""]:
    """PKD's squared difference, averaged over cells with the teacher's best score there as weight.

    On small objects most cells are background and drown what matters (FGD, arXiv 2111.11837, section 3); YOLO26's
    documentation weights an L2 loss by the teacher's scores.  A batch whose weights sum to less than 1 counts less.
    """
    difference = (_standardise(student) - _standardise(teacher.detach())).square().mean(dim=1) / 2  # (B, H, W)
    weight = confidence.detach().float()
    return (difference * weight).sum() / global_normalizer(weight.sum())


def channel_divergence(
    student: Float[Tensor, "B D H W"], teacher: Float[Tensor, "B D H W"], temperature: float
) -> Float[Tensor, ""]:
    """KL divergence of where each channel is active: a softmax over cells, mean over channels and images.

    CWD, arXiv 2011.13256, section 3.2, times the squared temperature; salient cells weigh most by themselves.
    """
    ours = (_standardise(student) / temperature).flatten(2).log_softmax(dim=-1)
    theirs = (_standardise(teacher.detach()) / temperature).flatten(2).log_softmax(dim=-1)
    return (theirs.exp() * (theirs - ours)).sum(dim=-1).mean() * temperature**2


def _standardise(features: Float[Tensor, "B D H W"]) -> Float[Tensor, "B D H W"]:
    features = features.float() if features.dtype in (torch.bfloat16, torch.float16) else features
    centred = features - features.mean(dim=(0, 2, 3), keepdim=True)
    variance = centred.square().mean(dim=(0, 2, 3), keepdim=True)
    return centred / torch.sqrt(variance + 1e-6)


def features_loss(
    kind: FeatureKind,
    student: Sequence[Float[Tensor, "B _ _ _"]],
    teacher: Sequence[Float[Tensor, "B _ _ _"]],
    teacher_scores: Float[Tensor, "B A C"],
    temperature: float,
) -> Float[Tensor, ""]:
    """Sum over the levels at the kind's published strength; ``temperature`` is CWD's.

    Raises ValueError when the maps of a level have different widths.
    """
    _check_widths(student, teacher)
    levels = list(zip(student, teacher, strict=True))
    if kind == "cwd":
        losses = [channel_divergence(ours, theirs, temperature) for ours, theirs in levels]
    elif kind == "pkd":
        losses = [correlation_loss(ours, theirs) for ours, theirs in levels]
    else:
        maps = _confidence_maps(teacher_scores, teacher)
        pairs = zip(levels, maps, strict=True)
        losses = [foreground_correlation_loss(ours, theirs, confidence) for (ours, theirs), confidence in pairs]
    return torch.stack(losses).sum() * PUBLISHED_STRENGTH[kind]


def _confidence_maps(
    teacher_scores: Float[Tensor, "B A C"], features: Sequence[Float[Tensor, "B _ _ _"]]
) -> list[Float[Tensor, "B _ _"]]:
    """The best score of each anchor, laid out as the levels' cells."""
    shapes = [level.shape[2:] for level in features]
    parts = torch.split(teacher_scores.amax(dim=-1), [height * width for height, width in shapes], dim=1)
    return [part.reshape(-1, *shape) for part, shape in zip(parts, shapes, strict=True)]


def _check_widths(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> None:
    ours, theirs = ([level.shape[1] for level in levels] for levels in (student, teacher))
    if ours != theirs:
        raise ValueError(
            f"distill.feature_weight needs feature maps of equal width, got student {ours} and teacher {theirs}; "
            f"give DistillationLoss a FeatureAdapters({ours}, {theirs})"
        )
