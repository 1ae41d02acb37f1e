"""The step `export` with everything it writes on request, and the gate's way to a TensorRT engine."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import tensorrt_doubles
import torch
from pydantic import ValidationError

import model
from model.checkpoint import CheckpointMetadata, save_checkpoint
from model.engines.onnxruntime_engine import OnnxRuntimeEngine
from model.onnx_structure import check_structure
from model.preprocessing import Preprocessing
from model.quantization.quantize import QuantizationConfig, quantize
from model.quantization.storage import save_quantized
from pipeline_tasks import export
from pipeline_tasks.errors import ConfigurationError, DataError
from pipeline_tasks.export_parameters import ExportParameters
from pipeline_tasks.gate import build_engine
from pipeline_tasks.params import GateParameters, Parameters

SIZE = 96


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (4, 3, SIZE, SIZE), dtype=np.uint8)


@pytest.fixture(scope="module")
def make_context(images: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """A step's context with a network that finds something everywhere."""
    folder = tmp_path_factory.mktemp("inputs")
    torch.manual_seed(0)
    network = model.build("pico", 3).eval()
    for name, parameter in network.named_parameters():
        if name.endswith("cls_pred.bias"):
            torch.nn.init.uniform_(parameter, -1.0, 1.0)
        if name.endswith("cls_pred.weight"):
            torch.nn.init.normal_(parameter, std=2.0)
    metadata = CheckpointMetadata("pico", ("a", "b", "c"), Preprocessing(SIZE), step=0)
    save_checkpoint(folder / "student", network, metadata)
    batch = torch.from_numpy(images).float() / 255
    save_quantized(folder / "quantized", quantize(network.fused_copy(), [batch], QuantizationConfig()), metadata)

    def make(output: Path, **given: Any) -> Any:
        output.mkdir(parents=True)
        inputs = {"student": folder / "student", "quantized": folder / "quantized"}
        parameters = Parameters.model_validate({"start": {"threads": 1}, "export": given})
        return SimpleNamespace(parameters=parameters, inputs=inputs, input_digests={}, output=output)

    return make


@pytest.mark.slow
def test_everything_on_request(
    make_context: Callable[..., Any], images: np.ndarray, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(export, "_comparison_images", lambda *_: images)
    asked = {"map_images": 0, "half": True, "nms": "static", "batch": 2, "nms_iou_threshold": 0.3, "nms_sweeps": 30}
    summary = export.export(make_context(tmp_path / "out", **asked))
    engine = tmp_path / "out" / "engine"
    assert {file.name for file in engine.iterdir()} == {
        "model.onnx", "model.float.onnx", "model.half.onnx", "model.float.half.onnx", "model_with_nms.onnx",
        "engine.json",
    }  # fmt: skip
    for file in engine.glob("*.onnx"):
        assert onnx.load(file).graph.input[0].type.tensor_type.shape.dim[0].dim_value == 2, file.name
    assert check_structure(engine / "model.half.onnx").quantized == check_structure(engine / "model.onnx").quantized
    assert {value.name for value in onnx.load(engine / "model.onnx").graph.output} == {"boxes_xyxy", "scores"}
    assert summary["nms_detections"] > 50
    assert 0 < summary["float_half_box_error_mean_px"] < 0.3
    assert OnnxRuntimeEngine(engine / "model.onnx", 1).run(images[:3])[0].shape == (3, 189, 4)
    few_sweeps = ExportParameters(nms="static", nms_iou_threshold=0.3, nms_score_threshold=0.01, nms_sweeps=1)
    with pytest.raises(
        DataError, match=r"other detections than the suppression outside on \d of 4 .*nms_sweeps \(now 1\)"
    ):
        export._write_suppression(few_sweeps, engine, images)
    with pytest.raises(DataError, match=r"model\.half\.onnx differs from model\.onnx .*maximum_box_error_pixels 1e-09"):
        export._write_half(ExportParameters(maximum_box_error_pixels=1e-9), engine, images)
    tensorrt_doubles.install(monkeypatch, tmp_path / "gpu")
    built = build_engine(engine / "model.onnx", tmp_path / "target", GateParameters(target="gpu"))
    assert (built.name, built.precision) == ("tensorrt", "int8")
    assert (tmp_path / "target" / "model.plan").is_file()


def test_nothing_more_without_a_request() -> None:
    given = ExportParameters()
    assert (given.nms, given.half, given.batch) == ("outside", False, None)


@pytest.mark.parametrize("wrong", [{"nms": "inside"}, {"batch": 0}, {"nms_candidates": 5000}, {"nms_iou_threshold": 2}])
def test_wrong_values_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        ExportParameters(**wrong)


def test_without_tensorrt_the_gate_says_what_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(ConfigurationError, match=r"gate\.target is gpu, but TensorRT cannot be imported") as caught:
        build_engine(tmp_path / "model.onnx", tmp_path / "out", GateParameters(target="gpu"))
    assert caught.value.exit_code == 78
    assert not (tmp_path / "out").exists()


def test_without_a_gpu_the_gate_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tensorrt_doubles.install(monkeypatch, tmp_path)
    tensorrt_doubles.install_cuda(monkeypatch, tensorrt_doubles.CudaDouble(devices=0))
    with pytest.raises(
        ConfigurationError, match=r"no CUDA device can be used .*run this on a machine with an NVIDIA GPU"
    ):
        build_engine(tmp_path / "model.onnx", tmp_path / "out", GateParameters(target="gpu"))
