"""The exported file: equal to torch, described by its metadata, and checked for its structure."""

from __future__ import annotations

import copy
import hashlib
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from exported_detector import CLASS_NAMES, INPUT_SIZE, ExportedDetector, as_input, golden_network
from onnx import numpy_helper

from model.engines.agreement import compare_outputs
from model.engines.onnxruntime_engine import OnnxRuntimeEngine
from model.engines.torch_engine import TorchEngine
from model.export import export_onnx
from model.onnx_file import read_metadata
from model.onnx_structure import check_graph, check_structure
from model.preprocessing import Preprocessing
from model.quantization.quantize import precision_per_layer, quantized_layers


@pytest.fixture
def proto(detector: ExportedDetector) -> onnx.ModelProto:
    return onnx.load(detector.int8_onnx)


def expected_int8(detector: ExportedDetector) -> set[str]:
    return {name for name, entry in precision_per_layer(detector.quantized).items() if entry["precision"] == "int8"}


def test_float_file_equals_torch(detector: ExportedDetector) -> None:
    engine = OnnxRuntimeEngine(detector.float_onnx, threads=1)
    report = compare_outputs(TorchEngine(detector.floating), engine, detector.unseen_images)
    assert report.confident_anchors > 100
    assert report.box_error_max_px < 2e-3  # float32 noise: 1e-4 was measured, and S differs by 8e-4 from its golden
    assert report.score_error_all_max < 1e-5


def test_quantized_file_equals_simulation(detector: ExportedDetector) -> None:
    """Literal execution differs from torch only where a value lies on the edge between two integers."""
    engine = OnnxRuntimeEngine(detector.int8_onnx, threads=1, optimise=False)
    report = compare_outputs(TorchEngine(detector.quantized), engine, detector.unseen_images)
    assert report.box_error_mean_px < 0.3  # the project's limit; 0.05 was measured on these random weights
    assert report.score_error_mean < 0.003


def test_batch_size_is_free(detector: ExportedDetector) -> None:
    engine = OnnxRuntimeEngine(detector.int8_onnx, threads=1, optimise=False)
    together = engine.run(detector.images[:3])
    for index in range(3):
        alone = engine.run(detector.images[index : index + 1])
        np.testing.assert_allclose(alone[1][0], together[1][index], atol=1e-6)


def test_interface_of_the_file(proto: onnx.ModelProto) -> None:
    (images,) = proto.graph.input
    shape = [dim.dim_param or dim.dim_value for dim in images.type.tensor_type.shape.dim]
    assert (images.name, shape) == ("images", ["batch", 3, INPUT_SIZE, INPUT_SIZE])
    assert images.type.tensor_type.elem_type == onnx.TensorProto.UINT8
    anchors = sum((INPUT_SIZE // stride) ** 2 for stride in (8, 16, 32))
    outputs = {
        value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in proto.graph.output
    }
    assert outputs == {"boxes_xyxy": ["batch", anchors, 4], "scores": ["batch", anchors, len(CLASS_NAMES)]}
    assert [entry.version for entry in proto.opset_import] == [20]
    assert all(node.op_type != "NonMaxSuppression" for node in proto.graph.node)


def test_metadata_describes_the_file(detector: ExportedDetector) -> None:
    metadata = read_metadata(detector.int8_onnx)
    assert metadata["class_names"] == list(CLASS_NAMES)
    assert Preprocessing.from_json(metadata["preprocessing"]) == Preprocessing(INPUT_SIZE)
    assert metadata["precision"] == precision_per_layer(detector.quantized)
    assert metadata["variant"] == "pico"


def test_file_holds_no_paths_of_this_machine(detector: ExportedDetector) -> None:
    content = detector.int8_onnx.read_bytes()
    assert b".py" not in content and str(Path(__file__).parents[2]).encode() not in content


@pytest.mark.slow
def test_same_network_gives_the_same_bytes(detector: ExportedDetector, tmp_path: Path) -> None:
    again = tmp_path / "again.onnx"
    export_onnx(detector.quantized, again, preprocessing=Preprocessing(INPUT_SIZE), class_names=CLASS_NAMES)
    first, second = (hashlib.sha256(path.read_bytes()).hexdigest() for path in (detector.int8_onnx, again))
    assert first == second


def test_export_leaves_the_network_trainable(detector: ExportedDetector) -> None:
    assert detector.int8_onnx.exists()
    assert all(parameter.requires_grad for parameter in detector.quantized.parameters())
    assert all(layer.frozen_input_scale is None for layer in quantized_layers(detector.quantized).values())
    loss = detector.quantized(as_input(detector.images[:1]))[0][1].sum()
    assert torch.autograd.grad(loss, next(detector.quantized.parameters()))[0].isfinite().all()


def test_wrong_requests_are_refused(detector: ExportedDetector, golden: object, tmp_path: Path) -> None:
    preprocessing, path = Preprocessing(INPUT_SIZE), tmp_path / "x.onnx"
    with pytest.raises(ValueError, match="fuse"):
        export_onnx(golden_network(golden), path, preprocessing=preprocessing, class_names=CLASS_NAMES)
    with pytest.raises(ValueError, match="3 classes but 1"):
        export_onnx(detector.floating, path, preprocessing=preprocessing, class_names=["one"])
    assert not path.exists()


def test_metadata_of_a_foreign_file_is_refused(proto: onnx.ModelProto, tmp_path: Path) -> None:
    del proto.metadata_props[:]
    onnx.save(proto, tmp_path / "foreign.onnx")
    with pytest.raises(ValueError, match="nasline export"):
        read_metadata(tmp_path / "foreign.onnx")


def test_structure_of_the_exported_files(detector: ExportedDetector) -> None:
    report = check_structure(detector.int8_onnx, expected_int8(detector))
    assert set(report.quantized) == expected_int8(detector) and len(report.floating) == 8
    assert check_structure(detector.float_onnx, set()).quantized == ()


def test_structure_names_layers_of_unexpected_precision(detector: ExportedDetector) -> None:
    layer = "heads.head1.cls_pred"
    with pytest.raises(ValueError, match=rf"should be INT8 but are not: {re.escape(layer)}"):
        check_structure(detector.int8_onnx, expected_int8(detector) | {layer})
    stem = "backbone.stem.conv.rbr_reparam"
    with pytest.raises(ValueError, match=rf"should be float: {re.escape(stem)}"):
        check_structure(detector.int8_onnx, expected_int8(detector) - {stem})


def pair_of(proto: onnx.ModelProto, layer: str, position: int) -> tuple[onnx.NodeProto, onnx.NodeProto]:
    """QuantizeLinear and DequantizeLinear on the input (0) or weight (1) of a layer."""
    makers = {output: node for node in proto.graph.node for output in node.output}
    convolution = next(node for node in proto.graph.node if node.name == layer)
    dequantize = makers[convolution.input[position]]
    return makers[dequantize.input[0]], dequantize


def add_constant(proto: onnx.ModelProto, name: str, value: np.ndarray) -> str:
    proto.graph.initializer.append(numpy_helper.from_array(value, name))
    return name


STEM, UPSAMPLE = "backbone.stem.conv.rbr_reparam", "neck.neck1.upsample"


def wrong_axis(proto: onnx.ModelProto) -> None:
    for node in pair_of(proto, UPSAMPLE, 1):
        next(attribute for attribute in node.attribute if attribute.name == "axis").i = 0


def zero_point_off(proto: onnx.ModelProto) -> None:
    name = add_constant(proto, "three", np.array(3, np.int8))
    for node in pair_of(proto, STEM, 0):
        node.input[2] = name


def unsigned_activation(proto: onnx.ModelProto) -> None:
    name = add_constant(proto, "unsigned", np.array(0, np.uint8))
    for node in pair_of(proto, STEM, 0):
        node.input[2] = name


def float_weight(proto: onnx.ModelProto) -> None:
    quantize, _ = pair_of(proto, STEM, 1)
    next(node for node in proto.graph.node if node.name == STEM).input[1] = quantize.input[0]


def float_input(proto: onnx.ModelProto) -> None:
    quantize, _ = pair_of(proto, STEM, 0)
    next(node for node in proto.graph.node if node.name == STEM).input[0] = quantize.input[0]


def scale_in_graph(proto: onnx.ModelProto) -> None:
    quantize, dequantize = pair_of(proto, STEM, 0)
    node = onnx.helper.make_node("Abs", [quantize.input[1]], ["computed_scale"])
    proto.graph.node.insert(0, node)
    quantize.input[1] = dequantize.input[1] = "computed_scale"


def subnormal_scale(proto: onnx.ModelProto) -> None:
    name = add_constant(proto, "tiny", np.array(1e-6, np.float32))
    for node in pair_of(proto, STEM, 0):
        node.input[1] = name


def one_scale_for_all_channels(proto: onnx.ModelProto) -> None:
    name = add_constant(proto, "single", np.array([0.01], np.float32))
    for node in pair_of(proto, STEM, 1):
        node.input[1] = name


def quantized_addition(proto: onnx.ModelProto) -> None:
    _, dequantize = pair_of(proto, STEM, 0)
    proto.graph.node.append(onnx.helper.make_node("Relu", [dequantize.output[0]], ["stray"], "stray"))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (wrong_axis, f"{UPSAMPLE}: .* axis 0, expected axis 1"),
        (zero_point_off, f"{STEM}: the zero point is 3"),
        (unsigned_activation, f"{STEM}: quantized to uint8"),
        (float_weight, f"{STEM}: its weight is not quantized"),
        (float_input, f"{STEM}: its input is not quantized"),
        (scale_in_graph, f"{STEM}: a scale is computed in the graph"),
        (subnormal_scale, f"{STEM}: the scale 1e-06"),
        (one_scale_for_all_channels, f"{STEM}: its weight has scales of shape"),
        (quantized_addition, "read by .*Relu"),
    ],
)
def test_checker_rejects(
    proto: onnx.ModelProto, spoil: Callable[[onnx.ModelProto], None], message: str, tmp_path: Path
) -> None:
    check_graph(copy.deepcopy(proto))
    spoil(proto)
    onnx.save(proto, tmp_path / "spoiled.onnx")
    with pytest.raises(ValueError, match=message):
        check_structure(tmp_path / "spoiled.onnx")
