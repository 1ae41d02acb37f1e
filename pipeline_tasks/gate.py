"""`nasline gate`: build the target's engines, measure accuracy and latency on them, judge."""

from __future__ import annotations

import csv
import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline_tasks import champion, verdict
from pipeline_tasks.errors import ConfigurationError, TemporaryError
from pipeline_tasks.execution import StepContext
from pipeline_tasks.export import FLOAT_FILE, INT8_FILE
from pipeline_tasks.training_task import open_images
from pipeline_tasks.verdict import Rule, Verdict, at_least, at_most
from pipeline_tasks.workspace import write_json

if TYPE_CHECKING:
    from model.data.image_set import ImageSet
    from model.detections import Detections
    from model.engines import Engine
    from model.engines.agreement import AgreementReport
    from model.engines.latency import LatencyRecord
    from model.engines.openvino_engine import BuildReport
    from model.evaluation import DetectionMetrics
    from model.preprocessing import Preprocessing
    from pipeline_tasks.params import GateParameters

log = logging.getLogger(__name__)

COMPARED_IMAGES = 16


def gate(context: StepContext) -> dict[str, Any]:
    """Measure both engines of the target on the test split and write verdict.json.

    A rejection is a result: it is published, and the command's exit code 99 tells it.
    """
    from model.data.tables import read_dataset
    from model.evaluation import evaluate

    engine_folder = context.inputs["engine"]
    preprocessing = read_preprocessing(engine_folder)
    test_set = read_dataset(context.inputs["target"]).split("test")
    engines = _build_engines(context, engine_folder)
    found = {name: detect_with(context, engine, test_set, preprocessing) for name, engine in engines.items()}
    metrics = {name: evaluate(detections, test_set) for name, detections in found.items()}
    latency = _measure_latency(context, engines, preprocessing)
    comparison = champion.compare(context, found["int8"], test_set)
    agreement = _agreement(context, engines["int8"], test_set, preprocessing)
    judged = _judge(context, metrics, latency, comparison, agreement, engines["int8"].precision)
    _write(context, judged, metrics, latency, comparison)
    _draw(context, metrics["int8"], found["int8"], test_set)
    (log.info if judged.passed else log.warning)("verdict: %s", judged.sentence())
    return _summary(judged, metrics, latency)


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

    if given.runtime == "openvino":
        from model.engines.openvino_engine import build_openvino

        report = build_openvino(onnx_file, folder, given.latency_threads)
        log.info("%s: %d convolutions run in INT8, %d in float", onnx_file.name, *_counts(report))
        onnx_file = folder / "model.xml"
    if given.runtime == "tensorrt":
        onnx_file = _build_tensorrt(onnx_file, folder)
    return load_engine(onnx_file, runtime=given.runtime, threads=given.latency_threads)


def _build_tensorrt(onnx_file: Path, folder: Path) -> Path:
    """The plan for the GPU at hand; ConfigurationError says which device or package is missing."""
    from model.engines import MissingRuntimeError
    from model.engines.tensorrt_build import build_tensorrt

    try:
        report = build_tensorrt(onnx_file, folder)
    except MissingRuntimeError as error:
        raise ConfigurationError(f"gate.runtime is tensorrt, but {error}") from None
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


def _measure_latency(
    context: StepContext, engines: dict[str, Engine], preprocessing: Preprocessing
) -> dict[str, LatencyRecord]:
    """Batch one, engines interleaved; a measurement that scatters too much is repeated, then refused."""
    import numpy as np

    from model.engines.latency import measure_latency

    given = context.parameters.gate
    size = preprocessing.input_size
    image = np.random.default_rng(0).integers(0, 256, (1, 3, size, size), dtype=np.uint8)
    records = measure_latency(
        engines, image, warmup_seconds=1.0, repeats=given.latency_repeats, spread_limit=given.maximum_spread
    )
    _refuse_noise(records, needed=given.maximum_latency_ms is not None or given.minimum_speedup is not None)
    return records


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


def _refuse_noise(records: dict[str, LatencyRecord], needed: bool) -> None:
    """No rule may judge a noisy measurement; without a latency rule it is recorded as noisy."""
    from model.engines.latency import require_quiet

    try:
        require_quiet(records.values())
    except ValueError as error:
        if needed:
            raise TemporaryError(str(error)) from None
        log.warning("%s; no latency rule is on, so the record is kept and marked noisy", error)


def _judge(
    context: StepContext,
    metrics: dict[str, DetectionMetrics],
    latency: dict[str, LatencyRecord],
    comparison: champion.Comparison | None,
    agreement: AgreementReport,
    precision: str,
) -> Verdict:
    given, engine_folder = context.parameters.gate, context.inputs["engine"]
    int8, plain = metrics["int8"].map50_95, metrics["float"].map50_95
    speedup = latency["float"].min_ms / latency["int8"].min_ms
    compared = f"{agreement.images} test images, {agreement.confident_anchors} confident anchors"
    megabytes = (engine_folder / INT8_FILE).stat().st_size / 1e6
    on_test = f"test split, {given.runtime} on {given.target}"
    timed = f"{latency['int8'].device.device}, {latency['int8'].threads or 'all'} threads, batch 1, interleaved"
    rules = [
        *at_least("INT8 mAP50-95", int8, given.minimum_map, "", on_test),
        *at_most("mAP50-95 lost by INT8", 100 * (plain - int8), given.maximum_map_drop, "points", on_test),
        Rule("precision of the built engine", "int8", precision, "", given.runtime, precision == "int8"),
        *at_most("box error", agreement.box_error_mean_px, given.maximum_box_error_pixels, "pixels", compared),
        *at_most("INT8 latency p50", latency["int8"].p50_ms, given.maximum_latency_ms, "ms", timed),
        *at_least("speed-up over float", speedup, given.minimum_speedup, "times", timed),
        *at_most("INT8 file size", megabytes, given.maximum_size_megabytes, "MB", INT8_FILE),
        *_licence_rules(context),
        *champion.rules(comparison, given),
    ]
    return Verdict(tuple(rules))


def _licence_rules(context: StepContext) -> list[Rule]:
    """What the engine descends from, each kind apart; a licence that is not listed, or unknown, is not accepted."""
    given = context.parameters.gate
    lineage = json.loads((context.inputs["engine"] / "engine.json").read_text(encoding="utf-8"))["lineage"]
    found = {
        "image": {name for counts in lineage["images"].values() for name in counts},
        "annotation": set(lineage["annotations"]),
        "weights": set(lineage["weights"]),
    }
    accepted = {kind: getattr(given, f"require_{kind}_licence") for kind in found}
    return [_licence_rule(kind, found[kind], names) for kind, names in accepted.items() if names is not None]


def _licence_rule(kind: str, found: set[str], accepted: list[str]) -> Rule:
    refused = sorted(found - set(accepted))
    measured = "not accepted: " + ", ".join(refused) if refused else "policy satisfied"
    return Rule(f"{kind} licences", ", ".join(accepted), measured, "", "lineage of the engine", not refused)


def _write(
    context: StepContext,
    judged: Verdict,
    metrics: dict[str, DetectionMetrics],
    latency: dict[str, LatencyRecord],
    comparison: champion.Comparison | None,
) -> None:
    """Accuracy and latency apart: equal work gives equal accuracy files, while times always differ."""
    drop = 100 * (metrics["float"].map50_95 - metrics["int8"].map50_95)
    scalars = {name: entry.scalars() for name, entry in metrics.items()}
    write_json(context.output / "accuracy.json", {**scalars, "int8_map_drop_points": drop})
    write_json(context.output / "latency.json", {name: record.to_json() for name, record in latency.items()})
    _write_precision_recall(context.output / "precision_recall.csv", metrics["int8"])
    quarantined = _quarantined_test_images(context)
    content = judged.to_json()
    content["champion_comparison"] = comparison.to_json() if comparison else None
    content["test_images_quarantined"] = quarantined
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


def _summary(
    judged: Verdict, metrics: dict[str, DetectionMetrics], latency: dict[str, LatencyRecord]
) -> dict[str, Any]:
    return {
        "passed": int(judged.passed),
        "verdict": judged.sentence(),
        "int8_map50_95": metrics["int8"].map50_95,
        "float_map50_95": metrics["float"].map50_95,
        "int8_map50": metrics["int8"].map50,
        "int8_latency_p50_ms": latency["int8"].p50_ms,
        "float_latency_p50_ms": latency["float"].p50_ms,
        "speedup": latency["float"].min_ms / latency["int8"].min_ms,
    }
