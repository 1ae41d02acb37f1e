"""Pipeline runs as the tracking store knows them: their facts for the commands `runs` and `compare`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from pipeline_tasks.run_facts import Curves, RunFacts
from pipeline_tasks.tracking.client import ask, open_store, store_exists
from pipeline_tasks.tracking.mirror import PARENT_TAG, RUN_TAG, STEP_TAG
from pipeline_tasks.workspace import Workspace

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.tracking import MlflowClient

PIPELINE = "pipeline"
"""Value of STEP_TAG at a parent run."""
PAGE = 500
NOT_FINAL = ("curves/",)
NOT_CURVES = ("final/", "system/")


def list_runs(workspace: Workspace, limit: int) -> list[RunFacts]:
    """The newest pipeline runs of all experiments, without their curves.

    Raises:
        UnavailableError: the tracking server does not answer.
    """
    if not store_exists(workspace):
        return []
    client = open_store(workspace)
    found = ask(lambda: list(_first(_search(client, _pipeline()), limit)), workspace)
    return [_facts(one) for one in found or []]


def find_run(workspace: Workspace, run: str) -> RunFacts | None:
    """A pipeline run with the curves of its steps; None where the store has none of that id.

    Raises:
        UnavailableError: the tracking server does not answer.
    """
    if not store_exists(workspace):
        return None
    client = open_store(workspace)
    query = f"{_pipeline()} and tags.`{RUN_TAG}` = '{run}'"
    found = ask(lambda: next(_search(client, query), None), workspace)
    if found is None:
        return None
    facts = _facts(found)
    for step, curves in ask(lambda: list(_curves(client, found)), workspace) or []:
        facts.curves[step] = curves
    return facts


def _facts(found: Run) -> RunFacts:
    tags = found.data.tags
    return RunFacts(
        run=tags[RUN_TAG],
        started_ms=int(found.info.start_time),
        state=str(found.info.status).lower(),
        parameters=dict(found.data.params),
        metrics={name: value for name, value in found.data.metrics.items() if not name.startswith(NOT_FINAL)},
        datasets=_datasets(found),
        verdict=tags.get("nasline.verdict"),
        registered=tags.get("nasline.registered"),
    )


def _datasets(found: Run) -> dict[str, str]:
    prefix = "nasline.dataset."
    return {tag.removeprefix(prefix): value for tag, value in found.data.tags.items() if tag.startswith(prefix)}


def _curves(client: MlflowClient, parent: Run) -> Iterator[tuple[str, Curves]]:
    """Step reference and its curves, for each child that has some."""
    query = f"tags.`{PARENT_TAG}` = '{parent.info.run_id}'"
    for child in _search(client, query, [parent.info.experiment_id]):
        names = [name for name in child.data.metrics if not name.startswith(NOT_CURVES)]
        if names:
            yield child.data.tags[STEP_TAG], {name: _points(client, child, name) for name in names}


def _points(client: MlflowClient, child: Run, name: str) -> list[tuple[int, float]]:
    return [(int(point.step), float(point.value)) for point in client.get_metric_history(child.info.run_id, name)]


def _pipeline() -> str:
    return f"tags.`{STEP_TAG}` = '{PIPELINE}'"


def _search(client: MlflowClient, query: str, experiments: list[str] | None = None) -> Iterator[Any]:
    """All runs a query finds, the newest first."""
    places = experiments or [experiment.experiment_id for experiment in client.search_experiments()]
    token = None
    while True:
        page = client.search_runs(places, query, max_results=PAGE, page_token=token, order_by=["start_time DESC"])
        yield from page
        token = page.token
        if not token:
            return


def _first(found: Iterator[Any], limit: int) -> Iterator[Any]:
    for _, one in zip(range(limit), found, strict=False):
        yield one
