"""Building blocks of YOLO-NAS: conv+norm, QARepVGG, bottleneck, CSP layer and spatial pyramid pooling.

Attribute names follow the published checkpoints' state-dict keys, so that foreign weights need few renames.
Every block that holds a batch norm has ``fuse()``, which folds it into a convolution with a bias.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from model.layout import halving_convolutions, join, suits_halving

BATCH_NORM_EPSILON = 1e-3
BATCH_NORM_MOMENTUM = 0.03


def batch_norm(channels: int) -> nn.BatchNorm2d:
    """Batch norm with the epsilon and momentum that every norm of YOLO-NAS uses."""
    return nn.BatchNorm2d(channels, eps=BATCH_NORM_EPSILON, momentum=BATCH_NORM_MOMENTUM)


def set_norm_momentum(network: nn.Module, momentum: float) -> None:
    """Share of a batch's mean and variance that enters the running statistics of every batch norm, in (0, 1].

    With the published 0.03 they lag behind the weights for some hundred steps, which is much of a short training.
    """
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d | nn.SyncBatchNorm):
            module.momentum = momentum


def fold_batch_norm(
    weight: Float[Tensor, "out in kernel kernel"],
    bias: Float[Tensor, " out"] | None,
    norm: nn.BatchNorm2d,
) -> tuple[Float[Tensor, "out in kernel kernel"], Float[Tensor, " out"]]:
    """Kernel and bias of the one convolution that equals ``norm(conv(x))`` in evaluation mode.

    Computed and returned in float64: chained folds then add no rounding of their own.
    """
    assert norm.running_mean is not None and norm.running_var is not None
    gain = norm.weight.double() / torch.sqrt(norm.running_var.double() + norm.eps)
    offset = -norm.running_mean.double() if bias is None else bias.double() - norm.running_mean.double()
    return weight.double() * gain.reshape(-1, 1, 1, 1), norm.bias.double() + gain * offset


def _convolution_like(
    template: nn.Conv2d, weight: Float[Tensor, "out in kernel kernel"], bias: Float[Tensor, " out"]
) -> nn.Conv2d:
    """A convolution with a bias that holds the given float64 values in the template's dtype and device."""
    out_channels, in_channels, kernel_size, _ = weight.shape
    convolution = nn.Conv2d(
        in_channels,
        out_channels,
        kernel_size,
        stride=template.stride,  # type: ignore[arg-type]
        padding=kernel_size // 2,
        device=template.weight.device,
        dtype=template.weight.dtype,
    )
    assert convolution.bias is not None
    with torch.no_grad():
        convolution.weight.copy_(weight)
        convolution.bias.copy_(bias)
    return convolution


class ConvNormReLU(nn.Module):
    """Convolution (same padding, no bias), batch norm, ReLU; after ``fuse()`` one convolution with a bias, ReLU."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, kernel_size // 2, bias=False)
        self.bn: nn.Module = batch_norm(out_channels)

    def forward(self, x: Float[Tensor, "B in H W"]) -> Float[Tensor, "B out h w"]:
        return functional.relu(self.bn(self.conv(x)), inplace=True)

    @torch.no_grad()
    def fuse(self) -> None:
        """Fold the norm into the convolution; evaluation mode only, does nothing the second time."""
        if not isinstance(self.bn, nn.BatchNorm2d):
            return
        self.conv = _convolution_like(self.conv, *fold_batch_norm(self.conv.weight, self.conv.bias, self.bn))
        self.bn = nn.Identity()


class _ConvNorm(nn.Module):
    """Convolution without bias followed by batch norm: the 3x3 branch of a QARepVGG block."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False)
        self.bn = batch_norm(out_channels)

    def forward(self, x: Float[Tensor, "B in H W"]) -> Float[Tensor, "B out h w"]:
        normalised: Tensor = self.bn(self.conv(x))
        return normalised


class QARepVGGBlock(nn.Module):
    """Quantization-aware RepVGG block, form S4 of arXiv 2212.01593.

    Training form: ``relu(post_bn(bn(conv3x3(x)) + conv1x1(x) [+ x]))``.  Only the 3x3 branch has a norm of its own, the
    1x1 branch has a bias.  ``fuse()`` leaves one 3x3 convolution, named ``rbr_reparam`` as in published deploy forms;
    unlike there, the training form carries no idle placeholder of that name.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1, identity: bool = False) -> None:
        super().__init__()
        assert not identity or (in_channels == out_channels and stride == 1)
        self.identity = identity
        self.branch_3x3 = _ConvNorm(in_channels, out_channels, stride)
        self.branch_1x1 = nn.Conv2d(in_channels, out_channels, 1, stride)
        self.post_bn = batch_norm(out_channels)
        self.rbr_reparam: nn.Module | None = None

    def forward(self, x: Float[Tensor, "B in H W"]) -> Float[Tensor, "B out h w"]:
        if self.rbr_reparam is not None:
            return functional.relu(self.rbr_reparam(x), inplace=True)
        return functional.relu(self.post_bn(self._sum_of_branches(x)), inplace=True)

    def _sum_of_branches(self, x: Float[Tensor, "B in H W"]) -> Float[Tensor, "B out h w"]:
        branches: Tensor = self.branch_3x3(x)
        branches.add_(self.branch_1x1(x))
        return branches.add_(x) if self.identity else branches

    def merge_branches(self) -> tuple[Float[Tensor, "out in 3 3"], Float[Tensor, " out"]]:
        """Float64 kernel and bias of the sum of all branches, before ``post_bn``, in evaluation mode."""
        kernel, bias = fold_batch_norm(self.branch_3x3.conv.weight, None, self.branch_3x3.bn)
        kernel = kernel + functional.pad(self.branch_1x1.weight.double(), [1, 1, 1, 1])
        assert self.branch_1x1.bias is not None
        if self.identity:
            channels = torch.arange(kernel.shape[0], device=kernel.device)
            kernel[channels, channels, 1, 1] += 1.0
        return kernel, bias + self.branch_1x1.bias.double()

    @torch.no_grad()
    def fuse(self) -> None:
        """Replace branches and norms by one convolution; evaluation mode only, does nothing the second time."""
        if self.rbr_reparam is not None:
            return
        folded = fold_batch_norm(*self.merge_branches(), self.post_bn)
        self.rbr_reparam = _convolution_like(self.branch_3x3.conv, *folded)
        del self.branch_3x3, self.branch_1x1, self.post_bn


class ImageBlock(QARepVGGBlock):
    """The QARepVGG block that halves the resolution of images, with a quicker way to train it on a CPU."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, stride=2)

    def _sum_of_branches(self, x: Float[Tensor, "B in H W"]) -> Float[Tensor, "B out h w"]:
        if not (self.training and suits_halving(x)):
            return super()._sum_of_branches(x)
        kernels = self.branch_3x3.conv.weight, self.branch_1x1.weight
        wide, point = halving_convolutions(x, *kernels, self.branch_1x1.bias)
        branches: Tensor = self.branch_3x3.bn(wide)
        return branches.add_(point)


class Bottleneck(nn.Module):
    """Two blocks of equal width with a shortcut that a learned scalar weights: ``alpha * x + cv2(cv1(x))``."""

    def __init__(self, channels: int, block: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.cv1 = block(channels)
        self.cv2 = block(channels)
        self.alpha = nn.Parameter(torch.ones(1))

    def forward(self, x: Float[Tensor, "B channels H W"]) -> Float[Tensor, "B channels H W"]:
        residual: Tensor = self.cv2(self.cv1(x))
        # a scalar does not widen bfloat16 maps to float32, as alpha's one dimension would
        alpha = self.alpha if x.dtype == self.alpha.dtype else self.alpha.squeeze()
        return alpha * x + residual


def repvgg_block(channels: int) -> nn.Module:
    """The block inside the bottlenecks of the backbone and of the neck's up-stages."""
    return QARepVGGBlock(channels, channels, identity=True)


def plain_block(channels: int) -> nn.Module:
    """The block inside the bottlenecks of the neck's down-stages."""
    return ConvNormReLU(channels, channels, 3)


class CSPLayer(nn.Module):
    """Cross-stage partial layer: a chain of bottlenecks beside a plain 1x1 path, joined by a 1x1 convolution.

    With ``concatenate_intermediates`` the input of every bottleneck joins the concatenation too.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        hidden_channels: int,
        num_bottlenecks: int,
        block: Callable[[int], nn.Module],
        concatenate_intermediates: bool = False,
    ) -> None:
        super().__init__()
        self.concatenate_intermediates = concatenate_intermediates
        num_joined = num_bottlenecks + 2 if concatenate_intermediates else 2
        self.conv1 = ConvNormReLU(in_channels, hidden_channels, 1)
        self.conv2 = ConvNormReLU(in_channels, hidden_channels, 1)
        self.conv3 = ConvNormReLU(num_joined * hidden_channels, out_channels, 1)
        self.bottlenecks = nn.ModuleList(Bottleneck(hidden_channels, block) for _ in range(num_bottlenecks))

    def forward(self, x: Float[Tensor, "B in H W"]) -> Float[Tensor, "B out H W"]:
        chain: list[Tensor] = [self.conv1(x)]
        for bottleneck in self.bottlenecks:
            chain.append(bottleneck(chain[-1]))
        kept = chain if self.concatenate_intermediates else chain[-1:]
        joined: Tensor = self.conv3(join([*kept, self.conv2(x)]))
        return joined


class SpatialPyramidPooling(nn.Module):
    """Parallel max-pools of several sizes over a 1x1 convolution's output, concatenated and mixed."""

    POOL_SIZES = (5, 9, 13)

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        hidden_channels = in_channels // 2
        self.cv1 = ConvNormReLU(in_channels, hidden_channels, 1)
        self.cv2 = ConvNormReLU(hidden_channels * (len(self.POOL_SIZES) + 1), out_channels, 1)

    def forward(self, x: Float[Tensor, "B in H W"]) -> Float[Tensor, "B out H W"]:
        reduced = self.cv1(x)
        pooled = [functional.max_pool2d(reduced, size, stride=1, padding=size // 2) for size in self.POOL_SIZES]
        mixed: Tensor = self.cv2(join([reduced, *pooled]))
        return mixed
