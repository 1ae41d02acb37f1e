"""The exported file as engines take it; what none of them can run is refused here, before a runtime sees it.

Runtimes answer a file that they do not understand with words of their own, at the first image, or end the process.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

from model.engines import INPUT_NAME, OUTPUT_NAMES
from model.onnx_file import load_onnx
from model.onnx_structure import Graph

if TYPE_CHECKING:
    import onnx

SUPPRESSED = "detection_boxes_xyxy"
"""An output that files with suppression inside have (``model.onnx_suppression``)."""


def load_detector(path: Path) -> onnx.ModelProto:
    """The graph of an exported detector; ValueError for another file, with the one to give instead."""
    proto = load_onnx(path)
    _check_input(proto, path)
    check_outputs([value.name for value in proto.graph.output], path)
    return proto


def check_outputs(names: Collection[str], path: Path) -> None:
    """Raise ValueError unless boxes and scores are among a network's outputs."""
    if set(OUTPUT_NAMES) <= set(names):
        return
    if SUPPRESSED in names:
        raise ValueError(
            f"{path} ends in non-maximum suppression, which is for other programs: this product's engines suppress "
            "outside the file; give model.onnx, which `nasline export` writes beside it"
        )
    raise ValueError(
        f"{path} has the outputs {', '.join(names) or 'none'} where a detector has {' and '.join(OUTPUT_NAMES)}; "
        "give a file that `nasline export` wrote"
    )


def refuse_quantized_half(proto: onnx.ModelProto, path: Path) -> None:
    """Raise ValueError for a quantized file in its float16 form, on which OpenVINO 2026.4 ends the process.

    The float twin's float16 form passes: OpenVINO runs it.
    """
    import numpy as np

    graph = Graph(proto)
    for node in graph.nodes:
        scale = graph.constant(node.input[1]) if node.op_type in ("QuantizeLinear", "DequantizeLinear") else None
        if scale is not None and scale.dtype == np.float16:
            raise ValueError(
                f"{path} is the float16 form that TensorRT is built from, which OpenVINO cannot run; give model.onnx, "
                "which `nasline export` writes beside it"
            )


def _check_input(proto: onnx.ModelProto, path: Path) -> None:
    from onnx import TensorProto

    for value in proto.graph.input[:1]:
        tensor = value.type.tensor_type
        sides = [axis.dim_value for axis in tensor.shape.dim][1:]  # 0 where the file leaves it free
        square = len(sides) == 3 and sides[0] == 3 and sides[1] == sides[2] > 0
        if value.name == INPUT_NAME and tensor.elem_type == TensorProto.UINT8 and square:
            return
    found = ", ".join(value.name for value in proto.graph.input) or "none"
    raise ValueError(
        f"{path} (inputs: {found}) does not take {INPUT_NAME} as uint8 (B, 3, S, S) of one size S; give a file that "
        "`nasline export` wrote"
    )
