"""Building and running TensorRT plans on doubles of CUDA and TensorRT (``tensorrt_doubles``): no GPU here."""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import tensorrt_doubles
import tensorrt_rtx_bindings
from exported_detector import ExportedDetector
from tensorrt_doubles import CudaDouble, TensorRTDouble

from model.engines import MissingRuntimeError, load_engine
from model.engines.agreement import compare_outputs
from model.engines.gpu_facts import current_gpu
from model.engines.onnxruntime_engine import OnnxRuntimeEngine
from model.engines.tensorrt_build import build_cached, build_tensorrt, plan_key
from model.engines.tensorrt_engine import TensorRTEngine
from model.engines.unsigned_rewrite import rewrite_unsigned
from model.onnx_half import export_half

Doubles = tuple[CudaDouble, TensorRTDouble]


@pytest.fixture(scope="module")
def reference(detector: ExportedDetector, tmp_path_factory: pytest.TempPathFactory) -> OnnxRuntimeEngine:
    """The float16 form, which is what a plan is built from."""
    path = tmp_path_factory.mktemp("half") / "model.onnx"
    export_half(detector.int8_onnx, path)
    return OnnxRuntimeEngine(path, threads=1, optimise=False)


@pytest.fixture
def doubles(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Doubles:
    return tensorrt_doubles.install(monkeypatch, tmp_path)


def assert_equal_outputs(
    ours: tuple[np.ndarray, np.ndarray], theirs: tuple[np.ndarray, np.ndarray], atol: float = 0.0
) -> None:
    for first, second in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(first, second, atol=atol, rtol=0)


@pytest.mark.parametrize("cuda_graph", [False, True])
def test_a_plan_computes_what_its_file_does(
    detector: ExportedDetector, reference: OnnxRuntimeEngine, doubles: Doubles, tmp_path: Path, cuda_graph: bool
) -> None:
    build_tensorrt(detector.int8_onnx, tmp_path / "out")
    engine = TensorRTEngine.from_file(tmp_path / "out" / "model.plan", cuda_graph=cuda_graph)
    assert (engine.precision, engine.runtime_version, engine.batch) == ("int8", "11.4.0.106", 1)
    assert engine.fixed_batch == 1
    images = detector.images[:3]
    expected = tuple(
        np.concatenate(parts) for parts in zip(*(reference.run(image[None]) for image in images), strict=True)
    )
    for _ in range(2):
        assert_equal_outputs(engine.run(images), expected)  # type: ignore[arg-type]
    assert engine.device_ms is not None and engine.device_ms > 0
    cuda, _ = doubles
    assert cuda.launches == (1 if cuda_graph else 6)  # with a graph only the launch before it was recorded


def test_results_stay_when_the_engine_runs_again(detector: ExportedDetector, doubles: Doubles) -> None:
    engine = load_engine(detector.int8_onnx, "tensorrt")
    boxes_xyxy, scores = engine.run(detector.images[:1])
    kept = boxes_xyxy.copy(), scores.copy()
    engine.run(detector.images[1:2])
    assert_equal_outputs((boxes_xyxy, scores), kept)


@pytest.mark.parametrize("count", [1, 3, 4, 6])
def test_batches_up_to_the_largest(
    detector: ExportedDetector, reference: OnnxRuntimeEngine, doubles: Doubles, count: int
) -> None:
    plan = build_cached(detector.int8_onnx, largest_batch=4)
    engine = TensorRTEngine.from_file(plan)
    assert engine.batch == 4 and engine.fixed_batch is None
    assert_equal_outputs(engine.run(detector.images[:count]), reference.run(detector.images[:count]), atol=1e-4)


def test_a_file_with_a_fixed_batch_is_filled(
    detector: ExportedDetector, reference: OnnxRuntimeEngine, doubles: Doubles, tmp_path: Path
) -> None:
    export_half(detector.int8_onnx, tmp_path / "four.onnx", batch=4)
    engine = TensorRTEngine.from_file(build_cached(tmp_path / "four.onnx"))
    assert engine.batch == engine.fixed_batch == 4
    assert_equal_outputs(engine.run(detector.images[:5]), reference.run(detector.images[:5]), atol=1e-4)


def test_memory_is_given_back(detector: ExportedDetector, doubles: Doubles) -> None:
    cuda, _ = doubles
    engine = TensorRTEngine.from_file(build_cached(detector.int8_onnx), cuda_graph=True)
    engine.run(detector.images[:1])
    assert len(cuda.device) == len(cuda.host) == 3 and cuda.graphs
    engine.close()
    assert cuda.device == cuda.host == cuda.graphs == {}
    another = TensorRTEngine.from_file(build_cached(detector.int8_onnx))
    assert len(cuda.device) == 3
    del another
    gc.collect()
    assert cuda.device == {}


def test_float_twin_becomes_a_float16_engine(detector: ExportedDetector, doubles: Doubles, tmp_path: Path) -> None:
    report = build_tensorrt(detector.float_onnx, tmp_path / "out")
    assert (report.precision, report.int8_convolutions, report.float_convolutions) == ("float16", 0, 76)
    engine = load_engine(tmp_path / "out", "tensorrt")
    agreement = compare_outputs(OnnxRuntimeEngine(detector.float_onnx, threads=1), engine, detector.unseen_images)
    assert agreement.confident_anchors > 100
    assert agreement.box_error_mean_px < 0.02  # float16's 11 bits: 0.003 px was measured
    assert agreement.score_error_mean < 0.001


def test_build_report(detector: ExportedDetector, doubles: Doubles, tmp_path: Path) -> None:
    build_tensorrt(detector.int8_onnx, tmp_path / "out")
    report = json.loads((tmp_path / "out" / "build.json").read_text())
    assert (report["gpu"], report["driver"], report["compute_capability"]) == ("Tesla T4", "535.183.01", "7.5")
    assert (report["multiprocessors"], report["int8_convolutions"], report["float_convolutions"]) == (40, 68, 8)
    assert report["float32_layers"] == {} and report["largest_batch"] == 1
    assert "Layers" in json.loads((tmp_path / "out" / "layers.json").read_text())


def test_plans_are_kept_by_file_version_gpu_and_driver(
    detector: ExportedDetector, doubles: Doubles, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    _, tensorrt = doubles
    first = build_cached(detector.int8_onnx)
    assert build_cached(detector.int8_onnx) == first and tensorrt.builds == 1
    build_cached(detector.float_onnx)
    assert tensorrt.builds == 2
    newer = tensorrt_doubles.GPU_LINE.replace("535.183.01", "580.65.06")
    tensorrt_doubles.install_nvidia_smi(monkeypatch, tmp_path / "newer", newer)
    assert build_cached(detector.int8_onnx) != first and tensorrt.builds == 3


def test_every_part_of_the_key_counts() -> None:
    parts = ["sha", "11.4", "Tesla T4", "535", 1]
    keys = {plan_key(*parts)}  # type: ignore[arg-type]
    for index, other in enumerate(["abc", "10.16", "NVIDIA L4", None, 8]):
        keys.add(plan_key(*(other if place == index else part for place, part in enumerate(parts))))  # type: ignore[arg-type]
    assert len(keys) == 6


def test_a_damaged_plan_is_built_again(detector: ExportedDetector, doubles: Doubles) -> None:
    _, tensorrt = doubles
    plan = build_cached(detector.int8_onnx)
    whole = plan.read_bytes()
    plan.write_bytes(whole[:100])
    assert build_cached(detector.int8_onnx).read_bytes() == whole and tensorrt.builds == 2


def test_a_failed_build_leaves_nothing(detector: ExportedDetector, doubles: Doubles, tmp_path: Path) -> None:
    broken = tmp_path / "model.onnx"
    broken.write_bytes(b"not a model")
    with pytest.raises(ValueError, match="not a readable ONNX file"):
        build_cached(broken)
    assert list((tmp_path / "cache" / "nasline" / "plans").iterdir()) == []


def test_an_engine_with_a_quantized_layer_in_float_is_refused(
    detector: ExportedDetector, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    layer = "backbone.stage1.downsample.rbr_reparam"
    tensorrt_doubles.install(monkeypatch, tmp_path, float_instead=layer)
    with pytest.raises(ValueError, match=rf"1 of 68 quantized .* {layer} \(runs in float16\)"):
        build_tensorrt(detector.int8_onnx, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert list((tmp_path / "cache" / "nasline" / "plans").iterdir()) == []


def test_an_unsigned_file_is_refused(detector: ExportedDetector, doubles: Doubles, tmp_path: Path) -> None:
    """TensorRT's parser only warns and takes uint8 for int8, which halves the range."""
    unsigned, _ = rewrite_unsigned(onnx.load(detector.int8_onnx))
    onnx.save(unsigned, tmp_path / "model.onnx")
    with pytest.raises(ValueError, match="quantized to uint8, expected int8"):
        build_cached(tmp_path / "model.onnx")


def test_the_network_is_strongly_typed(detector: ExportedDetector, doubles: Doubles) -> None:
    _, tensorrt = doubles
    build_cached(detector.int8_onnx)
    del tensorrt.NetworkDefinitionCreationFlag.STRONGLY_TYPED  # a version that knows nothing else
    build_cached(detector.float_onnx)
    assert tensorrt.flags == [2, 0]


def test_a_plan_of_another_version_is_refused(
    detector: ExportedDetector, doubles: Doubles, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    plan = build_cached(detector.int8_onnx)
    tensorrt_doubles.install(monkeypatch, tmp_path, version="10.16.1.11")
    with pytest.raises(ValueError, match=r"built by TensorRT 11\.4\.0\.106 on Tesla T4, here is 10\.16\.1\.11"):
        TensorRTEngine.from_file(plan)
    with pytest.raises(ValueError, match="cannot read this plan"):
        TensorRTEngine(plan.read_bytes(), "int8")
    plan.with_name("build.json").unlink()
    with pytest.raises(ValueError, match=r"has no build\.json"):
        TensorRTEngine.from_file(plan)


@pytest.mark.parametrize("field", ["runtime_version", "gpu", "precision"])
def test_a_report_without_a_field_is_refused_in_one_sentence(
    detector: ExportedDetector, doubles: Doubles, tmp_path: Path, field: str
) -> None:
    build_tensorrt(detector.int8_onnx, tmp_path)
    report = tmp_path / "build.json"
    whole = json.loads(report.read_text())
    for content, words in (
        ({name: value for name, value in whole.items() if name != field}, f": {field} must be a text, but it is miss"),
        ({**whole, field: 8}, f": {field} must be a text, but it is 8; build the plan again from model.onnx"),
        ([], ": runtime_version must be a text, but it is missing"),
    ):
        report.write_text(json.dumps(content))
        with pytest.raises(ValueError, match=f"{report}{words}"):
            TensorRTEngine.from_file(tmp_path / "model.plan")
    report.write_text("{")
    with pytest.raises(ValueError, match=rf"{report} cannot be read .*; build the plan again"):
        TensorRTEngine.from_file(tmp_path / "model.plan")


@pytest.mark.parametrize("content", ["{", "[]", '{"precision": "int8"}', '{"of_another_release": 1}'])
def test_a_kept_plan_whose_report_is_not_understood_is_built_again(
    detector: ExportedDetector, doubles: Doubles, tmp_path: Path, content: str
) -> None:
    plan = build_cached(detector.int8_onnx, cache=tmp_path)
    plan.with_name("build.json").write_text(content)
    assert build_cached(detector.int8_onnx, cache=tmp_path) == plan
    assert json.loads(plan.with_name("build.json").read_text())["precision"] == "int8"


def test_what_is_missing_is_said(
    detector: ExportedDetector, doubles: Doubles, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refusal() -> str:
        with pytest.raises(MissingRuntimeError) as caught:
            build_cached(detector.int8_onnx)
        return str(caught.value)

    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    assert "nvidia-smi was not found" in refusal()
    for double, words in (
        (CudaDouble(devices=0), "there is none"),
        (CudaDouble(error=tensorrt_doubles.Error.cudaErrorNoDevice), "cudaErrorNoDevice"),
        (CudaDouble(error=tensorrt_doubles.Error.cudaErrorInsufficientDriver), "no NVIDIA driver that is new enough"),
    ):
        tensorrt_doubles.install_cuda(monkeypatch, double)
        assert words in refusal()
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", None)
    assert "CUDA bindings for Python cannot be imported" in refusal() and "nasline[tensorrt]" in refusal()
    monkeypatch.setattr(sys.modules["tensorrt"], "__version__", "10.9.0.34")
    assert "10.9.0.34 is too old, 10.16 or newer" in refusal()
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    assert "TensorRT cannot be imported" in refusal() and "nasline[tensorrt]" in refusal()


def test_a_failing_call_of_cuda_is_named(detector: ExportedDetector, doubles: Doubles) -> None:
    cuda, _ = doubles
    engine = TensorRTEngine.from_file(build_cached(detector.int8_onnx))
    taken, cuda.device = cuda.device, {}
    with pytest.raises(RuntimeError, match="cudaMemcpyAsync: cudaErrorInvalidValue"):
        engine.run(detector.images[:1])
    cuda.device = taken


def test_wrong_images_are_refused(detector: ExportedDetector, doubles: Doubles) -> None:
    engine = load_engine(detector.int8_onnx, "tensorrt")
    for images in (detector.images.astype(np.float32), detector.images[0], detector.images.transpose(0, 2, 3, 1)):
        with pytest.raises(ValueError, match="the engine takes images as uint8"):
            engine.run(images)


def test_current_gpu(doubles: Doubles) -> None:
    facts = current_gpu()
    assert (facts.name, facts.compute_capability, facts.multiprocessors) == ("Tesla T4", "7.5", 40)


@pytest.mark.parametrize(
    ("double", "real"),
    [
        (tensorrt_doubles.Context, "IExecutionContext"),
        (tensorrt_doubles.Engine, "ICudaEngine"),
        (tensorrt_doubles.Inspector, "EngineInspector"),
        (tensorrt_doubles.Config, "IBuilderConfig"),
        (tensorrt_doubles.Profile, "IOptimizationProfile"),
        (tensorrt_doubles.Network, "INetworkDefinition"),
        (tensorrt_doubles.OnnxParser, "OnnxParser"),
    ],
)
def test_doubles_have_the_real_interface(double: type, real: str) -> None:
    """NVIDIA's bindings for RTX share these classes with TensorRT itself."""
    offered = {name for name in vars(double) if not name.startswith("_")}
    missing = offered - set(dir(getattr(tensorrt_rtx_bindings, real)))
    assert missing == set() and offered


def test_the_plan_is_built_from_the_float16_form(detector: ExportedDetector, doubles: Doubles) -> None:
    head, _, model = build_cached(detector.int8_onnx).read_bytes().partition(b"\n")
    types = {tensor.data_type for tensor in onnx.load_from_string(model).graph.initializer}
    assert onnx.TensorProto.FLOAT16 in types and json.loads(head)["largest_batch"] == 1
