"""Neck of YOLO-NAS: two up-stages and two down-stages of a path-aggregation network with extra skips."""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor, nn

from model.backbone import Stage
from model.blocks import ConvNormReLU, CSPLayer, plain_block, repvgg_block
from model.layout import join


def _csp_layer(in_channels: int, stage: Stage, *, repvgg: bool) -> CSPLayer:
    return CSPLayer(
        in_channels,
        stage.out_channels,
        stage.hidden_channels,
        stage.num_bottlenecks,
        repvgg_block if repvgg else plain_block,
        stage.concatenate_intermediates,
    )


class UpStage(nn.Module):
    """Joins a map with one of twice (``skip1``) and one of four times (``skip2``) its resolution.

    Returns the reduced input (kept for the way down) and the joined map at the resolution of ``skip1``.
    """

    def __init__(self, in_channels: int, skip1_channels: int, skip2_channels: int, stage: Stage) -> None:
        super().__init__()
        width = stage.out_channels
        self.reduce_skip1 = ConvNormReLU(skip1_channels, width, 1)
        self.reduce_skip2 = ConvNormReLU(skip2_channels, width, 1)
        self.conv = ConvNormReLU(in_channels, width, 1)
        self.upsample = nn.ConvTranspose2d(width, width, kernel_size=2, stride=2)
        self.downsample = ConvNormReLU(width, width, 3, stride=2)
        self.reduce_after_concat = ConvNormReLU(3 * width, width, 1)
        self.blocks = _csp_layer(width, stage, repvgg=True)

    def forward(
        self,
        x: Float[Tensor, "B in H W"],
        skip1: Float[Tensor, "B skip1 2*H 2*W"],
        skip2: Float[Tensor, "B skip2 4*H 4*W"],
    ) -> tuple[Float[Tensor, "B out H W"], Float[Tensor, "B out 2*H 2*W"]]:
        reduced = self.conv(x)
        joined = [
            self.upsample(reduced),
            self.reduce_skip1(skip1),
            self.downsample(self.reduce_skip2(skip2)),
        ]
        return reduced, self.blocks(self.reduce_after_concat(join(joined)))


class DownStage(nn.Module):
    """Halves the resolution of a map and joins it with the map that the way up kept at that resolution."""

    def __init__(self, in_channels: int, skip_channels: int, stage: Stage) -> None:
        super().__init__()
        half_width = stage.out_channels // 2
        self.conv = ConvNormReLU(in_channels, half_width, 3, stride=2)
        self.blocks = _csp_layer(half_width + skip_channels, stage, repvgg=False)

    def forward(
        self, x: Float[Tensor, "B in H W"], skip: Float[Tensor, "B skip H//2 W//2"]
    ) -> Float[Tensor, "B out H//2 W//2"]:
        joined: Tensor = self.blocks(join([self.conv(x), skip]))
        return joined


class Neck(nn.Module):
    """Turns C2 to C5 into P3, P4 and P5 at strides 8, 16 and 32."""

    def __init__(self, backbone_channels: Sequence[int], stages: Sequence[Stage]) -> None:
        super().__init__()
        c2, c3, c4, c5 = backbone_channels
        n1, n2, n3, n4 = stages
        self.neck1 = UpStage(c5, c4, c3, n1)
        self.neck2 = UpStage(n1.out_channels, c3, c2, n2)
        self.neck3 = DownStage(n2.out_channels, n2.out_channels, n3)
        self.neck4 = DownStage(n3.out_channels, n1.out_channels, n4)

    def forward(self, c2: Tensor, c3: Tensor, c4: Tensor, c5: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        kept_stride32, up_stride16 = self.neck1(c5, c4, c3)
        kept_stride16, p3 = self.neck2(up_stride16, c3, c2)
        p4 = self.neck3(p3, kept_stride16)
        p5 = self.neck4(p4, kept_stride32)
        return p3, p4, p5
