"""Detection loss plus distillation from a frozen teacher, as one function for the training loop."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from model.distillation import DistillationConfig
    from model.teacher import Teacher
    from model.training_step import ComputeLoss
    from model.yolo_nas import YoloNAS


def add_feature_adapters(student: YoloNAS, teacher: YoloNAS | Teacher) -> None:
    """Give the student the layers that bring its features to the teacher's widths; they learn with it."""
    from model.distillation import FeatureAdapters

    student.feature_adapters = FeatureAdapters(_neck_widths(student), _neck_widths(teacher))


def remove_feature_adapters(student: YoloNAS) -> None:
    """Take them away again: they are no part of the network that is published."""
    if hasattr(student, "feature_adapters"):
        del student.feature_adapters


def _neck_widths(network: YoloNAS | Teacher) -> list[int]:
    return [stage.out_channels for stage in network.architecture.neck_stages[1:]]


def with_teacher(teacher: YoloNAS | Teacher, num_classes: int, config: DistillationConfig) -> ComputeLoss:
    """A loss of (network, images, targets, progress in [0, 1]): detection terms and distillation terms.

    The teacher sees the same augmented images as the student.  It is asked only while a term has a weight.
    """
    from model.distillation import DistillationLoss
    from model.loss import DetectionLoss
    from model.teacher import Teacher

    detection = DetectionLoss(num_classes)
    asked = teacher if isinstance(teacher, Teacher) else Teacher([teacher])

    def compute(network: nn.Module, images: Any, targets: Any, progress: float) -> tuple[Any, dict[str, Any]]:
        (boxes_xyxy, scores), raw = network(images)
        parts = detection(raw, boxes_xyxy, scores, targets)
        named = {"classification": parts.classification, "iou": parts.iou, "distribution": parts.distribution}
        adapters = getattr(getattr(network, "module", network), "feature_adapters", None)
        if not config.asks_teacher(progress):
            spared = {f"distill_{name}": parts.total.new_zeros(()) for name in config.terms}
            return parts.total + _nothing_of(adapters), named | spared
        (_, teacher_scores), teacher_raw = asked(images)
        terms = DistillationLoss(config, adapters)(raw, teacher_raw, teacher_scores, progress=progress)
        named |= {f"distill_{name}": value for name, value in terms.items()}
        return parts.total + sum(terms.values()), named

    return compute


def _nothing_of(adapters: nn.Module | None) -> Any:
    """Zero, but with a gradient to every adapter: processes that average gradients wait for all of them."""
    if adapters is None:
        return 0.0
    return sum(parameter.sum() for parameter in adapters.parameters()) * 0.0
