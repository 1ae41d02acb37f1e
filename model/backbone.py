"""Backbone of YOLO-NAS: a stem, four stages of QARepVGG down-sampling and CSP layer, and spatial pyramid pooling."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor, nn

from model.blocks import CSPLayer, ImageBlock, QARepVGGBlock, SpatialPyramidPooling, repvgg_block


@dataclass(frozen=True)
class Stage:
    """Widths of a backbone or neck stage; ``hidden_channels`` is the width inside its bottlenecks."""

    out_channels: int
    num_bottlenecks: int
    hidden_channels: int
    concatenate_intermediates: bool = False


class Stem(nn.Module):
    """First convolution block: 3 colour channels to ``out_channels`` at half the resolution."""

    def __init__(self, out_channels: int) -> None:
        super().__init__()
        self.conv = ImageBlock(3, out_channels)

    def forward(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B out h w"]:
        halved: Tensor = self.conv(images)
        return halved


class BackboneStage(nn.Module):
    """Halves the resolution, then a CSP layer of QARepVGG bottlenecks."""

    def __init__(self, in_channels: int, stage: Stage) -> None:
        super().__init__()
        self.downsample = QARepVGGBlock(in_channels, stage.out_channels, stride=2)
        self.blocks = CSPLayer(
            stage.out_channels,
            stage.out_channels,
            stage.hidden_channels,
            stage.num_bottlenecks,
            repvgg_block,
            stage.concatenate_intermediates,
        )

    def forward(self, x: Float[Tensor, "B in H W"]) -> Float[Tensor, "B out h w"]:
        features: Tensor = self.blocks(self.downsample(x))
        return features


class Backbone(nn.Module):
    """Returns the feature maps C2, C3, C4 and C5 at strides 4, 8, 16 and 32."""

    def __init__(self, stem_channels: int, stages: Sequence[Stage], context_channels: int) -> None:
        super().__init__()
        widths = [stem_channels, *(stage.out_channels for stage in stages)]
        self.stem = Stem(stem_channels)
        self.stage1 = BackboneStage(widths[0], stages[0])
        self.stage2 = BackboneStage(widths[1], stages[1])
        self.stage3 = BackboneStage(widths[2], stages[2])
        self.stage4 = BackboneStage(widths[3], stages[3])
        self.context_module = SpatialPyramidPooling(widths[4], context_channels)

    def forward(self, images: Float[Tensor, "B 3 H W"]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        c2 = self.stage1(self.stem(images))
        c3 = self.stage2(c2)
        c4 = self.stage3(c3)
        c5 = self.context_module(self.stage4(c4))
        return c2, c3, c4, c5
