"""The teacher of a distillation or of pseudo-labels: one network, or several whose outputs are averaged.

Legend: N networks, B batch, A anchors, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from model.head import NUM_BINS, RawOutput, decode_boxes
from model.yolo_nas import Architecture, YoloNAS

TeacherPrecision = Literal["as_student", "bfloat16"]


class Teacher(nn.Module):
    """Frozen networks that answer as one ``YoloNAS`` does.

    Scores are averaged as probabilities, box sides as distributions over their bins, and the logits returned are those
    of the averages; ``features`` are the first network's.  The networks are copied in their fused form and in
    channels-last order, which on a CPU halves the time of a forward pass; with ``precision`` "bfloat16" they compute
    in that precision, which halves it once more where the device has such instructions.  Probabilities are float32
    always.

    Raises ValueError without networks, or when they differ in their number of classes.
    """

    def __init__(self, networks: Sequence[YoloNAS], precision: TeacherPrecision = "as_student") -> None:
        super().__init__()
        if precision not in get_args(TeacherPrecision):
            raise ValueError(f"teacher precision must be one of {get_args(TeacherPrecision)}, got {precision!r}")
        if len({network.num_classes for network in networks}) != 1:
            counts = [network.num_classes for network in networks]
            raise ValueError(f"a teacher needs one or more networks of the same classes, got class counts {counts}")
        self.dtype = torch.bfloat16 if precision == "bfloat16" else None
        self.members = nn.ModuleList(network.fused_copy().requires_grad_(False) for network in networks)
        self.to(dtype=self.dtype)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.eval()

    @property
    def architecture(self) -> Architecture:
        """Of the first network, whose features are the teacher's."""
        return self._first.architecture

    @property
    def _first(self) -> YoloNAS:
        network = self.members[0]
        assert isinstance(network, YoloNAS)
        return network

    @torch.no_grad()
    def forward(
        self, images: Float[Tensor, "B 3 H W"]
    ) -> tuple[tuple[Float[Tensor, "B A 4"], Float[Tensor, "B A C"]], RawOutput]:
        """The same form as ``YoloNAS.forward``."""
        if self.dtype is not None:
            images = images.to(self.dtype)
        outputs = [member(images) for member in self.members]
        return outputs[0] if len(outputs) == 1 else self._average([raw for _, raw in outputs])

    def _average(
        self, outputs: Sequence[RawOutput]
    ) -> tuple[tuple[Float[Tensor, "B A 4"], Float[Tensor, "B A C"]], RawOutput]:
        class_logits = average_class_logits(torch.stack([raw.class_logits for raw in outputs]))
        sides = average_box_distributions(torch.stack([raw.box_distribution_logits for raw in outputs]))
        sizes = [(level.shape[2], level.shape[3]) for level in outputs[0].features]
        boxes_xyxy = decode_boxes(sides, self._first.heads.anchor_grid(sizes, sides.device, sides.dtype))
        raw = outputs[0]._replace(class_logits=class_logits, box_distribution_logits=sides)
        return (boxes_xyxy, class_logits.sigmoid()), raw


def average_class_logits(logits: Float[Tensor, "N B A C"]) -> Float[Tensor, "B A C"]:
    """Logit of the mean probability; exact where probabilities are too near to 0 or 1 to be told from them."""
    return functional.logsigmoid(logits).logsumexp(dim=0) - functional.logsigmoid(-logits).logsumexp(dim=0)


def average_box_distributions(logits: Float[Tensor, "N B A 68"]) -> Float[Tensor, "B A 68"]:
    """Log-probabilities (which are logits too) of the mean distribution of each side."""
    log_probabilities = torch.unflatten(logits, -1, (4, NUM_BINS)).log_softmax(dim=-1)
    return (log_probabilities.logsumexp(dim=0) - math.log(len(logits))).flatten(-2)
