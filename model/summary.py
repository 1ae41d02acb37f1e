"""What a network costs: output shape, parameters and multiply-adds of every layer, in both forms.

A layer is what becomes one convolution when the network is folded, so a row has the figures of the training form and
of the deploy form beside each other.  Multiply-adds are those of convolutions, as published tables count them; norms,
pooling, softmax and decoding are left out.

One pass of the training form over the smallest picture tells everything, since sizes are multiples of the largest
stride: in any other the maps are so many times higher and wider.  The deploy form is not made, only counted: folding
the weights of the largest variants takes longer than all the rest.  (torch's meta device would need no memory, but
takes seconds to set up.)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from model import build
from model.blocks import Bottleneck, ConvNormReLU, QARepVGGBlock
from model.yolo_nas import LARGEST_STRIDE, YoloNAS

PARTS = ("backbone", "neck", "heads")


@dataclass(frozen=True)
class Cost:
    """Parameters (elements) and multiply-adds of one picture."""

    parameters: int = 0
    multiply_adds: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.parameters + other.parameters, self.multiply_adds + other.multiply_adds)


@dataclass(frozen=True)
class Layer:
    """One layer: name, kind, output shape (channels, height, width) and the cost of both forms."""

    name: str
    kind: str
    output_shape: tuple[int, int, int]
    training: Cost
    deploy: Cost


@dataclass(frozen=True)
class Summary:
    """All layers in the order they run."""

    variant: str
    num_classes: int
    height: int
    width: int
    layers: tuple[Layer, ...]
    scaled_shortcuts: tuple[str, ...]
    """Bottlenecks, each with one learned scalar.  Published tables count it in the training form alone."""

    def total(self, part: str = "") -> tuple[Cost, Cost]:
        """Training and deploy form of the network, or of its ``backbone``, ``neck`` or ``heads``."""
        chosen = [layer for layer in self.layers if layer.name.startswith(part)]
        scalars = sum(name.startswith(part) for name in self.scaled_shortcuts)
        return _sum(layer.training for layer in chosen) + Cost(scalars), _sum(layer.deploy for layer in chosen)


def _sum(costs: Iterable[Cost]) -> Cost:
    return sum(costs, start=Cost())


def summarize(variant: str, num_classes: int, height: int, width: int) -> Summary:
    """Send the smallest picture through a variant and note what every layer costs in both forms at this size.

    Raises ValueError for an unknown variant, no classes, or a size that is no positive multiple of 32.
    """
    if min(height, width) < LARGEST_STRIDE or height % LARGEST_STRIDE or width % LARGEST_STRIDE:
        raise ValueError(f"the input size must be a positive multiple of {LARGEST_STRIDE}, got {height}x{width}")
    network = build(variant, num_classes).eval()
    times = (height // LARGEST_STRIDE, width // LARGEST_STRIDE)
    kinds = dict(_layers(network))
    scaled = tuple(name for name, module in network.named_modules() if isinstance(module, Bottleneck))
    costs, shapes = _measure(network, times, kinds)
    layers = tuple(Layer(name, kinds[name], shapes[name], *costs[name]) for name in shapes)
    return Summary(variant, num_classes, height, width, layers, scaled)


def _layers(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Name and kind of every block that folds into one convolution, and of the convolutions outside them."""
    for name, child in module.named_children():
        if isinstance(child, QARepVGGBlock):
            yield prefix + name, f"QARepVGG {_size(child.branch_3x3.conv)}"
        elif isinstance(child, ConvNormReLU):
            yield prefix + name, f"conv+norm {_size(child.conv)}"
        elif isinstance(child, nn.Conv2d):
            yield prefix + name, f"conv {_size(child)}"
        elif isinstance(child, nn.ConvTranspose2d):
            yield prefix + name, f"transposed {_size(child)}"
        else:
            yield from _layers(child, f"{prefix}{name}.")


def _size(convolution: nn.Conv2d | nn.ConvTranspose2d) -> str:
    """Kernel and stride: ``3x3/2``."""
    return f"{convolution.kernel_size[0]}x{convolution.kernel_size[1]}/{convolution.stride[0]}"


def _measure(
    network: YoloNAS, times: tuple[int, int], names: Iterable[str]
) -> tuple[dict[str, tuple[Cost, Cost]], dict[str, tuple[int, int, int]]]:
    """Cost in training and deploy form and output shape by name of layer, the shapes in the order of the layers.

    ``times``: how often the smallest picture fits into the height and the width of the one that is asked for.
    """
    multiply_adds: Counter[nn.Module] = Counter()
    shapes: dict[str, tuple[int, int, int]] = {}

    def count(convolution: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        assert isinstance(convolution, nn.Conv2d | nn.ConvTranspose2d)
        placed = output if isinstance(convolution, nn.Conv2d) else inputs[0]  # every weight is used once a place
        multiply_adds[convolution] += convolution.weight.numel() * placed[0, 0].numel() * times[0] * times[1]

    def note(name: str, _module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> None:
        channels, height, width = output.shape[1:]
        shapes[name] = (channels, height * times[0], width * times[1])

    modules = {name: network.get_submodule(name) for name in names}
    convolutions = {name: _convolutions(module) for name, module in modules.items()}
    hooks = [part.register_forward_hook(count) for parts in convolutions.values() for part in parts]
    hooks += [module.register_forward_hook(partial(note, name)) for name, module in modules.items()]
    with torch.no_grad(), _plain_kernels():
        network(torch.zeros(1, 3, LARGEST_STRIDE, LARGEST_STRIDE))
    for hook in hooks:
        hook.remove()
    costs = {}
    for name, module in modules.items():
        size = sum(parameter.numel() for parameter in module.parameters())
        training = Cost(size, sum(multiply_adds[part] for part in convolutions[name]))
        kept = _kept(module)
        costs[name] = training, Cost(kept.weight.numel() + kept.out_channels, multiply_adds[kept])
    return costs, shapes


def _convolutions(module: nn.Module) -> list[nn.Conv2d | nn.ConvTranspose2d]:
    return [part for part in module.modules() if isinstance(part, nn.Conv2d | nn.ConvTranspose2d)]


def _kept(module: nn.Module) -> nn.Conv2d | nn.ConvTranspose2d:
    """The convolution whose kernel is as large as the folded one, which has a bias for each output channel too."""
    return max(_convolutions(module), key=lambda part: part.weight.numel())


@contextmanager
def _plain_kernels() -> Iterator[None]:
    """oneDNN off: making its kernels for every shape takes longer than one small picture takes without them."""
    before = torch._C._get_mkldnn_enabled()  # `mkldnn.flags` would set, and warn of, more than this
    torch._C._set_mkldnn_enabled(False)
    try:
        yield
    finally:
        torch._C._set_mkldnn_enabled(before)
