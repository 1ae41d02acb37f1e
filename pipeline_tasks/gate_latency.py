"""The gate's stopwatch: both engines against each other on the target, and the processing around them."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipeline_tasks.errors import TemporaryError
from pipeline_tasks.training_task import open_images

if TYPE_CHECKING:
    from model.data.image_set import ImageSet
    from model.engines import Engine
    from model.engines.latency import LatencyRecord
    from model.engines.processing_time import ProcessingRecord
    from model.preprocessing import Preprocessing
    from pipeline_tasks.execution import StepContext
    from pipeline_tasks.gate_parameters import GateParameters

log = logging.getLogger(__name__)

GPU_REPEATS = 1000
"""A GPU's clock falls as it works: its first milliseconds are not what it holds."""
PROCESSED_PICTURES = 16
COMPARED_TIME = {"cpu": "min_ms", "gpu": "p50_ms"}
"""By which time engines are compared: on a CPU the minimum, which noise spares; a GPU's is the burst of a cool chip."""


@dataclass(frozen=True)
class GateLatency:
    """Records of the engines by name (`int8`, `float`), and of what is done before and behind them."""

    engines: dict[str, LatencyRecord]
    processing: dict[str, ProcessingRecord]

    @property
    def speedup(self) -> float:
        """Float over INT8."""
        return speedup(self.engines["float"].to_json(), self.engines["int8"].to_json())

    def to_json(self) -> dict[str, Any]:
        """The content of latency.json."""
        timed = {name: record.to_json() for name, record in self.engines.items()}
        return timed | {name: record.to_json() for name, record in self.processing.items()}


def speedup(slow: Mapping[str, Any], fast: Mapping[str, Any]) -> float:
    """How many times as fast the second is, from two records as they lie in latency.json."""
    time = COMPARED_TIME[fast["device"]["kind"]]
    return float(slow[time] / fast[time])


def measure(
    context: StepContext, engines: dict[str, Engine], preprocessing: Preprocessing, test_set: ImageSet
) -> GateLatency:
    """Engines interleaved, batch one or the one they are fixed to; what scatters too much is repeated, then refused.

    Raises:
        TemporaryError: it scatters too much in every attempt, and a latency rule would have to judge by it.
    """
    import numpy as np

    from model.engines.latency import measure_latency

    given, size = context.parameters.gate, preprocessing.input_size
    records = measure_latency(  # of an engine with a fixed batch: with that many images
        engines,
        np.random.default_rng(0).integers(0, 256, (1, 3, size, size), dtype=np.uint8),
        warmup_seconds=given.latency_warmup_seconds,
        repeats=given.latency_repeats if given.target == "cpu" else max(given.latency_repeats, GPU_REPEATS),
        spread_limit=given.maximum_spread,
        attempts=given.latency_attempts,
        kind="cpu" if given.target == "cpu" else "gpu",
    )
    _refuse_noise(records, given)
    return GateLatency(records, _processing(context, engines["int8"], preprocessing, test_set))


def _processing(
    context: StepContext, engine: Engine, preprocessing: Preprocessing, test_set: ImageSet
) -> dict[str, ProcessingRecord]:
    from model.engines.processing_time import measure_processing

    open_image = open_images(context)
    deployed = json.loads((context.inputs["engine"] / "engine.json").read_text(encoding="utf-8"))
    return measure_processing(
        engine,
        [open_image(test_set.path(index)) for index in range(min(len(test_set), PROCESSED_PICTURES))],
        preprocessing,
        score_threshold=deployed["score_threshold"],
        iou_threshold=deployed["iou_threshold"],
    )


def _refuse_noise(records: dict[str, LatencyRecord], given: GateParameters) -> None:
    """No rule may judge a noisy measurement; without a latency rule it is recorded as noisy."""
    from model.engines.latency import require_quiet

    limits = (given.maximum_latency_ms, given.maximum_latency_p99_ms, given.minimum_speedup)
    try:
        require_quiet(records.values())
    except ValueError as error:
        if any(limit is not None for limit in limits):
            raise TemporaryError(f"{error} (gate.maximum_spread)") from None
        log.warning("%s; no latency rule is on, so the record is kept and marked noisy", error)
