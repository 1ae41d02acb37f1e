"""From float32 to float16 inside an exported file, float or quantized: the form that TensorRT takes.

A strongly typed TensorRT network runs in the types of its file: INT8 where there is a Q/DQ pair and whatever the
tensors are elsewhere. The canonical file would become INT8 with float32, so this module writes its float16 form:

* convolutions and all between them are float16, weights and scales with them;
* float32 stay the division by 255 (its quotients lie near the edges of float16's grid) and everything behind the last
  convolutions that calculates, which is the sigmoid, the distribution over box sides and the decoding: 11 bits are too
  few for coordinates of hundreds of pixels. What only moves data there is float16 still;
* quantized weights are stored as the integers that the canonical file computes, so that rounding does not change them;
* a layer whose scale or weight does not fit a normal float16 number stays float32 and is reported.

Types are cast where they meet; the order of the nodes stays.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from model.onnx_file import fix_batch, load_onnx, write_onnx
from model.onnx_structure import CHANNEL_AXIS, Graph, convolutions
from model.quantization import QUANTIZED_MAXIMUM, QUANTIZED_MINIMUM, SMALLEST_SCALE

if TYPE_CHECKING:
    import onnx

LARGEST_HALF = float(np.finfo(np.float16).max)
MOVES_DATA = frozenset(
    {"Reshape", "Transpose", "Concat", "Flatten", "Identity", "Slice", "Split", "Gather", "Squeeze", "Unsqueeze"}
)
QUANTIZERS = ("QuantizeLinear", "DequantizeLinear")
FLOAT, HALF = np.dtype(np.float32), np.dtype(np.float16)


@dataclass(frozen=True)
class HalfReport:
    """What became of a graph.

    float_layers: convolutions that stay float32, with the reason. subnormal_constants: weights and biases below
    float16's smallest normal number (they keep fewer digits; scales are never among them). casts: how many were added.
    """

    half_layers: tuple[str, ...]
    float_layers: dict[str, str]
    subnormal_constants: int
    casts: int


def export_half(source: Path, target: Path, batch: int | None = None) -> HalfReport:
    """Write the float16 form of an exported file, for a fixed batch if one is given.

    Raises ValueError for an unreadable file or a batch that the file does not take.
    """
    proto = load_onnx(source)
    converted, report = convert_to_half(proto if batch is None else fix_batch(proto, batch))
    write_onnx(converted, target)
    return report


def convert_to_half(proto: onnx.ModelProto) -> tuple[onnx.ModelProto, HalfReport]:
    """Copy of a graph in float16; inputs, outputs and metadata are as before."""
    graph, layers = Graph(proto), convolutions(proto)
    unfit = _unfit_layers(graph, layers)
    typer = _Typer(proto, graph, _float_nodes(proto, graph, {id(layers[name]) for name in unfit}))
    for node in graph.nodes:
        typer.add(node)
    converted = typer.finish()
    half = tuple(name for name in layers if name not in unfit)
    return converted, HalfReport(half, unfit, typer.subnormal, typer.casts)


def _unfit_layers(graph: Graph, layers: dict[str, onnx.NodeProto]) -> dict[str, str]:
    """Convolutions that cannot be float16, with the reason; layers that share a quantized input stay together."""
    unfit = {name: reason for name, node in layers.items() if (reason := _why_unfit(graph, node))}
    shared = {layers[name].input[0]: name for name in unfit if graph.made_by(layers[name].input[0], QUANTIZERS[1])}
    for name, node in layers.items():
        if name not in unfit and node.input[0] in shared:
            unfit[name] = f"it shares its quantized input with {shared[node.input[0]]}"
    return unfit


def _why_unfit(graph: Graph, node: onnx.NodeProto) -> str:
    for position, kind in ((0, "input"), (1, "weight")):
        pair = graph.made_by(node.input[position], "DequantizeLinear")
        scale = None if pair is None else graph.constant(pair.input[1])
        if scale is not None and (scale.min() < SMALLEST_SCALE or scale.max() > LARGEST_HALF):
            worst = scale.min() if scale.min() < SMALLEST_SCALE else scale.max()
            return f"the scale {worst:.3g} of its {kind} is not a normal float16 number"
    for name in node.input[1:]:
        values = graph.constant(name)
        if values is not None and np.abs(values).max() > LARGEST_HALF:
            return f"its weight {np.abs(values).max():.3g} is above the largest float16 number"
    return ""


def _float_nodes(proto: onnx.ModelProto, graph: Graph, unfit: set[int]) -> set[int]:
    """Ids of the nodes that stay float32: before the first convolutions, behind the last ones, and unfit layers."""
    chosen = _preparation(proto, graph) | _decoding(proto, graph)
    for node in graph.nodes:
        if id(node) in unfit:
            chosen.add(id(node))
            pairs = [graph.made_by(name, "DequantizeLinear") for name in node.input[:2]]
            chosen.update(id(pair) for pair in pairs if pair is not None)
            quantize = None if pairs[0] is None else graph.made_by(pairs[0].input[0], "QuantizeLinear")
            chosen.update({id(quantize)} if quantize is not None else ())
    return chosen


def _preparation(proto: onnx.ModelProto, graph: Graph) -> set[int]:
    """Nodes that read nothing but the image: the cast and the division."""
    known = {value.name for value in proto.graph.input}
    chosen: set[int] = set()
    for node in graph.nodes:
        variable = [name for name in node.input if name and graph.constant(name) is None]
        if variable and known.issuperset(variable) and node.op_type not in (*QUANTIZERS, *CHANNEL_AXIS):
            known.update(node.output)
            chosen.add(id(node))
    return chosen


def _decoding(proto: onnx.ModelProto, graph: Graph) -> set[int]:
    """Nodes behind the last convolutions, without those at the front of them that only move data."""
    outputs = {value.name for value in proto.graph.output}
    wanted, behind = set(outputs), set()
    for node in reversed(graph.nodes):
        if wanted.intersection(node.output) and node.op_type not in CHANNEL_AXIS:
            behind.add(id(node))
            wanted.update(node.input)
    for node in graph.nodes:
        made_behind = any(id(graph.producer[name]) in behind for name in node.input if name in graph.producer)
        moves = node.op_type in MOVES_DATA and not made_behind and not outputs.intersection(node.output)
        if moves and any(graph.constant(name) is None for name in node.input):
            behind.discard(id(node))
    return behind


class _Typer:
    """The new graph as it grows: every node with its float inputs in the type it calculates in."""

    def __init__(self, proto: onnx.ModelProto, graph: Graph, float_nodes: set[int]) -> None:
        self._proto, self._graph, self._float_nodes = proto, graph, float_nodes
        self._nodes: list[onnx.NodeProto] = []
        self._constants: dict[str, onnx.TensorProto] = {}
        self._stored: dict[tuple[str, np.dtype[Any]], str] = {}
        self._types: dict[str, np.dtype[Any]] = {}  # of the float tensors that are computed
        self._float_tensors = _float_tensors(proto)
        self._cast_made: set[str] = set()
        self._integers: dict[str, str] = {}  # output of a weight's QuantizeLinear -> the constant that replaces it
        self.casts = self.subnormal = 0

    def add(self, node: onnx.NodeProto) -> None:
        """Append a node of the old graph, casts before it where its inputs are of another type."""
        if node.op_type == "Constant":
            return  # its value is stored where it is read
        if node.op_type == "QuantizeLinear" and self._graph.constant(node.input[0]) is not None:
            integers = _quantized_weight(self._graph, node)
            # Layers are named after their weight, so its integers take its name, unless it is quantized twice.
            name = node.output[0] if (node.input[0], integers.dtype) in self._stored else node.input[0]
            self._integers[node.output[0]] = self._store(name, integers)
            return
        wanted = self._wanted(node)
        copy = type(node).FromString(node.SerializeToString())
        for position, name in enumerate(node.input):
            copy.input[position] = self._input(name, wanted)
        _retarget_cast(copy, wanted)
        self._types.update(dict.fromkeys(self._float_tensors.intersection(node.output), wanted))
        self._nodes.append(copy)

    def finish(self) -> onnx.ModelProto:
        """The new graph; outputs keep their type."""
        import onnx

        for output in self._proto.graph.output:
            assert self._types.get(output.name, FLOAT) == FLOAT, "what calculates an output is never float16"
        converted = onnx.ModelProto()
        converted.CopyFrom(self._proto)
        del converted.graph.node[:], converted.graph.initializer[:], converted.graph.value_info[:]
        converted.graph.node.extend(self._nodes)
        converted.graph.initializer.extend(self._constants.values())
        return converted

    def _wanted(self, node: onnx.NodeProto) -> np.dtype[Any]:
        if id(node) in self._float_nodes:
            return FLOAT
        if node.op_type == "QuantizeLinear":  # reads what there is: a cast in front would only round twice
            return self._types.get(node.input[0], HALF)
        return HALF

    def _input(self, name: str, wanted: np.dtype[Any]) -> str:
        if not name or name in self._integers:
            return self._integers.get(name, name)
        value = self._graph.constant(name)
        if value is None:
            return self._variable(name, wanted)
        if value.dtype == FLOAT and wanted == HALF:
            value = self._rounded(name, value)
        return self._store(name, value)

    def _variable(self, name: str, wanted: np.dtype[Any]) -> str:
        from onnx import helper

        if self._types.get(name, wanted) == wanted:
            return name
        cast = f"{name}_{wanted.name}"
        if cast not in self._cast_made:
            kind = helper.np_dtype_to_tensor_dtype(wanted)
            self._nodes.append(helper.make_node("Cast", [name], [cast], f"{cast}_cast", to=kind))
            self._cast_made.add(cast)
            self.casts += 1
        return cast

    def _rounded(self, name: str, value: NDArray[np.float32]) -> NDArray[np.float16]:
        if value.size and np.abs(value).max() > LARGEST_HALF:
            raise ValueError(f"the constant {name} holds {np.abs(value).max():.3g}, which float16 cannot")
        if (name, HALF) not in self._stored:
            self.subnormal += int(((value != 0) & (np.abs(value) < SMALLEST_SCALE)).sum())
        return value.astype(HALF)

    def _store(self, name: str, value: NDArray[Any]) -> str:
        """Name under which a constant stands in this type: its own for the first type that is asked for."""
        from onnx import numpy_helper

        key = (name, value.dtype)
        if key not in self._stored:
            self._stored[key] = f"{name}_{value.dtype}" if name in self._constants else name
            self._constants[self._stored[key]] = numpy_helper.from_array(value, self._stored[key])
        return self._stored[key]


def _float_tensors(proto: onnx.ModelProto) -> set[str]:
    from onnx import TensorProto, shape_inference

    inferred = shape_inference.infer_shapes(proto).graph
    values: Iterable[onnx.ValueInfoProto] = [*inferred.value_info, *inferred.output]
    return {value.name for value in values if value.type.tensor_type.elem_type == TensorProto.FLOAT}


def _quantized_weight(graph: Graph, quantize: onnx.NodeProto) -> NDArray[np.int8]:
    """What QuantizeLinear makes of a constant, as ONNX defines it: round half to even, then saturate."""
    weight, scale = graph.constant(quantize.input[0]), graph.constant(quantize.input[1])
    assert weight is not None and scale is not None, "check_structure passes only constant weights and scales"
    axis = next((attribute.i for attribute in quantize.attribute if attribute.name == "axis"), 1)
    shape = [1] * weight.ndim
    shape[axis] = -1
    rounded = np.rint(weight / (scale.reshape(shape) if scale.size > 1 else scale))
    integers: NDArray[np.int8] = np.clip(rounded, QUANTIZED_MINIMUM, QUANTIZED_MAXIMUM).astype(np.int8)
    return integers


def _retarget_cast(node: onnx.NodeProto, wanted: np.dtype[Any]) -> None:
    """A cast to float32 among float16 nodes goes to float16."""
    from onnx import TensorProto

    if node.op_type == "Cast" and wanted == HALF:
        for attribute in node.attribute:
            if attribute.name == "to" and attribute.i == TensorProto.FLOAT:
                attribute.i = TensorProto.FLOAT16
