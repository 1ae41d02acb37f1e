"""Blocks against the golden vectors, and fused forms against unfused ones."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from model.blocks import (
    Bottleneck,
    ConvNormReLU,
    CSPLayer,
    QARepVGGBlock,
    SpatialPyramidPooling,
    fold_batch_norm,
    plain_block,
    repvgg_block,
)

BLOCK_TOLERANCE = 1e-5  # of the golden README, for single blocks and fused kernels
BLOCKS = {
    "a_identity": {"in_channels": 8, "out_channels": 8, "identity": True},
    "b_stride2": {"in_channels": 6, "out_channels": 10, "stride": 2},
    "c_alpha": {"in_channels": 8, "out_channels": 8, "identity": True},
}


@pytest.fixture(params=BLOCKS)
def case(request, golden) -> tuple[QARepVGGBlock, dict[str, Tensor]]:
    """A golden QARepVGG block (float64, evaluation mode) and its expected tensors."""
    tag = request.param
    block = golden.fill(QARepVGGBlock(**BLOCKS[tag]), f"{tag}.")
    if tag == "c_alpha":  # we have no scalar on the 1x1 branch; scaling its kernel and bias is the same
        alpha = float(golden.fill_module.fill_one("c_alpha.alpha", (1,))[0])
        block.branch_1x1.weight.data.mul_(alpha)
        block.branch_1x1.bias.data.mul_(alpha)
    tensors = golden.tensors("qarepvgg_blocks")
    expected = {key.removeprefix(f"{tag}."): value for key, value in tensors.items() if key.startswith(tag)}
    return block.double().eval(), expected


def _close(actual: Tensor, expected: Tensor, tolerance: float = BLOCK_TOLERANCE) -> None:
    torch.testing.assert_close(actual.double(), expected.double(), rtol=0, atol=tolerance)


def test_output_equals_golden(case):
    block, expected = case
    _close(block(expected["input"].double()), expected["output"])


def test_merged_branches_equal_golden(case):
    block, expected = case
    kernel, bias = block.merge_branches()
    _close(kernel, expected["partial_kernel"])
    _close(bias, expected["partial_bias"])


def test_fused_kernel_and_output_equal_golden(case):
    block, expected = case
    block.fuse()
    _close(block.rbr_reparam.weight, expected["full_kernel"])
    _close(block.rbr_reparam.bias, expected["full_bias"])
    _close(block(expected["input"].double()), expected["output"])
    assert set(block.state_dict()) == {"rbr_reparam.weight", "rbr_reparam.bias"}


def test_training_step_equals_golden(case):
    block, expected = case
    _close(block.train()(expected["input"].double()), expected["train_output"])
    for name, norm in [("bn3", block.branch_3x3.bn), ("post", block.post_bn)]:
        _close(norm.running_mean, expected[f"train_{name}_running_mean"])
        _close(norm.running_var, expected[f"train_{name}_running_var"])


def test_post_norm_leaves_constants_without_gradient(case):
    """In training the post norm removes per-channel constants, so the biases before it cannot learn."""
    block, expected = case
    block.train()(expected["input"].double()).square().sum().backward()
    assert block.branch_1x1.bias.grad.abs().max() < 1e-9  # float64 rounding of a sum that is 0
    assert block.branch_3x3.bn.bias.grad.abs().max() < 1e-9
    assert block.branch_1x1.weight.grad.abs().max() > 1e-3


def _randomise_norms(block: nn.Module) -> nn.Module:
    for module in block.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2.0)
            module.weight.data.normal_()
            module.bias.data.normal_()
    return block.eval()


@pytest.mark.parametrize("kernel_size, stride", [(1, 1), (3, 1), (3, 2)])
def test_fused_convolution_equals_unfused(kernel_size, stride):
    block = _randomise_norms(ConvNormReLU(5, 7, kernel_size, stride).double())
    images = torch.randn(2, 5, 9, 8, dtype=torch.float64)
    expected = block(images)
    block.fuse()
    block.fuse()  # a second time changes nothing
    _close(block(images), expected, 1e-12)  # both in float64
    assert set(block.state_dict()) == {"conv.weight", "conv.bias"}


def test_fold_batch_norm_worked_example():
    """gain = 4 / sqrt(3 + 1) = 2: kernel 3 -> 6, bias 1 - 2 * 0.5 + 2 * 10 = 20."""
    norm = nn.BatchNorm2d(1, eps=1.0).eval()
    norm.weight.data.fill_(4.0)
    norm.bias.data.fill_(1.0)
    norm.running_mean.fill_(0.5)
    norm.running_var.fill_(3.0)
    weight, bias = fold_batch_norm(torch.full((1, 1, 1, 1), 3.0), torch.tensor([10.0]), norm)
    assert weight.item() == 6.0
    assert bias.item() == 20.0


def test_bottleneck_scalar_weighs_the_shortcut():
    block = Bottleneck(4, plain_block).eval()
    images = torch.randn(1, 4, 6, 6)
    without_shortcut = block.cv2(block.cv1(images))
    block.alpha.data.fill_(0.25)
    torch.testing.assert_close(block(images), 0.25 * images + without_shortcut)


@pytest.mark.parametrize("intermediates, joined_channels", [(False, 16), (True, 40)])
def test_csp_layer_concatenation_order(intermediates, joined_channels):
    """conv3 reads [t0, ..., tn, r] or [tn, r]; checked by feeding it one chain element at a time."""
    layer = CSPLayer(6, 10, 8, 3, repvgg_block, intermediates).double().eval()
    images = torch.randn(1, 6, 5, 5, dtype=torch.float64)
    chain = [layer.conv1(images)]
    for bottleneck in layer.bottlenecks:
        chain.append(bottleneck(chain[-1]))
    parts = [*(chain if intermediates else chain[-1:]), layer.conv2(images)]
    assert layer.conv3.conv.in_channels == joined_channels
    torch.testing.assert_close(layer(images), layer.conv3(torch.cat(parts, 1)))


def test_pyramid_pooling_takes_window_maxima_in_parallel():
    pooling = SpatialPyramidPooling(2, 4).eval()
    seen: list[Tensor] = []
    pooling.cv1.forward = lambda x: x[:, :1]
    pooling.cv2.forward = lambda x: seen.append(x) or x
    images = torch.zeros(1, 2, 20, 20)
    images[:, :, 10, 10] = 1.0
    pooling(images)
    areas = seen[0].sum(dim=(0, 2, 3)).tolist()
    assert areas == [1, 25, 81, 169]
