"""From signed to unsigned activations, which is what OpenVINO's INT8 kernels compute rightly and fast.

Two things go wrong with signed ones, both without a word (OpenVINO 2026.4):

* An x86 processor without VNNI multiplies unsigned by signed bytes and adds pairs of products in saturating int16. To
  feed it signed activations OpenVINO shifts them by 128, and 2 * (128 + 127) * 127 does not fit: results collapse. The
  same activation as unsigned byte with the same scale needs no shift, and 2 * 127 * 127 fits.
* Behind a concatenation signed activations are computed wrongly on every processor, with VNNI too.

So every activation that provably is never negative is re-labelled uint8. Above the calibrated maximum int8 stops at 127
where uint8 would go on to 255; a clip in front keeps the old stop, hence the rewritten file computes the same numbers.
The canonical file stays signed (TensorRT knows no unsigned activations); this form is derived when an engine is built.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from model.onnx_structure import Graph
from model.quantization import QUANTIZED_MAXIMUM

if TYPE_CHECKING:
    import onnx

NEVER_NEGATIVE = frozenset({"Relu", "Sigmoid", "Softmax", "Abs", "Exp"})
KEEPS_SIGN = frozenset(
    {"MaxPool", "AveragePool", "GlobalAveragePool", "Reshape", "Transpose", "Slice", "Cast", "Identity", "Flatten"}
    | {"Squeeze", "Unsqueeze", "Split", "Gather", "QuantizeLinear", "DequantizeLinear"}
)
"""Not negative when their first input is not; all zero points are 0."""
KEEPS_SIGN_OF_ALL = frozenset({"Concat", "Add", "Mul", "Div", "Min", "Sum"})
"""Not negative when no input is."""
PASSES_BOUND_ON = frozenset({"Concat", "MaxPool"})
"""Bounding their output is the same as bounding every input."""


@dataclass(frozen=True)
class RewriteReport:
    """How many activations became unsigned, and which could not be proved non-negative (names of their tensors)."""

    unsigned: int
    signed: tuple[str, ...]


def rewrite_unsigned(proto: onnx.ModelProto) -> tuple[onnx.ModelProto, RewriteReport]:
    """Copy of a Q/DQ graph with unsigned activations wherever that is exact.

    Weights keep their float constants and pairs: stored as int8 they would be a quarter of the bytes, but OpenVINO
    2026.4 then runs 37 of 92 convolutions of YOLO-NAS-S in float once the batch size is fixed.
    """
    import onnx

    rewritten = onnx.ModelProto()
    rewritten.CopyFrom(proto)
    graph = Graph(rewritten)
    non_negative = non_negative_tensors(rewritten)
    activations = [
        node for node in graph.nodes if node.op_type == "QuantizeLinear" and graph.constant(node.input[0]) is None
    ]
    signed = [node for node in activations if node.input[0] not in non_negative]
    report = RewriteReport(len(activations) - len(signed), tuple(node.input[0] for node in signed))
    unsigned_bounds = {
        node.output[0]: _make_unsigned(rewritten, graph, node) for node in activations if node.input[0] in non_negative
    }
    _insert_clips(rewritten, graph, unsigned_bounds)
    return rewritten, report


def non_negative_tensors(proto: onnx.ModelProto) -> set[str]:
    """Names of the tensors that cannot hold a negative number, whatever the image; one pass in graph order."""
    from onnx import TensorProto

    graph = Graph(proto)
    known = {value.name for value in proto.graph.input if value.type.tensor_type.elem_type == TensorProto.UINT8}
    for node in graph.nodes:
        if _is_non_negative(graph, node, known):
            known.update(node.output)
    return known


def _is_non_negative(graph: Graph, node: onnx.NodeProto, known: set[str]) -> bool:
    def holds(name: str) -> bool:
        value = graph.constant(name)
        return name in known if value is None else bool(np.all(value >= 0))

    if node.op_type in NEVER_NEGATIVE:
        return True
    if node.op_type in KEEPS_SIGN:
        return holds(node.input[0])
    return node.op_type in KEEPS_SIGN_OF_ALL and all(holds(name) for name in node.input)


def _make_unsigned(proto: onnx.ModelProto, graph: Graph, quantize: onnx.NodeProto) -> np.float32:
    """Re-label one activation in place and return the largest value it may take."""
    from onnx import numpy_helper

    name = quantize.output[0]
    zero_point = numpy_helper.from_array(np.zeros((), np.uint8), name + "_unsigned_zero_point")
    proto.graph.initializer.append(zero_point)
    for node in (quantize, *graph.consumers[name]):
        assert node.op_type in ("QuantizeLinear", "DequantizeLinear")
        node.input[2] = zero_point.name
    return np.float32(_scale(graph, quantize) * QUANTIZED_MAXIMUM)


def _scale(graph: Graph, quantize: onnx.NodeProto) -> float:
    scale = graph.constant(quantize.input[1])
    assert scale is not None and scale.size == 1, "check_structure passes only constant per-tensor scales"
    return float(scale.item())


def _insert_clips(proto: onnx.ModelProto, graph: Graph, bounds: dict[str, np.float32]) -> None:
    """Bound what every unsigned activation reads, as near to where it is made as all its readers agree.

    Behind a concatenation or pooling a clip would be a pass of its own over memory; in front of it, right behind the
    convolution, it is fused into that. ``bounds`` holds the bound of each unsigned QuantizeLinear by its output.
    """
    agreed = _agreed_bounds(graph, bounds)
    clips = _Clips(proto)
    for node in graph.nodes:
        bound = _demand(node, agreed)
        for position, name in enumerate(node.input[: 1 if node.op_type == "QuantizeLinear" else None]):
            if bound is not None and name not in agreed:
                node.input[position] = clips.bounded(name, bound)
        clips.nodes.append(node)
    _replace_nodes(proto, clips.nodes)


def _agreed_bounds(graph: Graph, bounds: dict[str, np.float32]) -> dict[str, np.float32]:
    """The bounds given and, by tensor, those that concatenations and poolings pass on to what they read."""
    agreed = dict(bounds)
    for node in reversed(graph.nodes):
        if node.op_type in PASSES_BOUND_ON:
            demands = {_demand(reader, agreed) for reader in graph.consumers.get(node.output[0], [])}
            if len(demands) == 1 and (bound := demands.pop()) is not None:
                agreed[node.output[0]] = bound
    return agreed


def _demand(reader: onnx.NodeProto, agreed: dict[str, np.float32]) -> np.float32 | None:
    """The bound that this node wants on what it reads; None when it wants all values."""
    if reader.op_type in PASSES_BOUND_ON or reader.op_type == "QuantizeLinear":
        return agreed.get(reader.output[0])
    return None


class _Clips:
    """The nodes of the new graph so far; a tensor that several readers want bounded alike is clipped once."""

    def __init__(self, proto: onnx.ModelProto) -> None:
        self._proto = proto
        self._known: set[str] = set()
        self.nodes: list[onnx.NodeProto] = []

    def bounded(self, name: str, upper: np.float32) -> str:
        """Name of the tensor bounded from above; the node that makes it is appended when it is new."""
        from onnx import helper, numpy_helper

        clipped = f"{name}_clipped_{upper}"
        if clipped not in self._known:
            limit = numpy_helper.from_array(np.array(upper), clipped + "_limit")
            self._proto.graph.initializer.append(limit)
            self.nodes.append(helper.make_node("Clip", [name, "", limit.name], [clipped], clipped))
            self._known.add(clipped)
        return clipped


def _replace_nodes(proto: onnx.ModelProto, nodes: list[onnx.NodeProto]) -> None:
    copies = [type(node).FromString(node.SerializeToString()) for node in nodes]
    del proto.graph.node[:]
    proto.graph.node.extend(copies)
