"""Networks that are hard to quantize: channels of uneven scale between two convolutions.

A factor above 0 behind one convolution passes through ReLU and can be taken back in the next, so the network computes
the same in float. INT8 has one range for all channels of an activation, and one for all inputs of a kernel's row: with
factors that differ by far, the small channels have no steps left. Cross-layer equalization uses the same freedom the
other way (Nagel et al. 2019, arXiv 1906.04721, section 4.1). For tests and benchmarks of what quantization recovers.
"""

from __future__ import annotations

import torch
from torch import nn

from model.blocks import Bottleneck
from model.yolo_nas import YoloNAS


@torch.no_grad()
def spread_channels(network: YoloNAS, bottleneck: str, octaves: float) -> str:
    """Give the channels between a bottleneck's two convolutions factors from 1 to 2 ** octaves, in place.

    network: folded. bottleneck: name of a ``Bottleneck`` of QARepVGG blocks. Returns the name of the convolution that
    is hard to quantize afterwards. Raises ValueError for another module, or a network that is not folded.
    """
    module = network.get_submodule(bottleneck)
    if not isinstance(module, Bottleneck):
        raise ValueError(f"{bottleneck} is a {type(module).__name__}, not a Bottleneck")
    first, second = (getattr(block, "rbr_reparam", None) for block in (module.cv1, module.cv2))
    if not isinstance(first, nn.Conv2d) or not isinstance(second, nn.Conv2d) or first.bias is None:
        raise ValueError(f"{bottleneck} has no folded QARepVGG blocks: call fuse() first")
    factors = torch.exp2(torch.linspace(0, octaves, first.out_channels, device=first.weight.device))
    first.weight *= factors.reshape(-1, 1, 1, 1)
    first.bias *= factors
    second.weight /= factors.reshape(1, -1, 1, 1)
    return f"{bottleneck}.cv2.rbr_reparam"
