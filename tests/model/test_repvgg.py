"""Plain RepVGG blocks fold exactly, and take the places of all QARepVGG blocks of a network."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import model
from model.blocks import QARepVGGBlock
from model.quantization.quantize import QuantizationConfig, quantize, quantized_layers
from model.repvgg import RepVGGBlock, use_repvgg_blocks


def with_statistics(network: nn.Module) -> nn.Module:
    """Norms whose numbers are not those they begin with, in evaluation mode."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None and module.running_var is not None
            nn.init.normal_(module.running_mean, std=0.3)
            nn.init.uniform_(module.running_var, 0.3, 3.0)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.2)
    return network.eval()


@pytest.mark.parametrize(
    ("channels", "stride", "identity"), [((6, 6), 1, True), ((6, 6), 1, False), ((4, 8), 2, False)]
)
def test_one_convolution_computes_what_the_branches_compute(
    channels: tuple[int, int], stride: int, identity: bool
) -> None:
    block = with_statistics(RepVGGBlock(*channels, stride, identity)).double()
    values = torch.randn(2, channels[0], 8, 8, dtype=torch.float64)
    with torch.no_grad():
        branches = block.branch_3x3(values) + block.norm_1x1(block.branch_1x1(values))
        if block.norm_identity is not None:
            branches = branches + block.norm_identity(values)
        before = block(values)
        torch.testing.assert_close(before, branches.relu(), rtol=0, atol=0)
        block.fuse()
        block.fuse()
        torch.testing.assert_close(block(values), before, rtol=0, atol=1e-12)
    assert set(block.state_dict()) == {"rbr_reparam.weight", "rbr_reparam.bias"}


def test_every_branch_learns() -> None:
    block = RepVGGBlock(4, 4, identity=True)
    block(torch.randn(3, 4, 6, 6)).square().sum().backward()
    assert all(parameter.grad is not None for parameter in block.parameters())
    assert not any(name.startswith("post_bn") for name, _ in block.named_parameters())


def test_a_network_of_plain_blocks_folds_and_quantizes() -> None:
    network = use_repvgg_blocks(model.build("pico", 2))
    blocks = [module for module in network.modules() if isinstance(module, QARepVGGBlock)]
    assert blocks and all(isinstance(block, RepVGGBlock) for block in blocks)
    with_statistics(network)
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        (boxes, scores), _ = network(images)
        folded = network.fused_copy()
        (folded_boxes, folded_scores), _ = folded(images)
    torch.testing.assert_close(folded_boxes, boxes, atol=1e-2, rtol=0)  # pixels of 64, float32 sums in another order
    torch.testing.assert_close(folded_scores, scores, atol=1e-4, rtol=0)
    assert len(quantized_layers(quantize(folded, [images], QuantizationConfig()))) == 76


def test_a_fused_network_is_refused() -> None:
    with pytest.raises(ValueError, match="build a new one"):
        use_repvgg_blocks(model.build("pico", 2).eval().fuse())
