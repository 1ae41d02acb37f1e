"""A run in MLflow for one look at the champion: what it is worth on today's data."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from pipeline_tasks.tracking.client import connect, one_line, server_errors, shown_uri
from pipeline_tasks.tracking.experiments import find_or_create_experiment
from pipeline_tasks.tracking.mirror import NOTE_TAG, RUN_TAG, STEP_TAG, address

if TYPE_CHECKING:
    from pipeline_tasks.commands.evaluate_champion import Evaluation
    from pipeline_tasks.workspace import Workspace

log = logging.getLogger(__name__)

STEP = "evaluate_champion"


def log_evaluation(workspace: Workspace, experiment: str, found: Evaluation, run: str | None) -> str | None:
    """Log it as a finished run; gives its address, None with a warning when the server is away."""
    from mlflow.entities import Metric

    tags = {
        STEP_TAG: STEP,
        NOTE_TAG: found.sentence(),
        "nasline.data": found.data,
        "nasline.champion": f"{found.name} v{found.version}",
        "nasline.verdict": "dropped" if found.dropped else "holds",
        **({RUN_TAG: run} if run else {}),
    }
    numbers = {"map50_95": found.today, "map50_95_at_the_gate": found.before, "drop_points": found.drop_points}
    try:
        client = connect(workspace)
        experiment_id = find_or_create_experiment(client, experiment)
        name = f"{found.name} v{found.version} on {found.data}"
        made = client.create_run(experiment_id, run_name=name, tags=tags).info
        metrics = [Metric(f"champion/{key}", value, int(made.start_time), 0) for key, value in numbers.items()]
        client.log_batch(made.run_id, metrics=metrics)
        for place in ("metrics.json", "plots"):
            if (found.folder / place).exists():
                client.log_artifact(made.run_id, str(found.folder / place))
        client.set_terminated(made.run_id, status="FINISHED")
        return address(workspace, experiment_id, made.run_id)
    except server_errors() as error:
        place, reason = shown_uri(workspace), one_line(error)
        log.warning("tracking server at %s is away (%s); the result is not in MLflow", place, reason)
        return None
