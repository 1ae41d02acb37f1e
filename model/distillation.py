"""What a student learns from a teacher's outputs: class logits, box side distributions and, if wanted, features.

Teacher and student see the same images at the same size, so their anchors and classes correspond one to one.  An anchor
is foreground where the teacher's best score reaches ``foreground_threshold``; that score is its weight in the output
terms, and the sum of the weights their normaliser.  No gradient reaches the teacher.  What is compared in features
stands in ``feature_distillation``, the teacher itself in ``teacher``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from model.feature_distillation import FeatureAdapters, FeatureKind, features_loss
from model.head import NUM_BINS, RawOutput
from model.loss import global_normalizer

__all__ = ["DistillationConfig", "DistillationLoss", "FeatureAdapters"]

ScheduleName = Literal["constant", "cosine"]


@dataclass(frozen=True)
class DistillationConfig:
    """Weights (0 switches a term off), temperatures and schedule of the distillation terms.

    ``feature_weight`` is a factor on the published strength of ``feature_kind``.  ``schedule`` "cosine" lets all
    weights fall from their full value at the start to ``final_weight_ratio`` of it when the share ``teacher_share`` of
    the training is over; after that share the teacher is not asked any more.
    """

    class_logits_weight: float = 1.0
    box_distribution_weight: float = 0.5
    feature_weight: float = 0.0
    feature_kind: FeatureKind = "pkd"
    class_temperature: float = 1.0
    box_temperature: float = 10.0
    feature_temperature: float = 1.0
    foreground_threshold: float = 0.1
    schedule: ScheduleName = "constant"
    final_weight_ratio: float = 0.1
    teacher_share: float = 1.0

    def __post_init__(self) -> None:
        for name in ("class_logits_weight", "box_distribution_weight", "feature_weight"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"distill.{name} must not be negative, got {getattr(self, name)}")
        for name in ("class_temperature", "box_temperature", "feature_temperature"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"distill.{name} must be positive, got {getattr(self, name)}")
        for name in ("foreground_threshold", "final_weight_ratio", "teacher_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"distill.{name} must be from 0 to 1, got {getattr(self, name)}")
        for name, choices in (("schedule", get_args(ScheduleName)), ("feature_kind", get_args(FeatureKind))):
            if getattr(self, name) not in choices:
                raise ValueError(f"distill.{name} must be one of {choices}, got {getattr(self, name)!r}")

    def weight_factor(self, progress: float) -> float:
        """Factor on all weights at ``progress`` in [0, 1] of the training.

        The cosine is DAMO-YOLO's and YOLOv6's; so is, in DAMO-YOLO, an end without a teacher (16 of 300 epochs).
        """
        progress = min(max(progress, 0.0), 1.0)
        if progress >= self.teacher_share < 1:
            return 0.0
        if self.schedule == "constant":
            return 1.0
        decay = (1 + math.cos(math.pi * progress / self.teacher_share)) / 2
        return self.final_weight_ratio + (1 - self.final_weight_ratio) * decay

    @property
    def terms(self) -> list[str]:
        """Names of the terms that have a weight."""
        weights = {
            "class_logits": self.class_logits_weight,
            "box_distribution": self.box_distribution_weight,
            "features": self.feature_weight,
        }
        return [name for name, weight in weights.items() if weight]

    def asks_teacher(self, progress: float) -> bool:
        """Whether any term is left at ``progress``; where not, the teacher's forward pass can be spared."""
        return bool(self.terms) and self.weight_factor(progress) > 0


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
        ``box_distribution``: localization distillation on foreground anchors.  ``features``: see
        ``feature_distillation.features_loss``.  ``progress`` in [0, 1] drives the schedule.  Raises ValueError when the
        outputs do not correspond.
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
        if weight := self.config.feature_weight * factor:
            terms["features"] = self._features_term(student_raw, teacher_raw, teacher_scores) * weight
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

    def _features_term(
        self, student: RawOutput, teacher: RawOutput, teacher_scores: Float[Tensor, "B A C"]
    ) -> Float[Tensor, ""]:
        features = student.features if self.adapters is None else self.adapters(student.features)
        config = self.config
        return features_loss(
            config.feature_kind, features, teacher.features, teacher_scores, config.feature_temperature
        )


def _check_correspondence(student: RawOutput, teacher: RawOutput) -> None:
    if student.class_logits.shape != teacher.class_logits.shape:
        raise ValueError(
            "teacher and student must agree in batch, input size and classes: (batch, anchors, classes) is "
            f"{tuple(student.class_logits.shape)} for the student, {tuple(teacher.class_logits.shape)} for the teacher"
        )
