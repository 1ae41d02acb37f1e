"""An exported INT8 file with more of its layers in float, without exporting again.

Exporting takes seconds to minutes; a choice of float layers is tried and timed on this form of the file instead. It
computes what an export of the network with those layers in float computes.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

from model.onnx_structure import Graph, convolutions

if TYPE_CHECKING:
    import onnx


def leave_in_float(proto: onnx.ModelProto, layers: Collection[str]) -> onnx.ModelProto:
    """Copy of an exported graph in which these layers have no Q/DQ pairs; other layers keep theirs.

    Weights must be stored in float in front of their pairs, as ``export_onnx`` writes them. Raises ValueError for the
    name of a layer that the graph does not have.
    """
    changed = type(proto)()
    changed.CopyFrom(proto)
    nodes = convolutions(changed)
    unknown = sorted(set(layers) - set(nodes))
    if unknown:
        raise ValueError(f"the file has no layer {', '.join(unknown[:5])}; its layers are those of engine.json")
    graph = Graph(changed)
    for name in layers:
        for position in (0, 1):
            nodes[name].input[position] = _in_front_of_pair(graph, nodes[name].input[position])
    _drop_unread(changed)
    return changed


def _in_front_of_pair(graph: Graph, name: str) -> str:
    dequantize = graph.made_by(name, "DequantizeLinear")
    if dequantize is None:
        return name
    quantize = graph.made_by(dequantize.input[0], "QuantizeLinear")
    assert quantize is not None, "export_onnx stores weights in float, with a pair behind them"
    return str(quantize.input[0])


def _drop_unread(proto: onnx.ModelProto) -> None:
    for op_type in ("DequantizeLinear", "QuantizeLinear"):  # a pair's second node first
        read = {name for node in proto.graph.node for name in node.input}
        kept = [node for node in proto.graph.node if node.op_type != op_type or node.output[0] in read]
        _keep(proto.graph.node, kept)
    read = {name for node in proto.graph.node for name in node.input}
    _keep(proto.graph.initializer, [tensor for tensor in proto.graph.initializer if tensor.name in read])


def _keep(messages: Any, kept: Sequence[Any]) -> None:
    copies = [type(message).FromString(message.SerializeToString()) for message in kept]
    del messages[:]
    messages.extend(copies)
