"""The champion on today's data, every day: a drop beyond the limit is an alert, and may start a retraining."""

from __future__ import annotations

import os
from datetime import UTC, datetime, timedelta
from typing import Any

from airflow.sdk import DAG, CronTriggerTimetable, get_current_context, task
from airflow.sdk.definitions.param import ParamsDict
from airflow.sdk.exceptions import AirflowFailException
from pipeline_chain import CHAMPION_DROP, DAG_ARGUMENTS, parameter_arguments
from step_operator import REFERENCE_KEY, StartOperator
from trigger_form import trigger_form

CRON = os.environ.get("NASLINE_EVALUATE_CRON", "0 5 * * *")

DOCUMENTATION = f"""
### How good is the champion today?

Runs at `{CRON}` (UTC, `NASLINE_EVALUATE_CRON`): measures the champion on the test images of `start.dataset` as it is
now and compares with what the gate measured when the version was accepted. Neither champion nor data changed since the
last time: nothing is measured again.

When more than `register.maximum_champion_drop` points are lost, the task `alert` fails, the run turns red, and whoever
is configured is told (`NASLINE_ALERT_WEBHOOK`, `NASLINE_ALERT_EMAIL`). With `register.retrain_on_drop` the asset
`nasline_champion_drop` gets an event, which starts `retrain_yolo_nas` where that is not paused.

The DAG is paused when it is new. Again: clear `evaluate`.
"""
EVALUATE = """
### nasline evaluate-champion

- **Reads** the champion from the registry, and the labelled test images of `start.dataset`
- **Leaves** `evaluations/NAME-vN-DATA/` in the workspace: metrics.json, tables and pictures; and a run in MLflow
- **Again** clear the task; what was measured already is told from that folder
- **By hand** the first line of the task's log is the command
"""


@task.branch(task_id="judge", retries=0, doc_md="Lets `alert` run after a drop, and `retrain` where that is wanted.")
def judge() -> list[str]:
    """Ids of the tasks whose turn it is."""
    return after_evaluation(_evaluated())


def after_evaluation(reference: dict[str, Any]) -> list[str]:
    """What follows an evaluation, from the reference that it left."""
    found = reference["summary"]
    if not found["dropped"]:
        return []
    return ["alert", "retrain"] if found["retrain"] else ["alert"]


@task(task_id="alert", retries=0, doc_md="Fails with the sentence of the evaluation, so that it cannot be overlooked.")
def alert() -> None:
    """A red run, and the message of the failure callback."""
    raise AirflowFailException(_evaluated()["sentence"])


@task(
    task_id="retrain", outlets=[CHAMPION_DROP], doc_md="Gives the event to the asset that `retrain_yolo_nas` follows."
)
def retrain() -> None:
    """Airflow adds the event when the task ends well."""


def _evaluated() -> dict[str, Any]:
    found: dict[str, Any] = get_current_context()["ti"].xcom_pull(task_ids="evaluate", key=REFERENCE_KEY)
    return found


FORM = trigger_form(only=("start.dataset", "start.model_name", "start.experiment", "register."))

with DAG(
    "evaluate_champion",
    description="The champion on today's data; a drop is an alert and may start a retraining",
    doc_md=DOCUMENTATION,
    schedule=CronTriggerTimetable(CRON, timezone="UTC"),
    start_date=datetime(2026, 1, 1, tzinfo=UTC),
    is_paused_upon_creation=True,
    **{**DAG_ARGUMENTS, "max_active_runs": 1},
) as dag:
    start = StartOperator(
        form=FORM,
        task_id="evaluate",
        step="evaluate-champion",
        arguments=parameter_arguments(),
        doc_md=EVALUATE,
        execution_timeout=timedelta(hours=6),
    )
    start >> judge() >> [alert(), retrain()]

dag.params = ParamsDict(FORM)  # last: each task made after it would get a copy of the whole form
