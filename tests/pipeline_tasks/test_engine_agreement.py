"""What `export` asserts of the INT8 file before it is published, as OpenVINO runs it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import model
import model.evaluation
from model.checkpoint import CheckpointMetadata
from model.detections import Detections
from model.engines.openvino_engine import OpenVINOEngine
from model.export import export_onnx
from model.preprocessing import Preprocessing
from model.quantization.quantize import QuantizationConfig, quantize
from pipeline_tasks import engine_agreement
from pipeline_tasks.data.coco import read_coco_folder
from pipeline_tasks.errors import DataError
from pipeline_tasks.params import Parameters
from pipeline_tasks.validation import ValidationLimits, validate

SIZE = 64
METADATA = CheckpointMetadata("pico", ("circle", "square"), Preprocessing(SIZE), step=0)


def context(inputs: dict[str, Path], **given: Any) -> Any:
    parameters = Parameters.model_validate({"start": {"threads": 1}, "export": given})
    return SimpleNamespace(parameters=parameters, inputs=inputs, dataset_roots=dict)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path, Any]:
    """A quantized network that is confident everywhere, its file, and pictures."""
    torch.manual_seed(0)
    network = model.build("pico", 2).eval()
    for name, parameter in network.named_parameters():
        if name.endswith("cls_pred.bias"):
            torch.nn.init.constant_(parameter, 1.0)
    images = np.random.default_rng(0).integers(0, 256, (2, 3, SIZE, SIZE), dtype=np.uint8)
    quantized = quantize(network.fused_copy(), [torch.from_numpy(images).float() / 255], QuantizationConfig())
    path = tmp_path_factory.mktemp("engine") / "model.onnx"
    export_onnx(quantized, path, preprocessing=METADATA.preprocessing, class_names=METADATA.class_names)
    return quantized, path, images


def test_boxes_are_compared_as_openvino_computes_them(
    exported: tuple[Any, Path, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    quantized, path, images = exported
    found = engine_agreement.require_agreement(context({}, map_images=0), path, quantized, METADATA, images)
    assert set(found) == {"openvino_box_error_mean_px"} and found["openvino_box_error_mean_px"] < 0.3
    run = OpenVINOEngine.run

    def shifted(engine: OpenVINOEngine, pixels: Any) -> Any:
        boxes_xyxy, scores = run(engine, pixels)
        return boxes_xyxy + 1, scores

    monkeypatch.setattr(OpenVINOEngine, "run", shifted)
    with pytest.raises(DataError, match=r"run by OpenVINO, differs .* by 1\.0.*maximum_box_error_pixels 0\.3"):
        engine_agreement.require_agreement(context({}, map_images=0), path, quantized, METADATA, images)


def test_a_file_that_openvino_cannot_run_is_told_and_published(
    exported: tuple[Any, Path, Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise ValueError("one quantized activation can be negative")

    monkeypatch.setattr(OpenVINOEngine, "from_file", refuse)
    quantized, path, images = exported
    assert engine_agreement.require_agreement(context({}), path, quantized, METADATA, images) == {}
    assert "can be negative" in caplog.text


@pytest.mark.parametrize(("lost", "refused"), [(0, False), (1, False), (20, True)])
def test_map_is_compared_beyond_chance(
    make_coco_folder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lost: int, refused: bool
) -> None:
    """Torch finds everything in 30 pictures; the engine misses the boxes of some. One of them may be chance."""
    folder = make_coco_folder(val=30).path
    raw = {"target": read_coco_folder(folder, "target")}
    validate(raw, {"target": folder}, ValidationLimits(), tmp_path / "tables", threads=1)
    truth = np.array([[4, 5, 14.5, 13, 0.9, 0], [5, 5, 15.5, 13, 0.9, 1]])
    order = {0: 0, 1: 1} if raw["target"].metadata.class_names[0] == "circle" else {0: 1, 1: 0}
    truth[:, 5] = [order[int(label)] for label in truth[:, 5]]

    def detect(predict: Any, images: Any, *_: object, **__: object) -> Detections:
        missed = lost if predict == "engine" else 0
        return Detections.from_rows([truth[:0] if row < missed else truth for row in range(len(images))])

    monkeypatch.setattr(model.evaluation, "detect", detect)
    monkeypatch.setattr(engine_agreement, "open_images", lambda _: None)
    arguments: Any = (context({"target": tmp_path / "tables/target"}), "model.onnx", SimpleNamespace(run="engine"))
    if refused:
        with pytest.raises(DataError, match=r"has -\d+.* points of mAP50-95 .* on 30 validation images"):
            engine_agreement._require_equal_map(*arguments, torch.nn.Identity(), METADATA)
    else:
        found = engine_agreement._require_equal_map(*arguments, torch.nn.Identity(), METADATA)
        assert (found["openvino_map_difference_points"] == 0) is (lost == 0)
