"""The rewrite changes labels, never numbers, and only where no number can be negative."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
from exported_detector import ExportedDetector
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from model.engines.unsigned_rewrite import non_negative_tensors, rewrite_unsigned

SCALE = 0.01
LARGEST = SCALE * 127


def run(proto: onnx.ModelProto, values: NDArray[np.generic], name: str) -> list[NDArray[np.float32]]:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, {name: values})


def graph(nodes: list[onnx.NodeProto], outputs: list[str], **constants: NDArray[np.generic]) -> onnx.ModelProto:
    """Float input ``x`` (1, 1, 4, 4) and the nodes; ``scale`` and ``zero`` are there to quantize with."""
    constants = {"scale": np.array(SCALE, np.float32), "zero": np.array(0, np.int8), **constants}
    shape = [1, 1, 4, 4]
    proto = helper.make_graph(
        nodes,
        "test",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    return helper.make_model(proto, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def rounded(source: str, output: str) -> list[onnx.NodeProto]:
    return [
        helper.make_node("QuantizeLinear", [source, "scale", "zero"], [output + "_q"], output + "_q"),
        helper.make_node("DequantizeLinear", [output + "_q", "scale", "zero"], [output], output + "_dq"),
    ]


def zero_points(proto: onnx.ModelProto) -> dict[str, np.dtype[np.generic]]:
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}
    return {n.name: constants[n.input[2]].dtype for n in proto.graph.node if n.op_type == "QuantizeLinear"}


def values_around_the_limit() -> NDArray[np.float32]:
    return np.linspace(-2 * LARGEST, 3 * LARGEST, 16, dtype=np.float32).reshape(1, 1, 4, 4)


def test_values_above_the_calibrated_maximum_still_clip() -> None:
    proto = graph([helper.make_node("Relu", ["x"], ["r"]), *rounded("r", "y")], ["y"])
    rewritten, report = rewrite_unsigned(proto)
    assert (report.unsigned, report.signed) == (1, ())
    assert zero_points(rewritten) == {"y_q": np.uint8}
    (before,), (after,) = (run(p, values_around_the_limit(), "x") for p in (proto, rewritten))
    assert before.max() == pytest.approx(LARGEST)
    np.testing.assert_array_equal(after, before)


def test_a_signed_activation_is_left_and_reported() -> None:
    rewritten, report = rewrite_unsigned(graph(rounded("x", "y"), ["y"]))
    assert (report.unsigned, report.signed) == (0, ("x",))
    assert zero_points(rewritten) == {"y_q": np.int8}


def test_the_given_graph_stays_as_it_is() -> None:
    proto = graph([helper.make_node("Relu", ["x"], ["r"]), *rounded("r", "y")], ["y"])
    before = proto.SerializeToString(deterministic=True)
    rewrite_unsigned(proto)
    assert proto.SerializeToString(deterministic=True) == before


def test_bound_moves_in_front_of_concatenation_and_pooling() -> None:
    """There the runtime fuses it into the convolution; the numbers are the same."""
    nodes = [
        helper.make_node("Relu", ["x"], ["r"]),
        helper.make_node("MaxPool", ["r"], ["p"], kernel_shape=[3, 3], pads=[1, 1, 1, 1]),
        helper.make_node("Concat", ["r", "p"], ["c"], axis=1),
        *rounded("c", "y"),
    ]
    proto = graph(nodes, ["y"])
    rewritten, _ = rewrite_unsigned(proto)
    kinds = [node.op_type for node in rewritten.graph.node]
    assert kinds.count("Clip") == 1 and kinds.index("Clip") == 1
    (before,), (after,) = (run(p, values_around_the_limit(), "x") for p in (proto, rewritten))
    np.testing.assert_array_equal(after, before)


def test_bound_does_not_reach_a_reader_that_wants_all_values() -> None:
    nodes = [
        helper.make_node("Relu", ["x"], ["r"]),
        helper.make_node("Concat", ["r", "r"], ["c"], axis=1),
        *rounded("c", "y"),
        helper.make_node("Neg", ["c"], ["all"]),
        helper.make_node("Neg", ["r"], ["source"]),
    ]
    proto = graph(nodes, ["y", "all", "source"])
    rewritten, report = rewrite_unsigned(proto)
    assert report.unsigned == 1
    for before, after in zip(*(run(p, values_around_the_limit(), "x") for p in (proto, rewritten)), strict=True):
        np.testing.assert_array_equal(after, before)


@pytest.mark.parametrize(("alpha", "known"), [(0.5, True), (0.0, True), (-0.5, False)])
def test_shortcut_scalar_decides_the_sign(alpha: float, known: bool) -> None:
    nodes = [
        helper.make_node("Relu", ["x"], ["r"]),
        helper.make_node("Mul", ["alpha", "r"], ["m"]),
        helper.make_node("Add", ["m", "r"], ["s"]),
    ]
    proto = graph(nodes, ["s"], alpha=np.array([alpha], np.float32))
    assert ("s" in non_negative_tensors(proto)) is known


@pytest.mark.parametrize("kind", ["Neg", "Conv", "Sub", "Tanh"])
def test_operators_that_can_give_negative_numbers(kind: str) -> None:
    inputs = ["r", "r"] if kind in ("Conv", "Sub") else ["r"]
    nodes = [helper.make_node("Relu", ["x"], ["r"]), helper.make_node(kind, inputs, ["y"])]
    assert "y" not in non_negative_tensors(graph(nodes, ["y"]))


def test_a_byte_image_is_never_negative(detector: ExportedDetector) -> None:
    proto = onnx.load(detector.int8_onnx)
    known = non_negative_tensors(proto)
    stem = next(node for node in proto.graph.node if node.op_type == "Conv")
    assert stem.input[0] in known and "scores" in known and "boxes_xyxy" not in known


def test_whole_detector_computes_the_same_bits(detector: ExportedDetector) -> None:
    """Also on noise, which drives activations beyond what the calibration images reached."""
    proto = onnx.load(detector.int8_onnx)
    rewritten, report = rewrite_unsigned(proto)
    onnx.checker.check_model(rewritten, full_check=True)
    assert report.signed == () and set(zero_points(rewritten).values()) == {np.dtype(np.uint8), np.dtype(np.int8)}
    noise = np.random.default_rng(0).integers(0, 256, detector.images[:2].shape, dtype=np.uint8)
    for images in (detector.unseen_images[:2], noise):
        for before, after in zip(*(run(p, images, "images") for p in (proto, rewritten)), strict=True):
            np.testing.assert_array_equal(after, before)
