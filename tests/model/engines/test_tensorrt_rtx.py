"""What NVIDIA's parser and builder say to our files, without a GPU: TensorRT-RTX, told to build for a T4 (SM 7.5).

RTX is not the runtime that serves: its parser and type rules are those of TensorRT, its kernels are not.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import tensorrt_rtx_bindings as rtx
import torch
from exported_detector import CLASS_NAMES, ExportedDetector, as_input, real_images
from onnx import numpy_helper

import model
from model.engines.tensorrt_build import build_plan, prepare
from model.export import export_onnx
from model.onnx_file import load_onnx
from model.onnx_structure import Graph, check_graph, check_structure, convolutions
from model.preprocessing import Preprocessing
from model.quantization.quantize import QuantizationConfig, precision_per_layer, quantize

STEM = "backbone.stem.conv.rbr_reparam"


@pytest.fixture
def proto(detector: ExportedDetector) -> onnx.ModelProto:
    return load_onnx(detector.int8_onnx)


def for_t4(config: Any) -> None:
    config.num_compute_capabilities = 1
    config.set_compute_capability(rtx.ComputeCapability.SM75, 0)


def build(proto: onnx.ModelProto, profile_batch: int | None = None) -> bytes:
    return build_plan(rtx, proto.SerializeToString(), profile_batch=profile_batch, configure=for_t4)


def parsed_layers(proto: onnx.ModelProto) -> list[str]:
    """Types of the layers that the parser makes of a file."""
    logger = rtx.Logger(rtx.Logger.ERROR)
    builder = rtx.Builder(logger)
    network = builder.create_network(1 << int(rtx.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    assert rtx.OnnxParser(network, logger).parse(proto.SerializeToString())
    return [network.get_layer(index).type.name for index in range(network.num_layers)]


def test_the_parser_sees_every_pair(proto: onnx.ModelProto) -> None:
    prepared, _ = prepare(proto)
    layers = parsed_layers(prepared)
    structure = check_graph(prepared)
    operators = [node.op_type for node in prepared.graph.node]
    assert layers.count("QUANTIZE") == operators.count("QuantizeLinear") > 0
    assert layers.count("DEQUANTIZE") == operators.count("DequantizeLinear")
    convolving = layers.count("CONVOLUTION") + layers.count("DECONVOLUTION")
    assert convolving == len(structure.quantized) + len(structure.floating) == 76


def test_int8_and_float16_files_build_for_a_t4(detector: ExportedDetector, proto: onnx.ModelProto) -> None:
    for source in (proto, load_onnx(detector.float_onnx)):
        assert len(build(prepare(source)[0])) > 100_000


def test_a_free_batch_needs_a_profile(proto: onnx.ModelProto) -> None:
    prepared, _ = prepare(proto, largest_batch=4)
    with pytest.raises(ValueError, match="no optimization profile has been defined"):
        build(prepared)
    assert len(build(prepared, profile_batch=4)) > 100_000


def zero_point_off(proto: onnx.ModelProto) -> None:
    pair = Graph(proto).made_by(convolutions(proto)[STEM].input[0], "DequantizeLinear")
    assert pair is not None
    quantize = Graph(proto).made_by(pair.input[0], "QuantizeLinear")
    proto.graph.initializer.append(numpy_helper.from_array(np.array(3, np.int8), "three"))
    for node in (pair, quantize):
        assert node is not None
        node.input[2] = "three"


def mixed_types(proto: onnx.ModelProto) -> None:
    """A float32 bias on a float16 convolution: a strongly typed network does not cast by itself."""
    node = convolutions(proto)[STEM]
    bias = next(tensor for tensor in proto.graph.initializer if tensor.name == node.input[2])
    bias.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(bias).astype(np.float32), bias.name))


def unknown_operator(proto: onnx.ModelProto) -> None:
    next(node for node in proto.graph.node if node.op_type == "Relu").op_type = "RectifyAll"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (zero_point_off, "shiftIsAllZeros"),
        (mixed_types, "(?i)type"),
        (unknown_operator, "Plugin not found"),
    ],
)
def test_wrong_files_are_refused(
    proto: onnx.ModelProto, spoil: Callable[[onnx.ModelProto], None], message: str
) -> None:
    prepared, _ = prepare(proto)
    spoil(prepared)
    with pytest.raises(ValueError, match=message):
        build(prepared)


def test_a_file_that_is_no_onnx_is_refused() -> None:
    with pytest.raises(ValueError, match=r"TensorRT does not take the file: .*Failed to parse"):
        build_plan(rtx, b"not a model", configure=for_t4)


@pytest.mark.slow
def test_s_from_network_to_plan_within_a_minute(shared: Path, tmp_path: Path) -> None:
    """YOLO-NAS-S at 640 pixels: export, float16 form, build; 10 s of processor time and 14 s in all were measured."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    network = model.build("s", len(CLASS_NAMES)).eval().fuse()
    calibration = torch.nn.functional.interpolate(as_input(real_images(shared, 16)[:1]), size=(640, 640))
    quantized = quantize(network, [calibration], QuantizationConfig())
    start = time.process_time()
    path = tmp_path / "model.onnx"
    export_onnx(quantized, path, preprocessing=Preprocessing(640), class_names=CLASS_NAMES)
    int8 = {name for name, entry in precision_per_layer(quantized).items() if entry["precision"] == "int8"}
    check_structure(path, int8)
    prepared, report = prepare(load_onnx(path))
    assert report.float_layers == {} and set(check_graph(prepared).quantized) == int8
    assert len(build(prepared)) > 10_000_000
    assert time.process_time() - start < 60
