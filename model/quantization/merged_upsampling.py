"""The neck's up-stages without a signed activation: everything in them can then run in INT8, and there is less of it.

An up-stage feeds ``reduce(cat[upsample(x), a, b])``, a 1x1 convolution, with the output of a transposed convolution
that no ReLU follows. That output is signed, so on CPUs the 1x1 convolution has to stay in float. Both are linear, hence

    reduce(cat[upsample(x), a, b]) = spread(x) + rest(cat[a, b])

where ``rest`` is the part of ``reduce`` that reads a and b, and ``spread`` that which reads the upsampled map, applied
to the transposed convolution: again a 2x2 kernel of stride 2, which is a 1x1 convolution to four times the channels
and a rearrangement of its output. All inputs are then outputs of a ReLU, and a third of the 1x1 convolution's work is
gone. Exact in float up to summation order, like the folding of norms; done before calibration, so that what is rounded
are the merged weights.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from model.neck import UpStage
from model.yolo_nas import YoloNAS


class MergedUpStage(nn.Module):
    """What a folded up-stage computes, under the names of its layers; ``upsample`` holds the merged kernel."""

    def __init__(self, stage: UpStage) -> None:
        super().__init__()
        self.reduce_skip1, self.reduce_skip2, self.conv = stage.reduce_skip1, stage.reduce_skip2, stage.conv
        self.upsample, rest = _merged(stage.upsample, stage.reduce_after_concat.conv)
        self.downsample, self.reduce_after_concat = stage.downsample, stage.reduce_after_concat
        self.reduce_after_concat.conv = rest
        self.blocks = stage.blocks

    def forward(
        self,
        x: Float[Tensor, "B in H W"],
        skip1: Float[Tensor, "B skip1 2*H 2*W"],
        skip2: Float[Tensor, "B skip2 4*H 4*W"],
    ) -> tuple[Float[Tensor, "B out H W"], Float[Tensor, "B out 2*H 2*W"]]:
        reduced = self.conv(x)
        skips = torch.cat([self.reduce_skip1(skip1), self.downsample(self.reduce_skip2(skip2))], dim=1)
        spread = functional.pixel_shuffle(self.upsample(reduced), 2)  # (B, 4*out, H, W) to (B, out, 2*H, 2*W)
        joined = functional.relu(spread + self.reduce_after_concat.conv(skips), inplace=True)
        return reduced, self.blocks(joined)


@torch.no_grad()
def merge_upsampling(model: YoloNAS) -> None:
    """Merge both up-stages of a folded network in place; does nothing the second time.

    Raises ValueError for a network that is not folded.
    """
    if not model.fused:
        raise ValueError("only a folded network can be merged: call fuse() first")
    for name in ("neck1", "neck2"):
        stage = getattr(model.neck, name)
        if isinstance(stage, UpStage):
            setattr(model.neck, name, MergedUpStage(stage).train(stage.training))


def is_merged(model: YoloNAS) -> bool:
    """Whether ``merge_upsampling`` has been there."""
    return isinstance(model.neck.neck1, MergedUpStage)


def _merged(upsample: nn.ConvTranspose2d, reduce: nn.Conv2d) -> tuple[nn.Conv2d, nn.Conv2d]:
    """The convolutions ``spread`` and ``rest``; all of the bias is in the second."""
    width = upsample.out_channels
    assert upsample.kernel_size == upsample.stride == (2, 2) and upsample.bias is not None and reduce.bias is not None
    kernel = reduce.weight[:, :, 0, 0].double()  # (out, 3 * width)
    spread = torch.einsum("om,imkl->oikl", kernel[:, :width], upsample.weight.double())  # (out, in, 2, 2)
    spread = spread.permute(0, 2, 3, 1).flatten(0, 2)  # rows in the order in which pixel_shuffle reads channels
    bias = reduce.bias.double() + kernel[:, :width] @ upsample.bias.double()
    return _pointwise(upsample, spread, bias.new_zeros(len(spread))), _pointwise(upsample, kernel[:, width:], bias)


def _pointwise(template: nn.Module, weight: Float[Tensor, "out in"], bias: Float[Tensor, " out"]) -> nn.Conv2d:
    """A 1x1 convolution with these values, in the precision and on the device of the template."""
    parameter = next(template.parameters())
    convolution = nn.Conv2d(weight.shape[1], weight.shape[0], 1, device=parameter.device, dtype=parameter.dtype)
    assert convolution.bias is not None
    convolution.weight.copy_(weight[:, :, None, None])
    convolution.bias.copy_(bias)
    return convolution
