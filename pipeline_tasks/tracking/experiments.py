"""Experiments in MLflow, each with a saved view: the columns in which its table of runs answers what people ask.

MLflow 3.17 keeps the views of its menu **Views** as tags of the experiment; its pages read and write them.
"""

from __future__ import annotations

import base64
import json
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlflow.entities import Experiment
    from mlflow.tracking import MlflowClient

VIEW = "nasline"
COLUMNS = (
    *(f"tags.`nasline.{name}`" for name in ("data", "variant", "gate", "registered", "is_champion")),
    *(f"metrics.`gate/{name}`" for name in ("int8_map50_95", "int8_latency_p50_ms")),
)
"""Which data, which networks, what the gate said, what was registered, which is champion and why, and how good."""

KIND_TAG = "mlflow.experimentKind"
VIEW_TAG = f"mlflow.sharedViewState.{VIEW}"


def find_or_create_experiment(client: MlflowClient, name: str) -> str:
    """The experiment's id; two steps may want to create it at the same moment."""
    found = client.get_experiment_by_name(name) or _create(client, name)
    for tag, value in page_tags(int(found.creation_time or 0)).items():
        if tag not in found.tags:
            client.set_experiment_tag(found.experiment_id, tag, value)
    return str(found.experiment_id)


def page_tags(created_ms: int) -> dict[str, str]:
    """MLflow's pages for trained models instead of those for language models, and the saved view."""
    state = {
        "searchFilter": "", "orderByKey": "attributes.start_time", "orderByAsc": False, "startTime": "ALL",
        "lifecycleFilter": "Active", "datasetsFilter": [], "modelVersionFilter": "All Runs",
        "selectedColumns": list(COLUMNS), "columnOrder": [], "columnWidths": {}, "runsHiddenMode": "FIRST_10_RUNS",
        "viewMaximized": False, "runListHidden": False, "isAccordionReordered": False,
        "useGroupedValuesInCharts": True, "hideEmptyCharts": True, "groupBy": None, "groupsExpanded": {},
        "globalLineChartConfig": {"xAxisKey": "step", "lineSmoothness": 0, "selectedXAxisMetricKey": ""},
    }  # fmt: skip
    view = {"name": VIEW, "createdAt": created_ms, "updatedAt": created_ms, "state": _packed(state)}
    return {KIND_TAG: "custom_model_development", VIEW_TAG: json.dumps(view)}


def _packed(state: dict[str, Any]) -> str:
    """As MLflow's pages pack it: deflated JSON in base 64."""
    return "deflate;" + base64.b64encode(zlib.compress(json.dumps(state).encode())).decode()


def _create(client: MlflowClient, name: str) -> Experiment:
    from mlflow.exceptions import MlflowException

    try:
        return client.get_experiment(client.create_experiment(name, artifact_location=_artifact_location()))
    except MlflowException:
        found = client.get_experiment_by_name(name)
        if found is None:
            raise
        return found


def _artifact_location() -> str | None:
    """Only a local store needs a place named; a server has its own."""
    import mlflow

    uri = mlflow.get_tracking_uri()
    if not uri.startswith("sqlite:///"):
        return None
    return (Path(uri.removeprefix("sqlite:///")).resolve().parent / "mlflow-artifacts").as_uri()
