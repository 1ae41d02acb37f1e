"""A run in MLflow for one `nasline bench`: its table, numbers and files."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline_tasks.tracking.client import connect, one_line, server_errors, shown_uri
from pipeline_tasks.tracking.experiments import find_or_create_experiment
from pipeline_tasks.tracking.mirror import STEP_TAG, address
from pipeline_tasks.workspace import Workspace

log = logging.getLogger(__name__)

REFUSED = re.compile(r"[^A-Za-z0-9_.-]+")
"""What is not kept of an engine's name in that of a metric: MLflow refuses most of it, and slashes make folders."""
LONGEST_NAME = 200
TABLE_FILE = "table.json"


@dataclass(frozen=True)
class BenchRun:
    """What one comparison leaves in MLflow.

    metrics: by engine, then by name. table: columns for MLflow's own table view. files: pictures and records.
    """

    name: str
    parameters: Mapping[str, str]
    tags: Mapping[str, str]
    metrics: Mapping[str, Mapping[str, float]]
    table: Mapping[str, Sequence[object]]
    files: Sequence[Path]


def log_bench(workspace: Workspace, experiment: str, bench: BenchRun) -> str | None:
    """Log it as a finished run; gives the run's address, None with a warning when the server is away."""
    from mlflow.entities import Metric, Param

    try:
        client = connect(workspace)
        experiment_id = find_or_create_experiment(client, experiment)
        run = client.create_run(experiment_id, run_name=bench.name, tags={STEP_TAG: "bench", **bench.tags})
        run_id, stamp = str(run.info.run_id), int(run.info.start_time)
        metrics = [Metric(name, value, stamp, 0) for name, value in metric_entries(bench.metrics)]
        params = [Param(key, value) for key, value in bench.parameters.items()]
        client.log_batch(run_id, metrics=metrics, params=params)
        client.log_table(run_id, {name: list(column) for name, column in bench.table.items()}, TABLE_FILE)
        for file in bench.files:
            client.log_artifact(run_id, str(file))
        client.set_terminated(run_id, status="FINISHED")
        return address(workspace, experiment_id, run_id)
    except server_errors() as error:
        place, reason = shown_uri(workspace), one_line(error)
        log.warning("tracking server at %s is away (%s); the result is not in MLflow", place, reason)
        return None


def metric_entries(metrics: Mapping[str, Mapping[str, float]]) -> list[tuple[str, float]]:
    """`latency_p50_ms/ENGINE` and its value; engines are told apart where their names become equal."""
    names = [REFUSED.sub("-", engine).strip("-")[:LONGEST_NAME] for engine in metrics]
    labels = names if len(set(names)) == len(names) else [f"{place}-{name}" for place, name in enumerate(names, 1)]
    return [
        (f"{name}/{label}", value)
        for label, values in zip(labels, metrics.values(), strict=True)
        for name, value in values.items()
    ]
