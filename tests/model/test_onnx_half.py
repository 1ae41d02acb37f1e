"""The float16 form of an exported file: typed as meant, near the original in numbers, taken by NVIDIA's parser."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from exported_detector import ExportedDetector
from onnx import TensorProto, numpy_helper

from model.engines.agreement import compare_outputs
from model.engines.onnxruntime_engine import OnnxRuntimeEngine
from model.onnx_file import read_metadata, write_onnx
from model.onnx_half import convert_to_half, export_half
from model.onnx_structure import Graph, check_graph, check_structure, convolutions

STEM = "backbone.stem.conv.rbr_reparam"
SHARED = ("heads.head1.cls_convs.0.seq.conv", "heads.head1.reg_convs.0.seq.conv")  # read one quantized tensor
DECODING = {"Softmax", "ReduceSum", "Mul", "Split", "Sub", "Add", "Sigmoid"}


@pytest.fixture(scope="module")
def half_files(detector: ExportedDetector, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("half")
    sources = {"int8": detector.int8_onnx, "float": detector.float_onnx}
    for name, source in sources.items():
        export_half(source, folder / f"{name}.onnx")
    return {name: folder / f"{name}.onnx" for name in sources}


@pytest.fixture
def proto(detector: ExportedDetector) -> onnx.ModelProto:
    return onnx.load(detector.int8_onnx)


def types_of(proto: onnx.ModelProto) -> dict[str, int]:
    inferred = onnx.shape_inference.infer_shapes(proto, strict_mode=True).graph
    values = [*inferred.value_info, *inferred.input, *inferred.output]
    types = {value.name: value.type.tensor_type.elem_type for value in values}
    return types | {tensor.name: tensor.data_type for tensor in proto.graph.initializer}


@pytest.mark.parametrize("kind", ["int8", "float"])
def test_outputs_are_near_those_of_the_float32_file(
    detector: ExportedDetector, half_files: dict[str, Path], kind: str
) -> None:
    source = detector.int8_onnx if kind == "int8" else detector.float_onnx
    engines = [OnnxRuntimeEngine(path, threads=1, optimise=False) for path in (source, half_files[kind])]
    report = compare_outputs(engines[0], engines[1], detector.unseen_images)
    assert report.confident_anchors > 100
    # 11 bits instead of 24, and with INT8 a value near the edge of two integers may fall on the other side
    limit_px, limit_score = (0.3, 0.005) if kind == "int8" else (0.02, 0.001)
    assert report.box_error_mean_px < limit_px
    assert report.score_error_mean < limit_score


def test_what_is_float16_and_what_is_not(half_files: dict[str, Path]) -> None:
    proto = onnx.load(half_files["int8"])
    types, graph = types_of(proto), Graph(proto)
    decoding_begins = max(index for index, node in enumerate(graph.nodes) if node.op_type == "Conv")
    for index, node in enumerate(graph.nodes):
        made = types[node.output[0]]
        if index > decoding_begins and node.op_type in DECODING:
            assert made == TensorProto.FLOAT, node.name
        elif node.op_type in ("Conv", "ConvTranspose", "Relu", "MaxPool", "DequantizeLinear"):
            assert made == TensorProto.FLOAT16, node.name
        elif node.op_type == "QuantizeLinear":
            assert types[node.input[0]] == types[node.input[1]] and made == TensorProto.INT8
    division = next(node for node in graph.nodes if node.op_type == "Div")
    assert types[division.output[0]] == TensorProto.FLOAT
    interface = {value.name: types[value.name] for value in [*proto.graph.input, *proto.graph.output]}
    assert interface == {"images": TensorProto.UINT8, "boxes_xyxy": TensorProto.FLOAT, "scores": TensorProto.FLOAT}


def test_only_the_logits_are_cast_and_late(half_files: dict[str, Path]) -> None:
    """Reshaping and concatenating move half the bytes; the casts stand where the arithmetic begins."""
    graph = Graph(onnx.load(half_files["int8"]))
    casts = [node for node in graph.nodes if node.op_type == "Cast" and node.name.endswith("float32_cast")]
    readers = sorted(graph.consumers[node.output[0]][0].op_type for node in casts)
    assert readers == ["Sigmoid", "Softmax"]


def test_structure_names_and_metadata_are_kept(detector: ExportedDetector, half_files: dict[str, Path]) -> None:
    before, after = check_structure(detector.int8_onnx), check_structure(half_files["int8"])
    assert (after.quantized, after.floating) == (before.quantized, before.floating)
    assert read_metadata(half_files["int8"]) == read_metadata(detector.int8_onnx)
    assert half_files["int8"].stat().st_size < 0.5 * detector.int8_onnx.stat().st_size


def test_weights_are_the_integers_of_the_float32_file(proto: onnx.ModelProto) -> None:
    converted, report = convert_to_half(proto)
    assert report.float_layers == {} and len(report.half_layers) == 76 and report.casts == 2
    old, new = Graph(proto), Graph(converted)
    for layer, node in convolutions(converted).items():
        pair = new.made_by(node.input[1], "DequantizeLinear")
        if pair is None:
            continue
        original = old.made_by(convolutions(proto)[layer].input[1], "DequantizeLinear")
        assert original is not None
        quantize = old.made_by(original.input[0], "QuantizeLinear")
        assert quantize is not None
        weight, scale = old.constant(quantize.input[0]), old.constant(quantize.input[1])
        axis = next(attribute.i for attribute in quantize.attribute if attribute.name == "axis")
        assert weight is not None and scale is not None
        integers, half_scale = new.constant(pair.input[0]), new.constant(pair.input[1])
        assert integers is not None and half_scale is not None
        assert integers.dtype == np.int8 and half_scale.dtype == np.float16
        shape = [-1 if place == axis else 1 for place in range(4)]
        assert np.array_equal(integers, np.clip(np.round(weight / scale.reshape(shape)), -128, 127))


def test_same_file_gives_the_same_bytes_and_a_second_conversion_changes_nothing(
    detector: ExportedDetector, half_files: dict[str, Path], tmp_path: Path
) -> None:
    export_half(detector.int8_onnx, tmp_path / "again.onnx")
    export_half(half_files["int8"], tmp_path / "twice.onnx")
    first, again, twice = (path.read_bytes() for path in (half_files["int8"], *sorted(tmp_path.iterdir())))
    assert first == again == twice


@pytest.mark.parametrize("position", [0, 1])
def test_a_layer_whose_scale_is_too_small_stays_float32(
    detector: ExportedDetector, proto: onnx.ModelProto, tmp_path: Path, position: int
) -> None:
    graph, layers = Graph(proto), convolutions(proto)
    pair = graph.made_by(layers[SHARED[0]].input[position], "DequantizeLinear")
    assert pair is not None
    quantize = graph.made_by(pair.input[0], "QuantizeLinear")
    scale = graph.constant(pair.input[1])
    assert scale is not None and quantize is not None
    tiny = np.full_like(scale, 1e-6)
    proto.graph.initializer.append(numpy_helper.from_array(tiny, "tiny"))
    pair.input[1] = quantize.input[1] = "tiny"
    converted, report = convert_to_half(proto)
    reasons = {SHARED[0]: rf"scale 1e-06 of its {'weight' if position else 'input'}"}
    assert set(report.float_layers) == set(SHARED)
    assert reasons[SHARED[0]] in report.float_layers[SHARED[0]]
    write_onnx(converted, tmp_path / "half.onnx")
    types = types_of(converted)
    for layer in SHARED:
        node = convolutions(converted)[layer]
        assert {types[name] for name in (*node.input[:2], *node.output)} == {TensorProto.FLOAT}
    assert types[convolutions(converted)[STEM].output[0]] == TensorProto.FLOAT16
    onnx.save(proto, tmp_path / "float.onnx")
    engines = [OnnxRuntimeEngine(tmp_path / f"{name}.onnx", threads=1, optimise=False) for name in ("float", "half")]
    assert compare_outputs(engines[0], engines[1], detector.unseen_images).box_error_mean_px < 0.3


def test_a_weight_that_float16_cannot_hold_stays_float32(proto: onnx.ModelProto) -> None:
    name = convolutions(proto)["heads.head1.cls_pred"].input[1]
    weight = next(tensor for tensor in proto.graph.initializer if tensor.name == name)
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * np.float32(1e9), name))
    converted, report = convert_to_half(proto)
    assert list(report.float_layers) == ["heads.head1.cls_pred"]
    assert "above the largest float16 number" in report.float_layers["heads.head1.cls_pred"]
    onnx.checker.check_model(converted, full_check=True)
    scalar = next(tensor for tensor in proto.graph.initializer if "alpha" in tensor.name)
    scalar.CopyFrom(numpy_helper.from_array(np.array([1e6], np.float32), scalar.name))
    with pytest.raises(ValueError, match=r"alpha.* holds 1e\+06, which float16 cannot"):
        convert_to_half(proto)


def test_subnormal_constants_are_counted(proto: onnx.ModelProto) -> None:
    _, before = convert_to_half(proto)
    bias = next(tensor for tensor in proto.graph.initializer if tensor.name.endswith("reg_pred.bias"))
    values = numpy_helper.to_array(bias).copy()
    values[:5] = 1e-5
    bias.CopyFrom(numpy_helper.from_array(values, bias.name))
    _, after = convert_to_half(proto)
    assert after.subnormal_constants == before.subnormal_constants + 5


def test_a_fixed_batch(detector: ExportedDetector, half_files: dict[str, Path], tmp_path: Path) -> None:
    export_half(detector.int8_onnx, tmp_path / "two.onnx", batch=2)
    fixed, free = (OnnxRuntimeEngine(path, 1, optimise=False) for path in (tmp_path / "two.onnx", half_files["int8"]))
    for ours, theirs in zip(fixed.run(detector.images[:3]), free.run(detector.images[:3]), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-4)
    check_graph(onnx.load(tmp_path / "two.onnx"))
