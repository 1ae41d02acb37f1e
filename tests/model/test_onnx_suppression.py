"""Files with suppression inside find what the suppression outside finds, in every runtime here."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import openvino
import pytest
import tensorrt_rtx_bindings as rtx
from exported_detector import ExportedDetector

from model.engines.tensorrt_build import build_plan, prepare
from model.engines.unsigned_rewrite import rewrite_unsigned
from model.onnx_file import fix_batch, load_onnx, read_metadata, write_onnx
from model.onnx_structure import check_structure
from model.onnx_suppression import (
    ONNX_OUTPUTS,
    STATIC_OUTPUTS,
    SuppressionKind,
    add_suppression,
    check_suppression,
    differing_images,
    expected_detections,
    read_detections,
)
from model.suppression import SuppressionConfig

CONFIG = SuppressionConfig(iou_threshold=0.5, candidates=400, max_detections=60, sweeps=10)
Make = Callable[..., onnx.ModelProto]


@pytest.fixture(scope="module")
def static(detector: ExportedDetector) -> onnx.ModelProto:
    """Made once: the block is traced for seconds."""
    return add_suppression(load_onnx(detector.int8_onnx), "static", CONFIG, keep_raw_outputs=True)


def without_raw_outputs(proto: onnx.ModelProto) -> onnx.ModelProto:
    ending = onnx.ModelProto()
    ending.CopyFrom(proto)
    kept = [value for value in proto.graph.output if value.name.startswith("detection_")]
    del ending.graph.output[:]
    ending.graph.output.extend(kept)
    return ending


def test_static_suppression_equals_that_outside(detector: ExportedDetector, static: onnx.ModelProto) -> None:
    report = check_suppression(static, "static", CONFIG, detector.images)
    assert report.differing == () and report.detections > 100
    assert check_suppression(fix_batch(static, 3), "static", CONFIG, detector.images).differing == ()


@pytest.mark.parametrize("multi_label", [True, False])
@pytest.mark.parametrize("most", [300, 5])
def test_the_operator_equals_suppression_outside(detector: ExportedDetector, multi_label: bool, most: int) -> None:
    config = SuppressionConfig(iou_threshold=0.5, multi_label=multi_label, max_detections=most)
    proto = add_suppression(load_onnx(detector.int8_onnx), "onnx", config, keep_raw_outputs=True)
    report = check_suppression(proto, "onnx", config, detector.images)
    assert report.differing == () and report.detections > 100


def test_a_difference_is_noticed(detector: ExportedDetector, static: onnx.ModelProto) -> None:
    other = SuppressionConfig(iou_threshold=0.6, candidates=400, max_detections=60)
    assert check_suppression(static, "static", other, detector.images).differing != ()


def test_openvino_runs_static_suppression(detector: ExportedDetector, static: onnx.ModelProto) -> None:
    rewritten, _ = rewrite_unsigned(fix_batch(static, 1))
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    network = openvino.Core().read_model(rewritten.SerializeToString())
    compiled = openvino.Core().compile_model(network, "CPU", settings)
    for image in detector.images:
        answer = compiled(image[None])
        outputs = {output.get_any_name(): answer[output] for output in compiled.outputs}
        expected = expected_detections(outputs["boxes_xyxy"], outputs["scores"], "static", CONFIG)
        assert len(expected[0]) and differing_images(read_detections(outputs, "static", 1), expected) == ()


def test_the_file_it_is_made_from_stays(detector: ExportedDetector) -> None:
    before = load_onnx(detector.int8_onnx)
    given = load_onnx(detector.int8_onnx)
    add_suppression(given, "onnx", CONFIG)
    assert given == before


@pytest.mark.parametrize("kind", ["static", "onnx"])
def test_the_file(detector: ExportedDetector, static: onnx.ModelProto, tmp_path: Path, kind: SuppressionKind) -> None:
    source = load_onnx(detector.int8_onnx)
    proto = without_raw_outputs(static) if kind == "static" else add_suppression(source, kind, CONFIG)
    assert tuple(value.name for value in proto.graph.output) == (STATIC_OUTPUTS if kind == "static" else ONNX_OUTPUTS)
    write_onnx(proto, tmp_path / "model_with_nms.onnx")
    assert read_metadata(tmp_path / "model_with_nms.onnx") == read_metadata(detector.int8_onnx)
    assert check_structure(tmp_path / "model_with_nms.onnx").quantized == check_structure(detector.int8_onnx).quantized
    content = (tmp_path / "model_with_nms.onnx").read_bytes()
    assert b".py" not in content and str(Path(__file__).parents[2]).encode() not in content
    with pytest.raises(ValueError, match="suppression needs a graph that ends in boxes_xyxy and scores"):
        add_suppression(proto, kind, CONFIG)


def test_static_suppression_builds_for_a_t4_in_float32(static: onnx.ModelProto) -> None:
    """Boxes of hundreds of pixels keep their 24 bits; the parser takes fixed shapes without a profile."""

    def for_t4(config: rtx.IBuilderConfig) -> None:
        config.num_compute_capabilities = 1
        config.set_compute_capability(rtx.ComputeCapability.SM75, 0)

    prepared, report = prepare(without_raw_outputs(static))
    assert report.casts == 2
    assert len(build_plan(rtx, prepared.SerializeToString(), configure=for_t4)) > 100_000


def test_detections_of_equal_score_have_no_order() -> None:
    rows = np.array([[0, 0, 1, 1, 0.5, 0], [2, 2, 3, 3, 0.5, 1]], np.float32)
    assert differing_images([rows, rows], [rows[::-1], rows[:1]]) == (1,)
