"""A file with some layers left in float is the file that an export of such a network gives."""

from __future__ import annotations

import copy

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from exported_detector import ExportedDetector, as_input

from model.onnx_float_layers import leave_in_float
from model.onnx_structure import check_graph, convolutions
from model.quantization.quantize import float_layers, freeze, quantized_layers, set_float_layers

LAYERS = ("backbone.stem.conv.rbr_reparam", "neck.neck1.upsample", "heads.head2.stem.seq.conv")


@pytest.fixture(scope="module")
def proto(detector: ExportedDetector) -> onnx.ModelProto:
    return onnx.load(detector.int8_onnx)


def run(proto: onnx.ModelProto, images: np.ndarray) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(["boxes_xyxy", "scores"], {"images": images})


def test_exactly_the_named_layers_lose_their_pairs(detector: ExportedDetector, proto: onnx.ModelProto) -> None:
    before = proto.SerializeToString(deterministic=True)
    changed = leave_in_float(proto, LAYERS)
    onnx.checker.check_model(changed, full_check=True)
    assert set(check_graph(changed).floating) == {*LAYERS, *float_layers(detector.quantized)}
    assert proto.SerializeToString(deterministic=True) == before


def test_it_computes_what_the_network_with_these_layers_in_float_computes(
    detector: ExportedDetector, proto: onnx.ModelProto
) -> None:
    network = copy.deepcopy(detector.quantized)
    others = set(quantized_layers(network)) - {*LAYERS, *float_layers(network)}
    set_float_layers(network, {**float_layers(network), **dict.fromkeys(others, "test")})
    freeze(network)
    images = detector.unseen_images[:2]
    with torch.no_grad():
        (_, expected), _ = network(as_input(images))
    _, scores = run(leave_in_float(proto, others), images)
    _, without_any = run(leave_in_float(proto, convolutions(proto)), images)
    # rounding flips here and there, where float32 sums differ in their last digit; what the three layers round is more
    assert np.abs(scores - expected.numpy()).mean() < 0.02 * np.abs(without_any - expected.numpy()).mean()


def test_all_layers_in_float_give_the_float_file(detector: ExportedDetector, proto: onnx.ModelProto) -> None:
    changed = leave_in_float(proto, convolutions(proto))
    assert not any("Linear" in node.op_type for node in changed.graph.node)
    images = detector.unseen_images[:1]
    for found, expected in zip(run(changed, images), run(onnx.load(detector.float_onnx), images), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_unknown_layers_are_refused(proto: onnx.ModelProto) -> None:
    with pytest.raises(ValueError, match="no layer nothing"):
        leave_in_float(proto, ["nothing"])


def test_layers_that_are_float_already_stay_so(detector: ExportedDetector, proto: onnx.ModelProto) -> None:
    changed = leave_in_float(proto, float_layers(detector.quantized))
    assert len(changed.graph.node) == len(proto.graph.node)
    assert set(quantized_layers(detector.quantized)) == set(convolutions(changed))
