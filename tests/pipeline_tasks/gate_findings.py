"""What a gate has measured, made up: an engine that passes everything, to be changed by the tests."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from model.data.image_set import ImageSet
from model.detections import Detections
from model.engines.agreement import AgreementReport
from model.engines.latency import DeviceFacts, LatencyRecord
from model.engines.processing_time import ProcessingRecord
from model.evaluation import DetectionMetrics, evaluate
from pipeline_tasks.champion import Comparison, Comparisons
from pipeline_tasks.gate_latency import GateLatency
from pipeline_tasks.gate_rules import Findings

DEVICE = DeviceFacts("Test CPU", "cpu", 2, ("avx2",), 2400.0, "performance", 0.1)


def record(name: str, milliseconds: float, **changes: Any) -> LatencyRecord:
    """Every call took as long, the slowest of a hundred twice as long."""
    precision = "int8" if name == "int8" else "float32"
    made = LatencyRecord(
        name=name, device=DEVICE, device_after=DEVICE, runtime="openvino", runtime_version="2026.4.1-1",
        precision=precision, threads=2, batch=1, input_size=320, includes_preprocessing=False,
        includes_postprocessing=False, warmup_seconds=1.0, repeats=200, interleaved_with=("int8", "float"),
        min_ms=milliseconds, p50_ms=milliseconds, p90_ms=milliseconds, p99_ms=2 * milliseconds, cpu_ms=milliseconds,
        cpu_min_ms=milliseconds, gpu_min_ms=None, gpu_p50_ms=None, gpu_p90_ms=None, gpu_p99_ms=None, spread=0.0,
        spread_limit=0.5, noisy=False, repetitions=1, attempt_spreads=(0.0,),
    )  # fmt: skip
    return replace(made, **changes)


def metrics(lost_boxes: int = 0) -> DetectionMetrics:
    """30 boxes of `cat` and 10 of `dog`; the last boxes of `cat` are not found."""
    boxes = [(10.0 * index, 10.0, 8.0, 8.0) for index in range(40)]
    images = ImageSet.from_arrays(("cat", "dog"), ["a"], [(500, 50)], [0] * 40, boxes, [0] * 30 + [1] * 10)
    truth = images.all_boxes()
    ones = np.ones(len(truth.labels), np.float32)
    all_found = Detections(truth.image_index, truth.boxes_xyxy.astype(np.float32), ones, truth.labels)
    return evaluate(all_found.select(np.r_[lost_boxes:40]), images)


def findings(**changes: Any) -> Findings:
    """INT8 finds everything, in half of the time."""
    around = ProcessingRecord("what it is", 16, 10, 0.1, 0.2, 0.3, 0.4, 0.1)
    processing = {"preprocessing": around, "postprocessing": around}
    latency = GateLatency({"int8": record("int8", 5.0), "float": record("float", 10.0)}, processing)
    agreement = AgreementReport("onnxruntime", "openvino", 16, 0.3, 120, 0.1, 0.4, 0.001, 0.01, 0.02)
    made = Findings(
        metrics={"int8": metrics(), "float": metrics()},
        latency=latency,
        agreement=agreement,
        precision="int8",
        float_instead=(),
        megabytes=12.0,
        licences={"image": {"MIT"}, "annotation": {"CC BY 4.0"}, "weights": {"random initialisation"}},
        compared=None,
    )
    return replace(made, **changes)


def comparison(**changes: Any) -> Comparison:
    """A candidate that is surely worse than `yolo v1` by two points."""
    values: dict[str, Any] = {
        "champion": "yolo v1", "champion_map50_95": 0.50, "candidate_map50_95": 0.48, "images": 40,
        "images_with_boxes": 40, "excluded": (),
        "hashed": True, "shared_classes": ("a", "b"), "removed_classes": (), "added_classes": {},
        "share_of_resamples_worse": 0.99, "interval_points": (-3.0, -1.0),
    }  # fmt: skip
    return Comparison(**{**values, **changes})


def compared(best: Comparison | None = None, **changes: Any) -> Comparisons:
    """Against the champion, by default a candidate that is better, and against another best of its line."""
    better = {"candidate_map50_95": 0.6, "share_of_resamples_worse": 0.0, **changes}
    return Comparisons(comparison(**better), best)
