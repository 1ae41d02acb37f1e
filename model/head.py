"""Detection heads of YOLO-NAS: class logits and a distribution over each box side, and their decoding.

The box side distributions are those of Generalized Focal Loss (arXiv 2006.04388, section 3): every side is the
expected value of a softmax over the bins 0 to ``REG_MAX``, in units of the level's stride.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from model.blocks import ConvNormReLU

STRIDES = (8, 16, 32)
REG_MAX = 16
NUM_BINS = REG_MAX + 1
ANCHOR_SIDE_IN_STRIDES = 5.0
FIRST_BIN_SLOPE = 0.3  # logits by which a bin is less likely than the one before it, at the start
PRIOR_PROBABILITY = 0.01


class RawOutput(NamedTuple):
    """What losses need of a forward pass.  A anchors lie level by level (strides 8, 16, 32), rows before columns."""

    class_logits: Float[Tensor, "B A C"]
    box_distribution_logits: Float[Tensor, "B A 68"]  # sides left, top, right, bottom, NUM_BINS bins each
    anchors_xyxy: Float[Tensor, "A 4"]  # static squares of side 5 * stride, input pixels
    anchor_points: Float[Tensor, "A 2"]  # cell centres (x, y), input pixels
    anchors_per_level: list[int]
    strides: Float[Tensor, "A 1"]  # pixels
    features: tuple[Tensor, ...] = ()  # P3, P4, P5 that entered the heads, for feature distillation


class AnchorGrid(NamedTuple):
    """Everything about the anchors of one input size that does not depend on the images."""

    anchors_xyxy: Float[Tensor, "A 4"]
    anchor_points: Float[Tensor, "A 2"]
    strides: Float[Tensor, "A 1"]
    bins: Float[Tensor, " 17"]


def make_anchor_grid(level_sizes: Sequence[tuple[int, int]], device: torch.device, dtype: torch.dtype) -> AnchorGrid:
    """Anchors of levels of the given (height, width) in cells; coordinates in input pixels."""
    points, strides = [], []
    for (height, width), stride in zip(level_sizes, STRIDES, strict=True):
        y = (torch.arange(height, device=device, dtype=dtype) + 0.5) * stride
        x = (torch.arange(width, device=device, dtype=dtype) + 0.5) * stride
        grid_y, grid_x = torch.meshgrid(y, x, indexing="ij")
        points.append(torch.stack([grid_x.reshape(-1), grid_y.reshape(-1)], dim=-1))
        strides.append(torch.full((height * width, 1), float(stride), device=device, dtype=dtype))
    anchor_points, anchor_strides = torch.cat(points), torch.cat(strides)
    reach = anchor_strides * (ANCHOR_SIDE_IN_STRIDES / 2)
    anchors_xyxy = torch.cat([anchor_points - reach, anchor_points + reach], dim=-1)
    return AnchorGrid(anchors_xyxy, anchor_points, anchor_strides, torch.arange(NUM_BINS, device=device, dtype=dtype))


def decode_boxes(box_distribution_logits: Float[Tensor, "B A 68"], grid: AnchorGrid) -> Float[Tensor, "B A 4"]:
    """Expected box of every anchor, xyxy in input pixels, not clipped to the image."""
    probabilities = torch.unflatten(box_distribution_logits, -1, (4, NUM_BINS)).softmax(dim=-1)  # (B, A, 4, bins)
    left_top, right_bottom = ((probabilities * grid.bins).sum(dim=-1) * grid.strides).chunk(2, dim=-1)
    return torch.cat([grid.anchor_points - left_top, grid.anchor_points + right_bottom], dim=-1)


class _HeadConv(nn.Module):
    """A convolution block under the name ``seq``, which published checkpoints have in their heads."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int) -> None:
        super().__init__()
        self.seq = ConvNormReLU(in_channels, out_channels, kernel_size)

    def forward(self, x: Float[Tensor, "B in H W"]) -> Float[Tensor, "B out H W"]:
        features: Tensor = self.seq(x)
        return features


class DetectionHead(nn.Module):
    """Predictions of one level; classification and box regression share only the stem."""

    def __init__(self, in_channels: int, hidden_channels: int, num_classes: int) -> None:
        super().__init__()
        self.stem = _HeadConv(in_channels, hidden_channels, 1)
        self.cls_convs = nn.Sequential(_HeadConv(hidden_channels, hidden_channels, 3))
        self.reg_convs = nn.Sequential(_HeadConv(hidden_channels, hidden_channels, 3))
        self.cls_pred = nn.Conv2d(hidden_channels, num_classes, 1)
        self.reg_pred = nn.Conv2d(hidden_channels, 4 * NUM_BINS, 1)
        assert self.cls_pred.bias is not None
        nn.init.constant_(self.cls_pred.bias, -math.log((1 - PRIOR_PROBABILITY) / PRIOR_PROBABILITY))
        self._begin_with_small_boxes()

    def _begin_with_small_boxes(self) -> None:
        """Let near bins be likelier at first, so that boxes begin 5.5 strides wide.

        Evenly likely bins, as in the reference, begin 16 strides wide: small objects then overlap no prediction, get
        soft labels near 0 and hardly start to learn (docs/LOG.md has the measurements).
        """
        assert self.reg_pred.bias is not None
        with torch.no_grad():
            self.reg_pred.bias.copy_((-FIRST_BIN_SLOPE * torch.arange(NUM_BINS, dtype=torch.float32)).repeat(4))

    def forward(self, x: Float[Tensor, "B in H W"]) -> tuple[Float[Tensor, "B C H W"], Float[Tensor, "B 68 H W"]]:
        stem = self.stem(x)
        return self.cls_pred(self.cls_convs(stem)), self.reg_pred(self.reg_convs(stem))


def _flatten_levels(maps: Sequence[Float[Tensor, "B channels _ _"]]) -> Float[Tensor, "B A channels"]:
    """Concatenate level maps to anchors; half precision becomes float32, since pixels need more than 11 bits."""
    if maps[0].is_contiguous(memory_format=torch.channels_last) and not torch.compiler.is_compiling():
        flat = torch.cat([level.permute(0, 2, 3, 1).flatten(1, 2) for level in maps], dim=1)  # a plain copy then
    else:
        flat = torch.cat([level.flatten(2) for level in maps], dim=2).transpose(1, 2)
    return flat.to(torch.promote_types(flat.dtype, torch.float32))


class DetectionHeads(nn.Module):
    """Heads of the three levels; no weights are shared between them."""

    def __init__(self, in_channels: Sequence[int], hidden_channels: Sequence[int], num_classes: int) -> None:
        super().__init__()
        self.head1 = DetectionHead(in_channels[0], hidden_channels[0], num_classes)
        self.head2 = DetectionHead(in_channels[1], hidden_channels[1], num_classes)
        self.head3 = DetectionHead(in_channels[2], hidden_channels[2], num_classes)
        self._grids: dict[tuple[object, ...], AnchorGrid] = {}

    def anchor_grid(
        self, level_sizes: Sequence[tuple[int, int]], device: torch.device, dtype: torch.dtype
    ) -> AnchorGrid:
        """The grid of these level sizes, made once per size, device and dtype (never part of the state dict)."""
        if torch.compiler.is_compiling():  # traced tensors must not outlive the trace
            return make_anchor_grid(level_sizes, device, dtype)
        key = (*level_sizes, device, dtype)
        if key not in self._grids:
            with torch.inference_mode(False):  # a grid first made for inference must also serve training
                self._grids[key] = make_anchor_grid(level_sizes, device, dtype)
        return self._grids[key]

    def forward(
        self, p3: Tensor, p4: Tensor, p5: Tensor
    ) -> tuple[tuple[Float[Tensor, "B A 4"], Float[Tensor, "B A C"]], RawOutput]:
        predictions = [self.head1(p3), self.head2(p4), self.head3(p5)]
        class_logits = _flatten_levels([classes for classes, _ in predictions])
        distribution_logits = _flatten_levels([sides for _, sides in predictions])
        level_sizes = [(level.shape[2], level.shape[3]) for level in (p3, p4, p5)]
        grid = self.anchor_grid(level_sizes, distribution_logits.device, distribution_logits.dtype)
        raw = RawOutput(
            class_logits,
            distribution_logits,
            grid.anchors_xyxy,
            grid.anchor_points,
            [height * width for height, width in level_sizes],
            grid.strides,
            (p3, p4, p5),
        )
        return (decode_boxes(distribution_logits, grid), class_logits.sigmoid()), raw
