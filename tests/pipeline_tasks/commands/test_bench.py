"""`nasline bench`: table, files and MLflow run of small engines, what it knows of them, and what it refuses."""

from __future__ import annotations

import contextlib
import json
import sqlite3
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from gate_findings import record
from onnx import TensorProto, helper, numpy_helper

from model.onnx_file import fix_batch, load_onnx
from model.preprocessing import Preprocessing
from pipeline_tasks import bench_subjects, digests
from pipeline_tasks.bench_picture import Point, draw_bench, frontier, frontiers, wrapped
from pipeline_tasks.bench_subjects import Subject, open_subjects, recorded_map, short_names
from pipeline_tasks.commands import bench
from pipeline_tasks.engine_table import EngineRow
from pipeline_tasks.errors import UsageError
from pipeline_tasks.published_latency import PUBLISHED, PublishedLatency, published_table
from pipeline_tasks.tracking import bench_run
from pipeline_tasks.tracking.bench_run import BenchRun, metric_entries
from pipeline_tasks.workspace import Workspace

Nasline = Callable[..., str]
QUICK = ("--repeats", 10, "--warmup-seconds", 0, "--threads", 1, "--maximum-spread", 1000)


def write_engine(folder: Path, with_metadata: bool = True) -> Path:
    """An exported file that sees the two objects of every picture of `coco_folder` (48 x 32) wherever they lie."""
    original = np.array([[[4, 5, 14.5, 13], [5, 5, 15.5, 13]]], np.float32)  # (1, A, 4)
    boxes = Preprocessing(64).letterbox(48, 32).to_input(original)
    scores = np.array([[[0.9, 0.1], [0.1, 0.8]]], np.float32)  # (1, A, C)
    nodes = [
        helper.make_node("Cast", ["images"], ["float"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMin", ["float", "axes"], ["least"], keepdims=0),
        helper.make_node("Mul", ["least", "zero"], ["nothing"]),
        helper.make_node("Reshape", ["nothing", "shape"], ["column"]),
        helper.make_node("Add", ["column", "boxes"], ["boxes_xyxy"]),
        helper.make_node("Add", ["column", "confidence"], ["scores"]),
    ]
    constants: dict[str, Any] = {
        "axes": np.array([1, 2, 3]), "zero": np.array(0, np.float32), "shape": np.array([-1, 1, 1]),
        "boxes": boxes, "confidence": scores,
    }  # fmt: skip
    tensors = [numpy_helper.from_array(array, name) for name, array in constants.items()]
    images = helper.make_tensor_value_info("images", TensorProto.UINT8, ["batch", 3, 64, 64])
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("boxes_xyxy", "scores")]
    graph = helper.make_graph(nodes, "two_boxes", [images], outputs, tensors)
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    if with_metadata:
        told = {"class_names": ["circle", "square"], "preprocessing": Preprocessing(64).to_json()}
        helper.set_model_props(proto, {"nasline": json.dumps(told)})
    folder.mkdir(parents=True, exist_ok=True)
    onnx.save(proto, folder / "model.onnx")
    return folder


@pytest.fixture
def engine(tmp_path: Path) -> Path:
    return write_engine(tmp_path / "engine")


def rows_of(store: str, table: str) -> list[tuple[str, Any]]:
    with contextlib.closing(sqlite3.connect(store.removeprefix("sqlite:///"))) as connection:
        rows: list[tuple[str, Any]] = connection.execute(f"SELECT key, value FROM {table}").fetchall()
    return rows


@pytest.mark.slow
def test_engines_side_by_side_on_a_dataset_with_published_ones(
    nasline: Nasline, engine: Path, coco_folder: Any, tmp_path: Path, tracking_store: str
) -> None:
    out = tmp_path / "out"
    words = (engine, f"onnxruntime:{engine}/model.onnx", "--dataset", coco_folder.path, "--published", "--out", out)
    output = nasline("bench", *words, *QUICK, code=0)
    table = (out / "table.txt").read_text()
    assert table in output and "MLflow run " in output
    heading, *rows = table.splitlines()[1:4]
    assert heading.split()[-3:] == ["mAP50-95", "mAP", "of"]
    assert "(openvino 20" in rows[0] and "(onnxruntime 1." in rows[1]
    assert all(row.endswith("target test") for row in rows)
    assert "published for the NVIDIA T4, not measured here" in table
    content = json.loads((out / "bench.json").read_text())
    measured = [one["map50_95"] for one in content["engines"]]
    assert measured[0] == measured[1] > 0.9, "one file, two runtimes"
    assert content["engines"][0]["latency"]["interleaved_with"] == ["engine/model.onnx"]
    assert all(one["measured"] is False and one["source"] for one in content["published"])
    assert (out / "frontier.png").stat().st_size > 20_000
    logged = dict(rows_of(tracking_store, "metrics"))
    assert logged["map50_95/engine-model.onnx"] == measured[1] and logged["latency_p50_ms/engine-model.onnx"] > 0
    assert dict(rows_of(tracking_store, "params"))["dataset"] == str(coco_folder.path)
    assert ("nasline.step", "bench") in rows_of(tracking_store, "tags")


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        (("nowhere",), 65, "no engine at nowhere: expected model.xml or model.onnx there"),
        (("engine", "engine"), 2, "engine is given twice; name each engine once"),
        (("cuda:engine",), 2, "'cuda' is no runtime; put one of openvino, onnxruntime, tensorrt, torch before"),
        (("torch:engine",), 65, "engine/checkpoint.json cannot be read"),
        (("tensorrt:engine",), 78, "engine: TensorRT cannot be imported"),
        (("engine", "--repeats", "5"), 65, "--repeats must lie in 10 to 100000, got 5"),
        (("engine", "--maximum-spread", "0"), 65, "--maximum-spread must be positive, got 0"),
        (("engine", "--dataset", "nowhere"), 65, "nowhere"),
    ],
)
def test_one_sentence_for_what_cannot_be_measured(
    nasline: Nasline, engine: Path, words: tuple[str, ...], code: int, told: str
) -> None:
    assert told in nasline("bench", *words, code=code)


def test_a_file_of_another_tool_is_refused(nasline: Nasline, tmp_path: Path) -> None:
    write_engine(tmp_path / "foreign", with_metadata=False)
    assert "foreign does not tell its classes and preprocessing" in nasline("bench", "foreign", code=65)
    (tmp_path / "foreign" / "model.onnx").write_text("no model")
    assert "model.onnx is not a readable ONNX file" in nasline("bench", "foreign", code=65)


def test_a_file_without_content_is_refused(nasline: Nasline, tmp_path: Path) -> None:
    (tmp_path / "empty.onnx").touch()
    for runtime in ("openvino", "onnxruntime"):
        assert "empty.onnx (0 bytes) holds no graph" in nasline("bench", f"{runtime}:empty.onnx", code=65)


def test_a_fixed_batch_is_told_in_the_table_and_in_the_run(
    engine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    onnx.save(fix_batch(load_onnx(engine / "model.onnx"), 4), tmp_path / "four.onnx")
    logged: list[BenchRun] = []
    monkeypatch.setattr(bench, "_log", lambda workspace, experiment, run: logged.append(run))
    words = [f"onnxruntime:{engine}", f"onnxruntime:{tmp_path}/four.onnx"]
    measuring = bench.Measuring(threads=1, repeats=10, warmup_seconds=0.0, maximum_spread=1000.0)
    rows = bench.bench(words, measuring=measuring, workspace=str(tmp_path))
    assert [row.record.batch for row in rows] == [1, 4]
    heading, *lines = capsys.readouterr().out.splitlines()[1:4]
    end = heading.index("batch") + len("batch")
    assert [line[:end].split()[-1] for line in lines] == ["1", "4"]
    assert logged[0].parameters["batch"] == "1, 4" and logged[0].table["batch"] == [1, 4]


def test_noise_is_refused(nasline: Nasline, engine: Path) -> None:
    sentence = nasline("bench", engine, *QUICK[:-1], 1e-9, "--attempts", 1, code=75)
    assert "the latency of" in sentence and "in the quietest of 1 attempts" in sentence
    assert sentence.endswith("or raise the limit (--maximum-spread)")


def test_engines_of_two_devices_are_not_interleaved(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Made:
        def __init__(self, name: str) -> None:
            self.name = name

    def opened(word: str, name: str, *_: Any) -> Subject:
        return Subject(name, Made(word), (), Preprocessing(64))  # type: ignore[arg-type]

    monkeypatch.setattr(bench_subjects, "_open", opened)
    with pytest.raises(UsageError, match="do not share a device"):
        open_subjects(["tensorrt", "openvino"], "openvino", 0, Workspace(tmp_path))


def test_a_gpu_is_drawn_by_the_time_of_its_network_and_measured_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    row = EngineRow(record("int8", 5.0, gpu_p50_ms=3.0), 0.4)
    assert (bench._point(row).latency_ms, bench._drawn_latency(row)) == (3.0, "median time of the network on the GPU")
    assert bench._point(EngineRow(record("int8", 5.0))).latency_ms == 5.0
    asked: dict[str, Any] = {}

    class Made:
        name = "tensorrt"

    def measure(engines: Any, images: Any, **options: Any) -> dict[str, Any]:
        asked.update(options, shapes={name: one.shape for name, one in images.items()})
        return {}

    monkeypatch.setattr("model.engines.latency.measure_latency", measure)
    subject = Subject("one", Made(), (), Preprocessing(64))  # type: ignore[arg-type]
    bench._latency([subject], bench.Measuring())
    assert (asked["repeats"], asked["kind"], asked["shapes"]) == (1000, "gpu", {"one": (1, 3, 64, 64)})


def bundle(folder: Path) -> Path:
    """A registered engine with its gate's record."""
    engine = write_engine(folder / "engine")
    built = folder / "gate/target/int8"
    built.mkdir(parents=True)
    (built / "build.json").write_text(json.dumps({"source_sha256": digests.of_file(engine / "model.onnx")}))
    (folder / "gate/accuracy.json").write_text(json.dumps({"int8": {"map50_95": 0.41}, "float": {"map50_95": 0.42}}))
    return engine


def test_the_gates_record_counts_for_the_file_it_was_made_of(tmp_path: Path) -> None:
    engine = bundle(tmp_path / "bundle")
    assert recorded_map(engine) == recorded_map(engine / "model.onnx") == 0.41
    built = tmp_path / "bundle/gate/target/int8"
    (built / "model.xml").touch()
    assert recorded_map(built) == recorded_map(built / "model.xml") == 0.41
    (engine / "model.float.onnx").touch()
    assert recorded_map(engine / "model.float.onnx") is None, "no engine was built from it"
    (engine / "model.onnx").write_bytes(b"another one")
    assert recorded_map(engine) is None
    assert recorded_map(Path("/model.xml")) is None and recorded_map(Path("/etc/model.xml")) is None


def test_names_are_as_short_as_they_tell_engines_apart() -> None:
    words = ["a/b/engine", "a/c/engine", "models:/yolo@champion", "x.onnx", "a/d/model.onnx", "torch:a/d/model.onnx"]
    names = short_names(words)
    assert list(names.values()) == [
        "b/engine", "c/engine", "models:/yolo@champion", "x.onnx", "a/d/model.onnx", "torch:a/d/model.onnx",
    ]  # fmt: skip
    assert short_names(["/m/w/engine"]) == {"/m/w/engine": "w/engine"}


def test_the_frontier_holds_what_nothing_beats_in_both() -> None:
    fast, slow = Point("fast", 1.0, 0.3), Point("slow", 4.0, 0.5)
    beaten, unknown, equal = Point("beaten", 2.0, 0.3), Point("unknown", 0.1, None), Point("equal", 4.0, 0.4)
    assert frontier([slow, unknown, beaten, equal, fast]) == [fast, slow]


def test_engines_of_different_batches_are_not_compared(tmp_path: Path) -> None:
    one, slower, four = Point("one", 1.0, 0.5), Point("slower", 2.0, 0.5), Point("four", 3.0, 0.5, batch=4)
    assert frontiers([four, slower, one]) == [[one], [four]]
    draw_bench([one, slower, four], (), "median latency", "CPU", tmp_path / "two.png")
    assert (tmp_path / "two.png").stat().st_size > 5_000


def test_the_picture_needs_an_engine_but_no_accuracy(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no engine was measured"):
        draw_bench([], PUBLISHED, "median latency", "CPU", tmp_path / "none.png")
    draw_bench([Point("unknown", 3.0, None)], (), "median latency", "CPU", tmp_path / "one.png")
    assert (tmp_path / "one.png").stat().st_size > 5_000


@pytest.mark.parametrize("published", [(), PUBLISHED])
def test_long_names_stay_inside_the_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, published: Sequence[PublishedLatency]
) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    drawn, print_figure = [], FigureCanvasAgg.print_figure

    def keep(canvas: FigureCanvasAgg, *words: Any, **options: Any) -> None:
        print_figure(canvas, *words, **options)
        drawn.append(canvas.figure)

    monkeypatch.setattr(FigureCanvasAgg, "print_figure", keep)
    names = (f"models:/{'W' * 100}@champion (openvino)", f"{'a/long/way/' * 20}model.onnx", "a$1/b$2", "word " * 60)
    points = [Point(name, 5.0 + index, 0.1 * index or None, 1) for index, name in enumerate(names)]
    draw_bench(
        points, published, "median latency", "A CPU of a vendor who likes long names " * 3, tmp_path / "long.png"
    )
    (figure,) = drawn
    (legend,), (axes,) = figure.legends, figure.axes
    width, height = figure.canvas.get_width_height()
    for part in (legend, axes.title):
        box = part.get_window_extent()
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width and box.y1 <= height
    assert axes.get_window_extent().height > 350
    told = [text.get_text().replace("\n", "") for text in legend.get_texts()]
    assert [next(text for text in told if text.startswith(f"{n}: "))[3:].startswith(name.strip()[:40])
            for n, name in enumerate(names, start=1)] == [True] * 4  # fmt: skip


def test_a_text_is_broken_behind_blanks_and_slashes() -> None:
    assert wrapped("short", 100, 8) == "short"
    assert wrapped("one/two/three four five", 40, 8).splitlines() == ["one/two/", "three four", "five"]
    assert wrapped("W" * 30, 40, 8).replace("\n", "") == "W" * 30


def test_published_rows_name_their_source_and_rise_with_size() -> None:
    assert all(row.source and 0.2 < row.map50_95 < 0.6 and 0.5 < row.latency_ms < 20 for row in PUBLISHED)
    assert {row.family.partition("-")[0] for row in PUBLISHED} == {"YOLOv5", "YOLOv6", "YOLOv8", "YOLO"}
    for series in {(row.family, row.precision) for row in PUBLISHED}:
        own = [row for row in PUBLISHED if (row.family, row.precision) == series]
        assert own == sorted(own, key=lambda row: row.latency_ms) == sorted(own, key=lambda row: row.map50_95)
    assert "not measured here" in published_table()[0]


def test_names_of_metrics_are_what_mlflow_takes() -> None:
    made = dict(metric_entries({"models:/yolo@champion": {"p50_ms": 1.0}, "../a//b": {"p50_ms": 2.0}}))
    assert made == {"p50_ms/models-yolo-champion": 1.0, "p50_ms/..-a-b": 2.0}
    assert [name for name, _ in metric_entries({"a/b": {"x": 1.0}, "a-b": {"x": 2.0}})] == ["x/1-a-b", "x/2-a-b"]


def test_a_server_that_is_away_costs_a_warning(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def away(workspace: Workspace) -> Any:
        raise OSError("connection refused")

    monkeypatch.setattr(bench_run, "connect", away)
    made = BenchRun("bench", {}, {}, {}, {}, ())
    assert bench_run.log_bench(Workspace(tmp_path), "nasline", made) is None
    assert "is away (connection refused); the result is not in MLflow" in caplog.text
