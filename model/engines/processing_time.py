"""What a picture costs before and behind the network: its fitting to the input, and the suppression of its boxes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

from model.detections import detections_in_original_pixels
from model.engines import Engine
from model.engines.latency import measure_interleaved, percentiles
from model.preprocessing import Preprocessing

WHAT = {
    "preprocessing": "a decoded picture made to fit the input (letterbox); reading and decoding the file are not in it",
    "postprocessing": "boxes above the score threshold, non-maximum suppression, back to the picture's pixels",
}


@dataclass(frozen=True)
class ProcessingRecord:
    """Time for one picture on the CPU, over all pictures and rounds; cpu_min_ms: least processor time."""

    what: str
    images: int
    repeats: int
    min_ms: float
    p50_ms: float
    p90_ms: float
    p99_ms: float
    cpu_min_ms: float

    def to_json(self) -> dict[str, object]:
        """The fields as a JSON-ready dictionary."""
        return asdict(self)


def measure_processing(
    engine: Engine,
    pictures: Sequence[NDArray[np.uint8]],
    preprocessing: Preprocessing,
    *,
    score_threshold: float,
    iou_threshold: float,
    rounds: int = 10,
) -> dict[str, ProcessingRecord]:
    """Both on real pictures, RGB uint8 (H, W, 3), with the engine's own outputs; batch one, after one round untimed.

    Raises ``ValueError`` when there is no picture.
    """
    if not pictures:
        raise ValueError("there is no picture to time the processing on")
    fitted = [preprocessing.apply(picture) for picture in pictures]
    outputs = [engine.run(pixels[None]) for pixels, _ in fitted]
    before = [functools.partial(preprocessing.apply, picture) for picture in pictures]
    behind = [
        functools.partial(
            detections_in_original_pixels,
            *output,
            [letterbox],
            score_threshold=score_threshold,
            iou_threshold=iou_threshold,
            max_detections=300,
        )
        for output, (_, letterbox) in zip(outputs, fitted, strict=True)
    ]
    return {
        "preprocessing": _record("preprocessing", before, rounds),
        "postprocessing": _record("postprocessing", behind, rounds),
    }


def _record(name: str, calls: Sequence[Callable[[], object]], rounds: int) -> ProcessingRecord:
    named: Mapping[str, Callable[[], object]] = {str(index): call for index, call in enumerate(calls)}
    timings = measure_interleaved(named, warmup_seconds=0.0, repeats=rounds).values()
    minimum, p50, p90, p99 = percentiles(np.concatenate([timing.wall_ms for timing in timings]))
    cpu_minimum = min(float(timing.cpu_ms.min()) for timing in timings)
    return ProcessingRecord(WHAT[name], len(calls), rounds, minimum, p50, p90, p99, cpu_minimum)
