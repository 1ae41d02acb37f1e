"""What a student learns from a teacher's outputs: class logits, box side distributions and, if wanted, features.

Teacher and student see the same images at the same size, so their anchors and classes correspond one to one.  An anchor
is foreground where the teacher's best score reaches ``foreground_threshold``; that score is its weight in the output
terms, and the sum of the weights their normaliser.  No gradient reaches the teacher.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from model.head import NUM_BINS, RawOutput
from model.loss import global_normalizer

ScheduleName = Literal["constant", "cosine"]


@dataclass(frozen=True)
class DistillationConfig:
    """Weights (0 switches a term off), temperatures and schedule of the distillation terms.

    ``schedule`` "cosine" lets all weights fall from their full value at the start of training to
    ``final_weight_ratio`` of it at the end.
    """

    class_logits_weight: float = 1.0
    box_distribution_weight: float = 0.5
    features_weight: float = 0.0
    class_temperature: float = 1.0
    box_temperature: float = 10.0
    foreground_threshold: float = 0.1
    schedule: ScheduleName = "constant"
    final_weight_ratio: float = 0.1

    def __post_init__(self) -> None:
        for name in ("class_logits_weight", "box_distribution_weight", "features_weight"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"distill.{name} must not be negative, got {getattr(self, name)}")
        for name in ("class_temperature", "box_temperature"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"distill.{name} must be positive, got {getattr(self, name)}")
        for name in ("foreground_threshold", "final_weight_ratio"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"distill.{name} must be from 0 to 1, got {getattr(self, name)}")
        if self.schedule not in get_args(ScheduleName):
            raise ValueError(f"distill.schedule must be one of {get_args(ScheduleName)}, got {self.schedule!r}")

    def weight_factor(self, progress: float) -> float:
        """Factor on all weights at ``progress`` in [0, 1] of the training."""
        if self.schedule == "constant":
            return 1.0
        decay = (1 + math.cos(math.pi * min(max(progress, 0.0), 1.0))) / 2
        return self.final_weight_ratio + (1 - self.final_weight_ratio) * decay


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


def binary_divergence(
    student_logits: Float[Tensor, "*shape"], teacher_logits: Float[Tensor, "*shape"], temperature: float
) -> Float[Tensor, "*shape"]:
    """KL divergence of the student's from the teacher's sigmoid probability, each logit on its own.

    Logits are divided by the temperature and the result multiplied by its square, which keeps the gradient's size
    (arXiv 1503.02531, section 2).  It is cross-entropy minus the teacher's entropy, so its gradient is the
    cross-entropy's and it is 0 where both agree.
    """
    student_logits, teacher_logits = student_logits / temperature, teacher_logits.detach() / temperature
    probabilities = teacher_logits.sigmoid()
    present = probabilities * (functional.logsigmoid(teacher_logits) - functional.logsigmoid(student_logits))
    absent = (1 - probabilities) * (functional.logsigmoid(-teacher_logits) - functional.logsigmoid(-student_logits))
    return (present + absent) * temperature**2


def distribution_divergence(
    student_logits: Float[Tensor, "*shape 68"], teacher_logits: Float[Tensor, "*shape 68"], temperature: float
) -> Float[Tensor, "*shape"]:
    """KL divergence of the student's from the teacher's distribution over a side's bins, mean of the four sides.

    Localization distillation, arXiv 2102.12252, section 3.2, there with temperature 10; times the squared temperature.
    """
    student = torch.unflatten(student_logits / temperature, -1, (4, NUM_BINS)).log_softmax(dim=-1)
    teacher = torch.unflatten(teacher_logits.detach() / temperature, -1, (4, NUM_BINS)).log_softmax(dim=-1)
    divergence = (teacher.exp() * (teacher - student)).sum(dim=-1)
    return divergence.mean(dim=-1) * temperature**2


def correlation_loss(student: Float[Tensor, "B D H W"], teacher: Float[Tensor, "B D H W"]) -> Float[Tensor, ""]:
    """Half the squared difference of feature maps whose channels are brought to mean 0 and deviation 1.

    PKD, arXiv 2207.02039: it is 1 minus the Pearson correlation, averaged over channels, and so ignores
    the maps' scale and offset, which differ between architectures.
    """
    return (_standardise(student) - _standardise(teacher.detach())).square().mean() / 2


def _standardise(features: Float[Tensor, "B D H W"]) -> Float[Tensor, "B D H W"]:
    centred = features - features.mean(dim=(0, 2, 3), keepdim=True)
    variance = centred.square().mean(dim=(0, 2, 3), keepdim=True)
    return centred / torch.sqrt(variance + 1e-6)


@dataclass(frozen=True)
class DistillationLoss:
    """The weighted distillation terms of a batch; ``adapters`` are needed for features of different widths."""

    config: DistillationConfig
    adapters: FeatureAdapters | None = None

    def __call__(
        self,
        student_raw: RawOutput,
        teacher_raw: RawOutput,
        teacher_scores: Float[Tensor, "B A C"],
        progress: float = 0.0,
    ) -> dict[str, Float[Tensor, ""]]:
        """Terms to add to the student's loss, already weighted and normalised; terms of weight 0 are left out.

        ``class_logits``: binary KL summed over classes.  Foreground anchors weigh as much as the teacher is confident;
        any element weighs at least the difference of both probabilities, so that a student's false alarm counts where
        the teacher sees nothing (that weight is from arXiv 2308.14286; taking the larger one is ours).
        ``box_distribution``: localization distillation on foreground anchors.  ``features``: PKD, mean of the levels.
        ``progress`` in [0, 1] drives the schedule.  Raises ValueError when the outputs do not correspond.
        """
        _check_correspondence(student_raw, teacher_raw)
        foreground = self._foreground_weights(teacher_scores)
        normalizer = global_normalizer(foreground.sum())
        factor = self.config.weight_factor(progress)
        terms: dict[str, Tensor] = {}
        if weight := self.config.class_logits_weight * factor:
            terms["class_logits"] = self._class_term(student_raw, teacher_raw, foreground) * (weight / normalizer)
        if weight := self.config.box_distribution_weight * factor:
            terms["box_distribution"] = self._box_term(student_raw, teacher_raw, foreground) * (weight / normalizer)
        if weight := self.config.features_weight * factor:
            terms["features"] = self._features_term(student_raw, teacher_raw) * weight
        return terms

    def _foreground_weights(self, teacher_scores: Float[Tensor, "B A C"]) -> Float[Tensor, "B A"]:
        confidence = teacher_scores.detach().amax(dim=-1)
        return confidence * (confidence >= self.config.foreground_threshold)

    def _class_term(
        self, student: RawOutput, teacher: RawOutput, foreground: Float[Tensor, "B A"]
    ) -> Float[Tensor, ""]:
        with torch.no_grad():
            disagreement = (student.class_logits.sigmoid() - teacher.class_logits.sigmoid()).abs()
            weight = torch.maximum(disagreement, foreground[..., None])
        divergence = binary_divergence(student.class_logits, teacher.class_logits, self.config.class_temperature)
        return (weight * divergence).sum()

    def _box_term(self, student: RawOutput, teacher: RawOutput, foreground: Float[Tensor, "B A"]) -> Float[Tensor, ""]:
        chosen = foreground > 0
        divergence = distribution_divergence(
            student.box_distribution_logits[chosen],
            teacher.box_distribution_logits[chosen],
            self.config.box_temperature,
        )
        return (foreground[chosen] * divergence).sum()

    def _features_term(self, student: RawOutput, teacher: RawOutput) -> Float[Tensor, ""]:
        features = list(student.features) if self.adapters is None else self.adapters(student.features)
        widths = [[level.shape[1] for level in levels] for levels in (features, teacher.features)]
        if widths[0] != widths[1]:
            raise ValueError(
                f"distill.feature_weight needs feature maps of equal width, got student {widths[0]} and teacher "
                f"{widths[1]}; give DistillationLoss a FeatureAdapters({widths[0]}, {widths[1]})"
            )
        pairs = zip(features, teacher.features, strict=True)
        return torch.stack([correlation_loss(ours, theirs) for ours, theirs in pairs]).mean()


def _check_correspondence(student: RawOutput, teacher: RawOutput) -> None:
    if student.class_logits.shape != teacher.class_logits.shape:
        raise ValueError(
            "teacher and student must agree in batch, input size and classes: (batch, anchors, classes) is "
            f"{tuple(student.class_logits.shape)} for the student, {tuple(teacher.class_logits.shape)} for the teacher"
        )
