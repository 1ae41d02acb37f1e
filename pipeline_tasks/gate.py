"""`nasline gate`: build the target's engines, measure accuracy and latency on them, judge."""

from __future__ import annotations

import csv
import json
import logging
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline_tasks import champion, gate_latency, seen_images, verdict
from pipeline_tasks.engine_table import EngineRow, around_line, engine_table
from pipeline_tasks.errors import ConfigurationError, DataError
from pipeline_tasks.execution import StepContext
from pipeline_tasks.export import ENGINE_FILE, FLOAT_FILE, INT8_FILE
from pipeline_tasks.gate_rules import Findings, engine_licences, judge
from pipeline_tasks.gate_target import require_target
from pipeline_tasks.seen_images import CANDIDATE
from pipeline_tasks.training_task import open_images
from pipeline_tasks.verdict import Verdict
from pipeline_tasks.workspace import MANIFEST, write_json

if TYPE_CHECKING:
    from model.data.image_set import ImageSet
    from model.detections import Detections
    from model.engines import Engine
    from model.engines.agreement import AgreementReport
    from model.engines.openvino_engine import BuildReport
    from model.evaluation import DetectionMetrics
    from model.preprocessing import Preprocessing
    from pipeline_tasks.gate_parameters import GateParameters

log = logging.getLogger(__name__)

COMPARED_IMAGES = 16
QUANTIZING_OPERATORS = frozenset({"QuantizeLinear", "DynamicQuantizeLinear", "QLinearConv", "ConvInteger"})
"""Those of other exporters too. Weights may be stored in INT8: the arithmetic is that of their float values."""


def gate(context: StepContext) -> dict[str, Any]:
    """Measure both engines of the target on the test split and write verdict.json.

    A rejection is a result: it is published, and the command's exit code 99 tells it.

    Raises:
        DataError: the float engine is quantized, or the test split has no box to measure accuracy by.
        ConfigurationError: this machine is not the target, or lacks what the target needs.
        TemporaryError: the latency scatters too much to be judged.
    """
    from model.data.tables import read_dataset
    from model.evaluation import evaluate

    given, engine_folder = context.parameters.gate, context.inputs["engine"]
    require_target(given.target)
    require_float(engine_folder / FLOAT_FILE)
    preprocessing = read_preprocessing(engine_folder)
    test_set = read_dataset(context.inputs["target"]).split("test")
    require_boxes(test_set)
    held_out, seen = seen_images.read_held_out(context.inputs["target"]), seen_images.seen_by_run(context)
    engines = _build_engines(context, engine_folder)
    detected = {name: detect_with(context, engine, test_set, preprocessing) for name, engine in engines.items()}
    found = Findings(
        metrics={name: evaluate(detections, test_set) for name, detections in detected.items()},
        latency=gate_latency.measure(context, engines, preprocessing, test_set),
        agreement=_agreement(context, engines["int8"], test_set, preprocessing),
        precision=engines["int8"].precision,
        float_instead=float_instead(engines["int8"], engine_folder),
        megabytes=(engine_folder / INT8_FILE).stat().st_size / 1e6,
        licences=engine_licences(engine_folder),
        compared=champion.compare(context, detected["int8"], test_set, held_out, seen),
        torch_error_px=_torch_error(engine_folder),
        learned=tuple(seen_images.exclusions(held_out, {CANDIDATE: seen}, given.near_duplicate_bits).values()),
    )
    judged = judge(found, given)
    _write(context, judged, found)
    _draw(context, found.metrics["int8"], detected["int8"], test_set)
    _tell(judged, found)
    return _summary(judged, found)


def require_float(onnx_file: Path) -> None:
    """Make sure that the engine INT8 is compared with is none itself: it would lose nothing and gain nothing.

    Raises:
        DataError: the file quantizes a tensor, or cannot be read.
    """
    from model.onnx_file import load_onnx

    try:
        operators = {node.op_type for node in load_onnx(onnx_file).graph.node}
    except ValueError as error:
        raise DataError(str(error)) from None
    if found := sorted(operators & QUANTIZING_OPERATORS):
        raise DataError(
            f"{onnx_file} must be the float engine, but it is quantized ({', '.join(found)}): remove the folder "
            f"{onnx_file.parent.parent} and run the step export again"
        )


def require_boxes(test_set: ImageSet) -> None:
    """Make sure that there is an accuracy to judge: without a box of any class it is no number.

    Raises:
        DataError: there is no box, or none but crowd regions, which do not count.
    """
    if test_set.all_boxes().is_crowd.all():
        raise DataError(
            f"the test split has {len(test_set)} images but no box beside crowd regions, by which accuracy cannot be "
            "measured: label its images and start another run"
        )


def read_preprocessing(engine_folder: Path) -> Preprocessing:
    """How images must be prepared for an engine."""
    from model.preprocessing import Preprocessing

    return Preprocessing.from_json(json.loads((engine_folder / "engine.json").read_text())["preprocessing"])


def _build_engines(context: StepContext, engine_folder: Path) -> dict[str, Engine]:
    """The target's own engines, in the output: what is measured is what was built here."""
    given, target = context.parameters.gate, context.output / "target"
    files = {"int8": INT8_FILE, "float": FLOAT_FILE}
    return {name: build_engine(engine_folder / file, target / name, given) for name, file in files.items()}


def build_engine(onnx_file: Path, folder: Path, given: GateParameters) -> Engine:
    """Build one engine for the target and open it."""
    from model.engines import load_engine

    if given.engine_runtime == "openvino":
        from model.engines.openvino_engine import build_openvino

        report = build_openvino(onnx_file, folder, given.latency_threads)
        log.info("%s: %d convolutions run in INT8, %d in float", onnx_file.name, *_counts(report))
        built = folder / "model.xml"
    else:
        built = _build_tensorrt(onnx_file, folder, given.target)
    return load_engine(built, runtime=given.engine_runtime, threads=given.latency_threads)


def float_instead(engine: Engine, engine_folder: Path) -> tuple[str, ...]:
    """Layers that are INT8 by engine.json and that an OpenVINO engine runs in float; TensorRT's build refuses such."""
    from model.engines.openvino_engine import OpenVINOEngine

    described = json.loads((engine_folder / ENGINE_FILE).read_text(encoding="utf-8")).get("precision", {})
    meant = {name for name, layer in described.items() if layer["precision"] == "int8"}
    return tuple(sorted(meant - set(engine.execution().int8))) if isinstance(engine, OpenVINOEngine) else ()


def _build_tensorrt(onnx_file: Path, folder: Path, target: str) -> Path:
    """The plan for the GPU at hand; ConfigurationError says which device or package is missing."""
    from model.engines import MissingRuntimeError
    from model.engines.tensorrt_build import build_tensorrt

    try:
        report = build_tensorrt(onnx_file, folder)
    except MissingRuntimeError as error:
        raise ConfigurationError(f"gate.target is {target}, but {error}") from None
    log.info(
        "%s on %s: %d convolutions run in INT8, %d in float",
        onnx_file.name, report.gpu, report.int8_convolutions, report.float_convolutions,
    )  # fmt: skip
    return folder / "model.plan"


def _counts(report: BuildReport) -> tuple[int, int]:
    return report.int8_convolutions, report.float_convolutions


def detect_with(context: StepContext, engine: Engine, images: ImageSet, preprocessing: Preprocessing) -> Detections:
    """Detections of an engine on an image set, as the metric wants them."""
    from model.evaluation import detect

    return detect(engine.run, images, open_images(context), preprocessing, batch_size=1)


def _agreement(
    context: StepContext, engine: Engine, test_set: ImageSet, preprocessing: Preprocessing
) -> AgreementReport:
    """The built engine against the exported file run operator by operator: a runtime's own errors show here."""
    import numpy as np

    from model.data.loader import evaluation_batches
    from model.engines.agreement import compare_outputs
    from model.engines.onnxruntime_engine import OnnxRuntimeEngine

    chosen = test_set.subset(np.arange(min(len(test_set), COMPARED_IMAGES)))
    batches = evaluation_batches(chosen, open_images(context), preprocessing, len(chosen))
    literal = OnnxRuntimeEngine(context.inputs["engine"] / INT8_FILE, optimise=False)
    return compare_outputs(literal, engine, np.concatenate([images for images, _, _ in batches]))


def _torch_error(engine_folder: Path) -> float | None:
    """Mean box error of the exported file against its torch network; not told where it had no confident anchor."""
    summary = json.loads((engine_folder.parent / MANIFEST).read_text(encoding="utf-8"))["summary"]
    error: float | None = summary.get("int8_box_error_mean_px")
    return error if summary.get("int8_confident_anchors") else None


def _write(context: StepContext, judged: Verdict, found: Findings) -> None:
    """Accuracy and latency apart: equal work gives equal accuracy files, while times always differ."""
    scalars = {name: metrics.scalars() for name, metrics in found.metrics.items()}
    write_json(context.output / "accuracy.json", {**scalars, "int8_map_drop_points": found.map_drop_points})
    write_json(context.output / "latency.json", found.latency.to_json())
    _write_precision_recall(context.output / "precision_recall.csv", found.metrics["int8"])
    compared = found.compared
    best = compared.best_of_line if compared else None
    content = judged.to_json()
    content["target"] = {"target": context.parameters.gate.target, "runtime": context.parameters.gate.engine_runtime}
    content["champion_comparison"] = compared.champion.to_json() if compared else None
    content["best_of_line_comparison"] = best.to_json() if best else None
    content["test_images_like_training_images"] = [asdict(one) for one in found.learned]
    content["test_images_quarantined"] = _quarantined_test_images(context)
    write_json(context.output / verdict.FILE, content)


def _write_precision_recall(path: Path, metrics: DetectionMetrics) -> None:
    """The curves behind the picture, at 101 recalls, for `dvc plots diff`."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["class", "recall", "precision", "score"])
        for name, curve in metrics.curves.items():
            points = enumerate(zip(curve.precision, curve.score, strict=True))
            writer.writerows([name, step / 100, precision, score] for step, (precision, score) in points)


def _quarantined_test_images(context: StepContext) -> int:
    from model.data.tables import read_dataset

    return int(read_dataset(context.inputs["target"]).metadata.quarantined.get("test", 0))


def _draw(context: StepContext, metrics: DetectionMetrics, found: Detections, test_set: ImageSet) -> None:
    from pipeline_tasks.accuracy_report import write_accuracy_report

    write_accuracy_report(context.output / "plots", metrics, found, test_set, open_images(context))


def _tell(judged: Verdict, found: Findings) -> None:
    rows = [EngineRow(found.latency.engines[name], found.metrics[name].map50_95) for name in ("int8", "float")]
    if found.learned:
        message = "%d test images are near-duplicates of images the engine has learned from; its mAP may flatter it"
        log.warning(message, len(found.learned))
    for line in (*engine_table(rows), around_line(found.latency.processing)):
        log.info("%s", line)
    (log.info if judged.passed else log.warning)("verdict: %s", judged.sentence())


def _summary(judged: Verdict, found: Findings) -> dict[str, Any]:
    int8, plain = found.latency.engines["int8"], found.latency.engines["float"]
    return {
        "passed": int(judged.passed),
        "verdict": judged.sentence(),
        "int8_map50_95": found.metrics["int8"].map50_95,
        "float_map50_95": found.metrics["float"].map50_95,
        "int8_map50": found.metrics["int8"].map50,
        "int8_latency_p50_ms": int8.p50_ms,
        "int8_latency_p99_ms": int8.p99_ms,
        "float_latency_p50_ms": plain.p50_ms,
        "speedup": found.latency.speedup,
        "preprocessing_p50_ms": found.latency.processing["preprocessing"].p50_ms,
        "postprocessing_p50_ms": found.latency.processing["postprocessing"].p50_ms,
    }
