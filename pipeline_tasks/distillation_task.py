"""Detection loss plus distillation from a frozen teacher, as one function for the training loop."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from model.distillation import DistillationConfig
    from model.training_step import ComputeLoss
    from model.yolo_nas import YoloNAS


def add_feature_adapters(student: YoloNAS, teacher: YoloNAS) -> None:
    """Give the student the layers that bring its features to the teacher's widths; they learn with it."""
    from model.distillation import FeatureAdapters

    student.feature_adapters = FeatureAdapters(_neck_widths(student), _neck_widths(teacher))


def remove_feature_adapters(student: YoloNAS) -> None:
    """Take them away again: they are no part of the network that is published."""
    if hasattr(student, "feature_adapters"):
        del student.feature_adapters


def _neck_widths(network: YoloNAS) -> list[int]:
    return [stage.out_channels for stage in network.architecture.neck_stages[1:]]


def with_teacher(teacher: nn.Module, num_classes: int, config: DistillationConfig) -> ComputeLoss:
    """A loss of (network, images, targets, progress in [0, 1]): detection terms and distillation terms.

    The teacher sees the same augmented images as the student, without gradients and with its norms frozen.
    """
    import torch

    from model.distillation import DistillationLoss
    from model.loss import DetectionLoss

    detection = DetectionLoss(num_classes)
    teacher = teacher.eval().requires_grad_(False)

    def compute(network: nn.Module, images: Any, targets: Any, progress: float) -> tuple[Any, dict[str, Any]]:
        with torch.no_grad():
            (_, teacher_scores), teacher_raw = teacher(images)
        (boxes_xyxy, scores), raw = network(images)
        parts = detection(raw, boxes_xyxy, scores, targets)
        adapters = getattr(getattr(network, "module", network), "feature_adapters", None)
        distillation = DistillationLoss(config, adapters)
        terms = distillation(raw, teacher_raw, teacher_scores, progress=progress)
        named = {"classification": parts.classification, "iou": parts.iou, "distribution": parts.distribution}
        named |= {f"distill_{name}": value for name, value in terms.items()}
        return parts.total + sum(terms.values()), named

    return compute
