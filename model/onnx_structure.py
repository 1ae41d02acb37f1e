"""What an exported ONNX file must look like, read from the file itself and not from the model it came from.

A quantized convolution has a QuantizeLinear/DequantizeLinear pair on its input (int8, zero point 0, one scale) and on
its weight (int8, zero point 0, one scale per output channel: axis 0 of a convolution, axis 1 of a transposed one), or,
for the weight, an int8 constant and a DequantizeLinear. All scales are constants. Nothing else is quantized. Runtimes
accept files that break these rules and compute something else or something slower, so every export is checked.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from model.quantization import SMALLEST_SCALE

if TYPE_CHECKING:
    import onnx

CHANNEL_AXIS = {"Conv": 0, "ConvTranspose": 1}
WEIGHT_SUFFIX = ".weight"
NETWORK_PREFIX = "network."


@dataclass(frozen=True)
class StructureReport:
    """Layer names of the convolutions in a checked file, in graph order."""

    quantized: tuple[str, ...]
    floating: tuple[str, ...]
    nodes: int


class Graph:
    """Who makes and who reads each tensor of a graph, and the values of its constants."""

    def __init__(self, proto: onnx.ModelProto) -> None:
        from onnx import numpy_helper

        self.nodes = list(proto.graph.node)
        self.producer = {output: node for node in self.nodes for output in node.output}
        self.consumers: dict[str, list[onnx.NodeProto]] = {}
        for node in self.nodes:
            for name in node.input:
                self.consumers.setdefault(name, []).append(node)
        self._initializers = {tensor.name: tensor for tensor in proto.graph.initializer}
        self._to_array = numpy_helper.to_array

    def constant(self, name: str) -> NDArray[Any] | None:
        """Value of a tensor that is stored in the file; None when it is computed."""
        if name in self._initializers:
            return self._to_array(self._initializers[name])
        node = self.producer.get(name)
        if node is not None and node.op_type == "Constant":
            for attribute in node.attribute:
                if attribute.name == "value":
                    return self._to_array(attribute.t)
        return None

    def made_by(self, name: str, op_type: str) -> onnx.NodeProto | None:
        """The node that makes a tensor if it is of this type."""
        node = self.producer.get(name)
        return node if node is not None and node.op_type == op_type else None


def convolutions(proto: onnx.ModelProto) -> dict[str, onnx.NodeProto]:
    """Every convolution node by the name of its layer, which is the name of its weight in the network."""
    graph = Graph(proto)
    return {_layer_name(graph, node): node for node in graph.nodes if node.op_type in CHANNEL_AXIS}


def check_structure(path: Path, expected_quantized: Iterable[str] | None = None) -> StructureReport:
    """Check an exported file; ValueError names the file, the layer and the rule that is broken.

    expected_quantized: names of exactly those layers that must be INT8; None checks only how they are quantized.
    """
    import onnx

    proto = onnx.load(path)
    try:
        report = check_graph(proto)
        if expected_quantized is not None:
            _compare(set(expected_quantized), report)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return report


def check_graph(proto: onnx.ModelProto) -> StructureReport:
    """As ``check_structure``, for a graph in memory."""
    graph = Graph(proto)
    layers = convolutions(proto)
    quantized = tuple(layer for layer, node in layers.items() if _check_convolution(graph, layer, node))
    _check_nothing_else_is_quantized(graph)
    return StructureReport(quantized, tuple(layer for layer in layers if layer not in quantized), len(graph.nodes))


def _compare(expected: set[str], report: StructureReport) -> None:
    missing = sorted(expected - set(report.quantized))
    extra = sorted(set(report.quantized) - expected)
    if missing:
        raise ValueError(f"{len(missing)} layers should be INT8 but are not: {', '.join(missing[:5])}")
    if extra:
        raise ValueError(f"{len(extra)} layers are INT8 but should be float: {', '.join(extra[:5])}")


def _check_convolution(graph: Graph, layer: str, node: onnx.NodeProto) -> bool:
    """True for a rightly quantized convolution, False for a float one; ValueError for anything between."""
    input_pair, weight_pair = (graph.made_by(node.input[index], "DequantizeLinear") for index in (0, 1))
    if input_pair is None and weight_pair is None:
        return False
    if input_pair is None or weight_pair is None:
        half = "input" if input_pair is None else "weight"
        raise ValueError(f"{layer}: its {half} is not quantized although the other half is")
    _check_input(graph, layer, input_pair)
    _check_weight(graph, layer, weight_pair, CHANNEL_AXIS[node.op_type])
    return True


def _check_input(graph: Graph, layer: str, dequantize: onnx.NodeProto) -> None:
    quantize = graph.made_by(dequantize.input[0], "QuantizeLinear")
    if quantize is None:
        raise ValueError(f"{layer}: its input is dequantized without being quantized")
    for node in (quantize, dequantize):
        scale = _scale(graph, layer, node)
        if scale.size != 1:
            raise ValueError(f"{layer}: its input has {scale.size} scales, expected one for the whole tensor")
        _check_zero_point(graph, layer, node)


def _check_weight(graph: Graph, layer: str, dequantize: onnx.NodeProto, axis: int) -> None:
    quantize = graph.made_by(dequantize.input[0], "QuantizeLinear")
    source = dequantize.input[0] if quantize is None else quantize.input[0]
    weight = graph.constant(source)
    if weight is None:
        raise ValueError(f"{layer}: its weight is computed in the graph, expected a constant")
    if quantize is None and weight.dtype != np.int8:
        raise ValueError(f"{layer}: its stored weight is {weight.dtype}, expected int8")
    for node in (dequantize,) if quantize is None else (quantize, dequantize):
        found = _attribute(node, "axis", 1)
        if found != axis:
            raise ValueError(f"{layer}: its weight is quantized along axis {found}, expected axis {axis}")
        scale = _scale(graph, layer, node)
        if scale.shape != (weight.shape[axis],):
            raise ValueError(
                f"{layer}: its weight has scales of shape {scale.shape}, expected one for each of the "
                f"{weight.shape[axis]} output channels"
            )
        _check_zero_point(graph, layer, node)


def _scale(graph: Graph, layer: str, node: onnx.NodeProto) -> NDArray[np.float32]:
    scale = graph.constant(node.input[1])
    if scale is None:
        raise ValueError(f"{layer}: a scale is computed in the graph, expected a constant: freeze before export")
    values = scale.astype(np.float32)
    if not np.all(np.isfinite(values)) or values.min() < np.float32(SMALLEST_SCALE):
        raise ValueError(f"{layer}: the scale {values.min():g} is not a normal float16 number")
    return values


def _check_zero_point(graph: Graph, layer: str, node: onnx.NodeProto) -> None:
    zero_point = graph.constant(node.input[2]) if len(node.input) > 2 else None
    if zero_point is None:
        raise ValueError(f"{layer}: {node.op_type} has no constant zero point, so it would be uint8")
    if zero_point.dtype != np.int8:
        raise ValueError(f"{layer}: quantized to {zero_point.dtype}, expected int8")
    if np.any(zero_point != 0):
        raise ValueError(f"{layer}: the zero point is {zero_point.reshape(-1)[0]}, expected 0")


def _check_nothing_else_is_quantized(graph: Graph) -> None:
    for node in graph.nodes:
        if node.op_type == "QuantizeLinear":
            readers = {reader.op_type for reader in graph.consumers.get(node.output[0], [])} or {"nothing"}
            stray = readers - {"DequantizeLinear"}
        elif node.op_type == "DequantizeLinear":
            readers = {reader.op_type for reader in graph.consumers.get(node.output[0], [])} or {"nothing"}
            stray = readers - set(CHANNEL_AXIS)
        else:
            continue
        if stray:
            found = ", ".join(sorted(stray))
            raise ValueError(f"{node.name}: {node.op_type} is read by {found}, only convolutions are quantized")


def _layer_name(graph: Graph, node: onnx.NodeProto) -> str:
    """Follow the weight of a convolution back to its constant and take the layer out of that name."""
    name = str(node.input[1])
    while graph.constant(name) is None and name in graph.producer:
        name = str(graph.producer[name].input[0])
    return name.removeprefix(NETWORK_PREFIX).removesuffix(WEIGHT_SUFFIX)


def _attribute(node: onnx.NodeProto, name: str, default: int) -> int:
    return next((attribute.i for attribute in node.attribute if attribute.name == name), default)
