"""Plain RepVGG blocks (arXiv 2101.03697), to compare quantization with; no variant is made of them.

What a norm of its own in every branch, and none behind their sum, does to INT8 is the subject of arXiv 2212.01593: the
folded kernel adds up terms of very different size, and so do the activations of its channels.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from model.blocks import QARepVGGBlock, _convolution_like, batch_norm, fold_batch_norm
from model.yolo_nas import YoloNAS


class RepVGGBlock(QARepVGGBlock):
    """``relu(bn(conv3x3(x)) + bn(conv1x1(x)) [+ bn(x)])``; ``fuse()`` leaves one 3x3 convolution.

    It takes a QARepVGG block's place, and folds when that would.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1, identity: bool = False) -> None:
        super().__init__(in_channels, out_channels, stride, identity)
        self.branch_1x1 = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)
        del self.post_bn
        self.norm_1x1 = batch_norm(out_channels)
        self.norm_identity = batch_norm(out_channels) if identity else None

    def forward(self, x: Float[Tensor, "B in H W"]) -> Float[Tensor, "B out h w"]:
        if self.rbr_reparam is not None:
            return functional.relu(self.rbr_reparam(x), inplace=True)
        branches = self.branch_3x3(x) + self.norm_1x1(self.branch_1x1(x))
        if self.norm_identity is not None:
            branches = branches + self.norm_identity(x)
        return functional.relu(branches, inplace=True)

    def merge_branches(self) -> tuple[Float[Tensor, "out in 3 3"], Float[Tensor, " out"]]:
        """Float64 kernel and bias of the sum of all branches in evaluation mode."""
        kernel, bias = fold_batch_norm(self.branch_3x3.conv.weight, None, self.branch_3x3.bn)
        point, point_bias = fold_batch_norm(self.branch_1x1.weight, None, self.norm_1x1)
        kernel, bias = kernel + functional.pad(point, [1, 1, 1, 1]), bias + point_bias
        if self.norm_identity is not None:
            channels = kernel.shape[0]
            identity = torch.eye(channels, dtype=torch.float64, device=kernel.device)[:, :, None, None]
            point, point_bias = fold_batch_norm(identity, None, self.norm_identity)
            kernel, bias = kernel + functional.pad(point, [1, 1, 1, 1]), bias + point_bias
        return kernel, bias

    @torch.no_grad()
    def fuse(self) -> None:
        """Replace branches and norms by one convolution; evaluation mode only, does nothing the second time."""
        if self.rbr_reparam is None:
            self.rbr_reparam = _convolution_like(self.branch_3x3.conv, *self.merge_branches())
            del self.branch_3x3, self.branch_1x1, self.norm_1x1, self.norm_identity


def use_repvgg_blocks(network: YoloNAS) -> YoloNAS:
    """Put a fresh plain block in the place of every QARepVGG block of an unfused network; returns the network.

    Raises ValueError for a fused one, which has no branches any more.
    """
    if network.fused:
        raise ValueError("a fused network has no blocks left to replace: build a new one")
    for name, block in list(network.named_modules()):
        if isinstance(block, QARepVGGBlock):
            convolution = block.branch_3x3.conv
            stride = int(convolution.stride[0])
            plain = RepVGGBlock(convolution.in_channels, convolution.out_channels, stride, block.identity)
            network.set_submodule(name, plain)
    return network
