"""What no engine can run is refused in one sentence, before a runtime sees it; a fixed batch is told by each engine."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import openvino
import pytest
import tensorrt_doubles
from exported_detector import CLASS_NAMES, INPUT_SIZE, ExportedDetector

from model.engines import Runtime, load_engine
from model.engines.detector_file import check_outputs
from model.engines.latency import measure_latency
from model.engines.openvino_engine import build_openvino
from model.engines.torch_engine import TorchEngine
from model.onnx_file import fix_batch, load_onnx, write_onnx
from model.onnx_half import export_half
from model.onnx_suppression import STATIC_OUTPUTS, add_suppression
from model.suppression import SuppressionConfig

CPU_RUNTIMES: tuple[Runtime, ...] = ("openvino", "onnxruntime")


@pytest.fixture(scope="module")
def half(detector: ExportedDetector, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("half")
    export_half(detector.int8_onnx, folder / "model.half.onnx")
    export_half(detector.float_onnx, folder / "model.float.half.onnx")
    return folder


def test_the_float16_form_is_refused_before_openvino_dies_of_it(half: Path, tmp_path: Path) -> None:
    sentence = r"model\.half\.onnx is the float16 form that TensorRT is built from, .* give model\.onnx"
    with pytest.raises(ValueError, match=sentence):
        load_engine(half / "model.half.onnx", "openvino", threads=1)
    with pytest.raises(ValueError, match=sentence):
        build_openvino(half / "model.half.onnx", tmp_path)


def test_float16_forms_that_run_are_not_refused(detector: ExportedDetector, half: Path) -> None:
    for name, runtime in (("model.half.onnx", "onnxruntime"), ("model.float.half.onnx", "openvino")):
        _, scores = load_engine(half / name, runtime, threads=1).run(detector.images[:1])  # type: ignore[arg-type]
        assert scores.shape[2] == len(CLASS_NAMES)


def test_suppression_inside_is_refused_with_the_file_to_give(
    detector: ExportedDetector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model_with_nms.onnx"
    onnx.save(add_suppression(load_onnx(detector.int8_onnx), "onnx", SuppressionConfig()), path)
    tensorrt_doubles.install(monkeypatch, tmp_path)
    for runtime in (*CPU_RUNTIMES, "tensorrt"):
        with pytest.raises(ValueError, match=r"model_with_nms\.onnx ends in non-maximum .*; give model\.onnx, which"):
            load_engine(path, runtime)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="ends in non-maximum suppression"):
        check_outputs(STATIC_OUTPUTS, path)


def test_an_ir_of_another_network_is_refused(tmp_path: Path) -> None:
    from openvino import opset13 as operators

    image = operators.parameter([1, 3, 32, 32], np.uint8, name="images")
    doubled = operators.add(image, image)
    doubled.output(0).set_names({"output0"})
    openvino.save_model(openvino.Model([doubled], [image], "foreign"), tmp_path / "foreign.xml")
    with pytest.raises(ValueError, match=r"foreign\.xml has the outputs output0 where a detector has boxes_xyxy and"):
        load_engine(tmp_path / "foreign.xml")


@pytest.mark.parametrize("runtime", CPU_RUNTIMES)
def test_files_that_are_no_detector_are_refused(detector: ExportedDetector, tmp_path: Path, runtime: Runtime) -> None:
    free = load_onnx(detector.float_onnx)
    free.graph.input[0].type.tensor_type.shape.dim[2].dim_param = "height"
    onnx.save(free, tmp_path / "free.onnx")
    with pytest.raises(ValueError, match=r"free\.onnx \(inputs: images\) does not take images as uint8 .*B, 3, S, S"):
        load_engine(tmp_path / "free.onnx", runtime)
    (tmp_path / "empty.onnx").touch()
    with pytest.raises(ValueError, match=r"empty\.onnx \(0 bytes\) holds no graph"):
        load_engine(tmp_path / "empty.onnx", runtime)
    (tmp_path / "short.onnx").write_bytes(detector.float_onnx.read_bytes()[:5000])
    with pytest.raises(ValueError, match=r"short\.onnx is not a readable ONNX file"):
        load_engine(tmp_path / "short.onnx", runtime)


def test_outputs_of_another_tool_are_named() -> None:
    check_outputs(
        ["scores", "boxes_xyxy", "detection_boxes_xyxy"], Path("x.onnx")
    )  # both forms: the engine takes its own
    with pytest.raises(ValueError, match=r"x\.onnx has the outputs none where a detector has boxes_xyxy and scores"):
        check_outputs([], Path("x.onnx"))


def test_each_engine_tells_the_batch_that_it_computes(detector: ExportedDetector, tmp_path: Path) -> None:
    write_onnx(fix_batch(load_onnx(detector.float_onnx), 4), tmp_path / "four.onnx")
    engines = {
        "free": load_engine(detector.float_onnx, "onnxruntime", 1),
        "four": load_engine(tmp_path / "four.onnx", "onnxruntime", 1),
        "one by one": load_engine(tmp_path / "four.onnx", "openvino", 1),
        "torch": TorchEngine(detector.floating, 1),
    }
    assert [engine.fixed_batch for engine in engines.values()] == [None, 4, 1, None]
    image = np.zeros((1, 3, INPUT_SIZE, INPUT_SIZE), np.uint8)
    records = measure_latency(engines, image, warmup_seconds=0.0, repeats=2, spread_limit=1000.0)
    assert {name: record.batch for name, record in records.items()} == {
        "free": 1,
        "four": 4,
        "one by one": 1,
        "torch": 1,
    }
