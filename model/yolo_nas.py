"""The YOLO-NAS detector and its variants.

``s``, ``m`` and ``l`` have the published dimensions.  ``n`` is a detector on the dimensions that were published for the
pose model only.  ``t`` and ``pico`` are our own, made of the same blocks: ``t`` costs as much inference as the smallest
detectors of other families (4.2 GMAC at 640 pixels), ``pico`` learns on two CPU cores in minutes.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor, nn

from model.backbone import Backbone, Stage
from model.blocks import ConvNormReLU, QARepVGGBlock
from model.head import DetectionHeads, RawOutput
from model.neck import Neck

__all__ = ["VARIANTS", "Architecture", "RawOutput", "YoloNAS"]

LARGEST_STRIDE = 32


@dataclass(frozen=True)
class Architecture:
    """All widths and depths of a variant.  Stages: backbone at strides 4 to 32, neck as up, up, down, down."""

    variant: str
    stem_channels: int
    backbone_stages: tuple[Stage, Stage, Stage, Stage]
    context_channels: int
    neck_stages: tuple[Stage, Stage, Stage, Stage]
    head_channels: tuple[int, int, int]


VARIANTS: dict[str, Architecture] = {
    "pico": Architecture(
        variant="pico",
        stem_channels=16,
        backbone_stages=(Stage(32, 1, 16), Stage(48, 1, 24), Stage(64, 1, 24), Stage(64, 1, 24)),
        context_channels=64,
        neck_stages=(Stage(40, 1, 16), Stage(40, 1, 24), Stage(48, 1, 16), Stage(48, 1, 16)),
        head_channels=(40, 32, 32),
    ),
    "t": Architecture(
        variant="t",
        stem_channels=24,
        backbone_stages=(Stage(48, 1, 24), Stage(96, 2, 40), Stage(192, 3, 56), Stage(320, 2, 96)),
        context_channels=320,
        neck_stages=(Stage(96, 2, 40), Stage(48, 2, 24), Stage(96, 2, 40), Stage(192, 2, 40)),
        head_channels=(40, 72, 128),
    ),
    "n": Architecture(
        variant="n",
        stem_channels=32,
        backbone_stages=(Stage(64, 2, 32), Stage(128, 3, 48), Stage(256, 4, 64), Stage(512, 2, 128)),
        context_channels=512,
        neck_stages=(Stage(128, 2, 48), Stage(64, 2, 32), Stage(128, 2, 48), Stage(256, 2, 48)),
        head_channels=(48, 88, 168),
    ),
    "s": Architecture(
        variant="s",
        stem_channels=48,
        backbone_stages=(Stage(96, 2, 32), Stage(192, 3, 64), Stage(384, 5, 96), Stage(768, 2, 192)),
        context_channels=768,
        neck_stages=(Stage(192, 2, 64), Stage(96, 2, 48), Stage(192, 2, 64), Stage(384, 2, 64)),
        head_channels=(64, 128, 256),
    ),
    "m": Architecture(
        variant="m",
        stem_channels=48,
        backbone_stages=(
            Stage(96, 2, 64, concatenate_intermediates=True),
            Stage(192, 3, 128, concatenate_intermediates=True),
            Stage(384, 5, 256, concatenate_intermediates=True),
            Stage(768, 2, 384),
        ),
        context_channels=768,
        neck_stages=(Stage(192, 2, 192), Stage(96, 3, 64), Stage(192, 2, 192), Stage(384, 3, 256)),
        head_channels=(96, 192, 384),
    ),
    "l": Architecture(
        variant="l",
        stem_channels=48,
        backbone_stages=(
            Stage(96, 2, 96, concatenate_intermediates=True),
            Stage(192, 3, 128, concatenate_intermediates=True),
            Stage(384, 5, 256, concatenate_intermediates=True),
            Stage(768, 2, 512, concatenate_intermediates=True),
        ),
        context_channels=768,
        neck_stages=(Stage(192, 4, 128), Stage(96, 4, 128), Stage(192, 4, 128), Stage(384, 4, 256)),
        head_channels=(128, 256, 512),
    ),
}


class YoloNAS(nn.Module):
    """Anchor-free one-stage detector: backbone, neck and three heads at strides 8, 16 and 32.

    State-dict keys are those of published YOLO-NAS checkpoints, without the idle ``rbr_reparam`` placeholders that
    those carry in the training form.
    """

    def __init__(self, architecture: Architecture, num_classes: int) -> None:
        super().__init__()
        if num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, got {num_classes}")
        self.architecture = architecture
        self.num_classes = num_classes
        self.fused = False
        stages, neck_stages = architecture.backbone_stages, architecture.neck_stages
        self.backbone = Backbone(architecture.stem_channels, stages, architecture.context_channels)
        skip_channels = [stage.out_channels for stage in stages[:3]]
        self.neck = Neck([*skip_channels, architecture.context_channels], neck_stages)
        level_channels = [stage.out_channels for stage in neck_stages[1:]]
        self.heads = DetectionHeads(level_channels, architecture.head_channels, num_classes)

    def forward(
        self, images: Float[Tensor, "B 3 H W"]
    ) -> tuple[tuple[Float[Tensor, "B A 4"], Float[Tensor, "B A C"]], RawOutput]:
        """Detect in RGB images with values in [0, 1]; the same result form in training and evaluation mode.

        Returns ``((boxes_xyxy, scores), raw)``: boxes in input pixels, not clipped, scores after the sigmoid,
        A = HW/64 + HW/256 + HW/1024.  Outputs are float32 at least.  Raises ValueError unless H and W are multiples
        of 32.
        """
        height, width = images.shape[2], images.shape[3]
        if height % LARGEST_STRIDE or width % LARGEST_STRIDE:
            raise ValueError(
                f"image height and width must be multiples of {LARGEST_STRIDE}, got {height}x{width}; pad the images"
            )
        decoded, raw = self.heads(*self.neck(*self.backbone(images)))
        return decoded, raw

    def fuse(self) -> YoloNAS:
        """Fold every QARepVGG block and every conv+norm pair in place into one convolution with a bias.

        The result computes what this network computes in evaluation mode, which is required.  It cannot be undone;
        see ``fused_copy``.  Returns the network itself; fusing again changes nothing.
        """
        if self.training:
            raise ValueError("fuse() needs evaluation mode, since it freezes the norms' statistics; call eval() first")
        for module in list(self.modules()):
            if isinstance(module, ConvNormReLU | QARepVGGBlock):
                module.fuse()
        self.fused = True
        return self

    def fused_copy(self) -> YoloNAS:
        """A fused copy in evaluation mode; this network stays as it is."""
        return copy.deepcopy(self).eval().fuse()
