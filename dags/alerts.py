"""What Airflow does when a task has failed for good, or a run takes too long: it tells the people who run Nasline."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from typing import Any
from urllib.parse import quote

from pipeline_tasks.notification import send

DEADLINE_HOURS = "NASLINE_DEADLINE_HOURS"


def task_failed(context: Mapping[str, Any]) -> None:
    """Failure callback of every task: the step's own words, and where to look."""
    instance = context["ti"]
    where = f"{instance.dag_id} · {instance.task_id} · {instance.run_id}"
    send(f"{instance.dag_id}: {instance.task_id} failed", failure_lines(context, where))


def failure_lines(context: Mapping[str, Any], where: str) -> list[str]:
    """The first line of the error, the run, and the addresses of both pages."""
    first = next(iter(str(context.get("exception") or "it was stopped").splitlines()), "it was stopped")
    mlflow = getattr(context.get("task"), "mlflow_url", "")
    return [first, where, *([f"MLflow {mlflow}"] if mlflow else []), f"Airflow {airflow_url(context['ti'])}"]


def airflow_url(instance: Any) -> str:
    """The task's page."""
    from airflow.sdk.configuration import conf

    base = str(conf.get("api", "base_url", fallback="http://localhost:8080")).rstrip("/")
    return f"{base}/dags/{instance.dag_id}/runs/{quote(instance.run_id)}/tasks/{instance.task_id}"


def deadline_argument(environment: Mapping[str, str]) -> dict[str, Any]:
    """With NASLINE_DEADLINE_HOURS a run that has not ended so long after it was queued raises an alert; else none.

    Not set by default: the time of a training depends on its data, and Airflow calls deadlines experimental.
    """
    hours = environment.get(DEADLINE_HOURS)
    if not hours:
        return {}
    from airflow.sdk import AsyncCallback, DeadlineAlert, DeadlineReference

    return {
        "deadline": DeadlineAlert(
            reference=DeadlineReference.DAGRUN_QUEUED_AT,
            interval=timedelta(hours=float(hours)),
            callback=AsyncCallback("pipeline_tasks.notification.deadline_missed"),
        )
    }
