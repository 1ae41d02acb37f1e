"""A pipeline run as the tracking server remembers it: enough to repeat it where its workspace is gone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pipeline_tasks.tracking.client import ask, open_store, store_exists
from pipeline_tasks.tracking.mirror import RUN_FILE, RUN_TAG, STEP_TAG
from pipeline_tasks.workspace import Workspace


@dataclass(frozen=True)
class RecordedRun:
    """What was frozen when the run started, and the final numbers of its steps, as `STEP/NAME`."""

    frozen: dict[str, Any]
    metrics: dict[str, float]


def recorded_run(workspace: Workspace, run: str) -> RecordedRun | None:
    """The newest run of that id; None where the server knows none, or one that was logged without its run.json.

    Raises:
        UnavailableError: the server is away.
    """
    if not store_exists(workspace):
        return None
    client = open_store(workspace)
    return ask(lambda: _find(client, run), workspace)


def _find(client: Any, run: str) -> RecordedRun | None:
    import mlflow

    experiments = [one.experiment_id for one in client.search_experiments()]
    query = f"tags.`{RUN_TAG}` = '{run}' and tags.`{STEP_TAG}` = 'pipeline'"
    runs = client.search_runs(experiments, query, order_by=["attributes.start_time DESC"], max_results=1)
    if not runs or not any(file.path == RUN_FILE for file in client.list_artifacts(runs[0].info.run_id)):
        return None
    frozen = mlflow.artifacts.load_dict(f"{runs[0].info.artifact_uri}/{RUN_FILE}")
    return RecordedRun(frozen, dict(runs[0].data.metrics))
