"""Files with a line of JSON per epoch or per sample, sent to MLflow: each line once, many in one call."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

METRICS_PER_CALL = 900
"""Below MLflow's limit of 1000 metrics in one batch."""
CURVES = ("loss", "map50_95", "map50", "learning_rate")
"""These of a training step go to the pipeline run too, so that MLflow draws several runs in one chart."""


def log_epochs(
    client: MlflowClient, parent: dict[str, Any], state: dict[str, Any], reference: str, path: Path | None
) -> None:
    """Send the epochs that are new in metrics.jsonl: all to the step's run, some as `curves/STEP/NAME` to its parent.

    The time stamp is made from the epoch: sending a line twice then stores it once (MLflow drops equal points).
    """
    from mlflow.entities import Metric

    lines = new_lines(path, state, "metric_lines")
    own, upward = [], []
    for line in lines:
        epoch = int(line.pop("epoch"))
        stamp = int(parent["started_ms"]) + epoch * 1000
        for name, value in _numbers(line).items():
            own.append(Metric(metric_name(name), value, stamp, epoch))
            if name in CURVES:
                upward.append(Metric(metric_name(f"curves/{reference}/{name}"), value, stamp, epoch))
    _send(client, state["run_id"], own)
    _send(client, parent["run_id"], upward)
    state["metric_lines"] = int(state.get("metric_lines", 0)) + len(lines)


def log_samples(client: MlflowClient, state: dict[str, Any], path: Path | None) -> None:
    """Send what was sampled of the machine, under the names of MLflow's page "System metrics"."""
    from mlflow.entities import Metric

    lines = new_lines(path, state, "system_lines")
    first = int(state.get("system_lines", 0))
    metrics = [
        Metric(f"system/{name}", value, int(stamp), step)
        for step, line in enumerate(lines, first)
        for stamp in [line.pop("time_ms")]
        for name, value in _numbers(line).items()
    ]
    _send(client, state["run_id"], metrics)
    state["system_lines"] = first + len(lines)


def new_lines(path: Path | None, state: dict[str, Any], counter: str) -> list[dict[str, Any]]:
    """The lines after those that were sent; one that is being written now waits for the next time."""
    if path is None or not path.exists():
        return []
    whole, _, _ = path.read_text(encoding="utf-8").rpartition("\n")
    return [json.loads(line) for line in whole.splitlines()[int(state.get(counter, 0)) :]]


def _numbers(line: dict[str, Any]) -> dict[str, float]:
    return {
        name: float(value)
        for name, value in line.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }


def _send(client: MlflowClient, run_id: str, metrics: Sequence[Any]) -> None:
    for start in range(0, len(metrics), METRICS_PER_CALL):
        client.log_batch(run_id, metrics=metrics[start : start + METRICS_PER_CALL])


def metric_name(name: str) -> str:
    """MLflow accepts letters, digits, and _-. /:"""
    return "".join(c if c.isalnum() or c in "_-. /:" else "_" for c in name)
