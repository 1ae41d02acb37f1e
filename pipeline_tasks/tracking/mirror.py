"""MLflow mirrors the files of a run: one parent run per pipeline run, one child per step.

Everything that is logged is read from files which a step wrote, so whatever a dead server missed is delivered later
by the same functions; what was delivered is remembered in `runs/RUN/tracking/`, so it is delivered once.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline_tasks.errors import StoppedError, UnavailableError
from pipeline_tasks.steps import STEP_NAMES
from pipeline_tasks.tracking import run_page
from pipeline_tasks.tracking.client import connect, one_line, server_errors, shown_uri
from pipeline_tasks.tracking.experiments import find_or_create_experiment
from pipeline_tasks.tracking.metric_lines import log_epochs, log_samples, metric_name
from pipeline_tasks.workspace import Workspace, file_lock, write_json

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

log = logging.getLogger(__name__)

RUN_TAG = "nasline.run"
STEP_TAG = "nasline.step"
PARENT_TAG = "mlflow.parentRunId"
NOTE_TAG = "mlflow.note.content"
"""MLflow shows it as the description of a run."""
RUN_FILE = "run.json"
"""Artifact of the parent run with which the run can be repeated where its workspace is gone."""


@dataclass
class StepRecord:
    """What tracking needs to know of one step of a run."""

    reference: str
    parameters: dict[str, Any] = field(default_factory=dict)
    metrics_file: Path | None = None
    system_file: Path | None = None
    artifacts: Path | None = None
    summary: dict[str, Any] = field(default_factory=dict)
    status: str = "RUNNING"
    note: str = ""
    reused_from: str | None = None
    outcome: dict[str, str] | None = None
    """Tags for the parent run, set by the step that ends the pipeline run."""


class Tracker:
    """Delivers one step of one run; every failure of the server is a warning, never the step's end."""

    def __init__(self, workspace: Workspace, run: str, reference: str) -> None:
        self._workspace = workspace
        self._run = run
        self._folder = workspace.run_directory(run) / "tracking"
        self._state_path = self._folder / (reference.replace("/", "-") + ".json")
        self._client: MlflowClient | None = None
        self._warned = False
        self.record = StepRecord(reference)

    def deliver(self) -> str | None:
        """Log what is not logged yet. Returns the address of the child run, None while the server is away."""
        self._remember()
        try:
            return self._deliver()
        except server_errors() as error:
            if not _told_to_stop(error):
                self._warn(error)
            return None

    def _deliver(self) -> str:
        client = self._client = self._client or connect(self._workspace)
        parent = _parent_run(client, self._workspace, self._run)
        with _delivery_state(self._state_path) as state:
            if "run_id" not in state:
                state["run_id"] = _find_or_create_child(client, parent, self._run, self.record)
            _log_step(client, parent, state, self.record)
            _log_outcome(client, parent, state, self.record)
            return address(self._workspace, parent["experiment_id"], state["run_id"])

    @property
    def run_id(self) -> str | None:
        """MLflow's id of this step's run, None before it could be created."""
        if not self._state_path.exists():
            return None
        run_id: str | None = json.loads(self._state_path.read_text(encoding="utf-8")).get("run_id")
        return run_id

    def _remember(self) -> None:
        """Write the record down, so that `nasline deliver` can do it when this process is gone."""
        record = self.record
        write_json(
            self._folder / "pending" / self._state_path.name,
            {
                "reference": record.reference,
                "parameters": record.parameters,
                "metrics_file": _relative(record.metrics_file, self._workspace),
                "system_file": _relative(record.system_file, self._workspace),
                "artifacts": _relative(record.artifacts, self._workspace),
                "summary": record.summary,
                "status": record.status,
                "note": record.note,
                "reused_from": record.reused_from,
                "outcome": record.outcome,
            },
        )

    def _warn(self, error: Exception) -> None:
        message = "tracking server at %s is away (%s); the step goes on, `nasline deliver` sends the rest later"
        (log.debug if self._warned else log.warning)(message, shown_uri(self._workspace), one_line(error))
        self._warned = True


def _told_to_stop(error: BaseException | None) -> bool:
    """Whether a signal broke the delivery off, also where a library made an error of its own of that; the step looks
    for it after each delivery.
    """
    while error is not None and not isinstance(error, StoppedError):
        error = error.__context__
    return error is not None


def deliver_run(workspace: Workspace, run: str) -> int:
    """Send everything of a run that the tracking server has missed. Returns the number of steps looked at.

    Raises:
        UnavailableError: the server is away.
    """
    workspace.read_run(run)
    folder = workspace.run_directory(run) / "tracking" / "pending"
    pending = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]
    for content in sorted(pending, key=lambda one: _place(one["reference"])):  # the last one closes the pipeline run
        tracker = Tracker(workspace, run, content["reference"])
        for name in ("metrics_file", "system_file", "artifacts"):
            content[name] = workspace.root / content[name] if content.get(name) else None
        tracker.record = StepRecord(**content)
        if tracker.deliver() is None:
            raise UnavailableError(f"tracking server at {shown_uri(workspace)} is away; try again later")
    return len(pending)


def _place(reference: str) -> int:
    """Of a step in the pipeline."""
    step = reference.split("/")[0]
    return STEP_NAMES.index(step) if step in STEP_NAMES else len(STEP_NAMES)


def _log_step(client: MlflowClient, parent: dict[str, Any], state: dict[str, Any], record: StepRecord) -> None:
    run_id = state["run_id"]
    if not state.get("parameters_logged"):
        _log_parameters(client, run_id, record.parameters)
        state["parameters_logged"] = True
    log_epochs(client, parent, state, record.reference, record.metrics_file)
    log_samples(client, state, record.system_file)
    _log_summary(client, parent, state, record)
    _log_artifacts(client, run_id, state, record)
    _log_verdict(client, parent, state, record)
    if record.note and state.get("note") != record.note:
        client.set_tag(run_id, NOTE_TAG, record.note)
        state["note"] = record.note
    if record.reused_from and not state.get("reused_from"):
        client.set_tag(run_id, "nasline.reused_from_run", record.reused_from)
        state["reused_from"] = record.reused_from
    if state.get("status") != record.status:
        _set_status(client, run_id, record.status)
        state["status"] = record.status


def _log_outcome(client: MlflowClient, parent: dict[str, Any], state: dict[str, Any], record: StepRecord) -> None:
    """Close the parent run when its last step has ended or a step has failed; open it again when one goes on."""
    ended = "FINISHED" if record.outcome else "FAILED" if record.status == "FAILED" else "RUNNING"
    told = [ended, record.outcome]
    if state.get("outcome", ["RUNNING", None]) != told:
        for key, value in (record.outcome or {}).items():
            client.set_tag(parent["run_id"], key, value)
        _set_status(client, parent["run_id"], ended)
        state["outcome"] = told


def _log_parameters(client: MlflowClient, run_id: str, parameters: dict[str, Any]) -> None:
    from mlflow.entities import Param

    entries = [Param(key, str(value)) for key, value in sorted(flatten(parameters).items())]
    for start in range(0, len(entries), 100):
        client.log_batch(run_id, params=entries[start : start + 100])


def _log_summary(client: MlflowClient, parent: dict[str, Any], state: dict[str, Any], record: StepRecord) -> None:
    """Final numbers go to the child, and under the step's name to the parent, where runs are compared."""
    from mlflow.entities import Metric

    numbers = {k: float(v) for k, v in flatten(record.summary).items() if isinstance(v, int | float)}
    if not numbers or state.get("summary") == numbers:
        return
    step = record.reference.replace("/", "_")
    stamp = int(parent["started_ms"])
    child = [Metric(metric_name(f"final/{name}"), value, stamp, 0) for name, value in numbers.items()]
    client.log_batch(state["run_id"], metrics=child)
    upward = [Metric(metric_name(f"{step}/{name}"), value, stamp, 0) for name, value in numbers.items()]
    client.log_batch(parent["run_id"], metrics=upward)
    state["summary"] = numbers


def _log_artifacts(client: MlflowClient, run_id: str, state: dict[str, Any], record: StepRecord) -> None:
    if record.artifacts is None or not record.artifacts.is_dir():
        return
    delivered = state.setdefault("artifacts", [])
    for path in sorted(p for p in record.artifacts.rglob("*") if p.is_file()):
        name = path.relative_to(record.artifacts).as_posix()
        if name not in delivered and _is_report(path):
            client.log_artifact(run_id, str(path), _artifact_folder(name))
            delivered.append(name)


def _log_verdict(client: MlflowClient, parent: dict[str, Any], state: dict[str, Any], record: StepRecord) -> None:
    """The pipeline run's page and its column `nasline.gate`, once the gate has published its verdict."""
    if record.reference != "gate" or record.artifacts is None or state.get("verdict_told"):
        return
    try:
        page = run_page.with_verdict(parent["page"], record.artifacts, state["run_id"], state["artifacts"])
    except (KeyError, FileNotFoundError) as error:  # files of an older release; the step must not end for a page
        log.warning("the run's page in MLflow stays without the verdict's table: %s has no %s", record.artifacts, error)
        return
    for tag, value in {**run_page.gate_tag(record.artifacts), NOTE_TAG: page}.items():
        client.set_tag(parent["run_id"], tag, value)
    state["verdict_told"] = True


def _is_report(path: Path) -> bool:
    """Pictures, tables and verdicts are mirrored; weights and data stay in the workspace and the registry."""
    if "data_docs" in path.parts:
        return path.suffix == ".html"
    return path.suffix in {".png", ".json", ".jsonl", ".csv"} and path.stat().st_size < 5_000_000


def _artifact_folder(name: str) -> str | None:
    return name.rsplit("/", 1)[0] if "/" in name else None


def _set_status(client: MlflowClient, run_id: str, status: str) -> None:
    if status == "RUNNING":
        client.update_run(run_id, status="RUNNING")
    else:
        client.set_terminated(run_id, status=status)


def _parent_run(client: MlflowClient, workspace: Workspace, run: str) -> dict[str, Any]:
    """The parent run of a pipeline run, made once with its parameters, tags and dataset inputs."""
    with _delivery_state(workspace.run_directory(run) / "tracking" / "parent-run.json") as state:
        frozen = workspace.read_run(run)
        if "run_id" not in state:
            experiment_id = find_or_create_experiment(client, frozen["parameters"]["start"]["experiment"])
            found = _search(client, experiment_id, f"tags.`{RUN_TAG}` = '{run}' and tags.`{STEP_TAG}` = 'pipeline'")
            state.update(experiment_id=experiment_id, started_ms=frozen["created_ms"])
            state["run_id"] = found or _create_parent(client, experiment_id, run, frozen)
        if not state.get("described"):
            _log_parameters(client, state["run_id"], frozen["parameters"])
            _log_datasets(client, state["run_id"], frozen)
            client.log_dict(state["run_id"], {**frozen, "steps": {}}, RUN_FILE)
            state["described"] = True
        return {**state, "page": run_page.description(frozen)}


def _create_parent(client: MlflowClient, experiment_id: str, run: str, frozen: dict[str, Any]) -> str:
    tags = {RUN_TAG: run, STEP_TAG: "pipeline", "nasline.code_version": frozen["code_version"]}
    tags |= {**run_page.tags(frozen), NOTE_TAG: run_page.description(frozen)}
    for role, dataset in frozen["datasets"].items():
        if dataset:
            tags[f"nasline.dataset.{role}"] = dataset["digest"]
            tags[f"dvc.revision.{role}"] = dataset["dvc_revision"] or "not versioned"
            tags[f"dvc.remote.{role}"] = dataset.get("dvc_remote") or "none"
    if frozen.get("champion"):
        tags["nasline.champion"] = f"{frozen['champion']['name']} v{frozen['champion']['version']}"
    return str(client.create_run(experiment_id, start_time=frozen["created_ms"], run_name=run, tags=tags).info.run_id)


def _log_datasets(client: MlflowClient, run_id: str, frozen: dict[str, Any]) -> None:
    from mlflow.entities import Dataset, DatasetInput, InputTag

    inputs = []
    for role, dataset in frozen["datasets"].items():
        if dataset:
            entity = Dataset(
                name=Path(dataset["path"]).name,
                digest=dataset["digest"],
                source_type="local",
                source=json.dumps({"uri": dataset["path"]}),
            )
            tags = [
                InputTag("mlflow.data.context", role),
                InputTag("dvc.revision", dataset["dvc_revision"] or "not versioned"),
                InputTag("dvc.remote", dataset.get("dvc_remote") or "none"),
            ]
            inputs.append(DatasetInput(entity, tags))
    client.log_inputs(run_id, datasets=inputs)


def _find_or_create_child(client: MlflowClient, parent: dict[str, Any], run: str, record: StepRecord) -> str:
    query = f"tags.`{RUN_TAG}` = '{run}' and tags.`{STEP_TAG}` = '{record.reference}'"
    found = _search(client, parent["experiment_id"], query)
    tags = {RUN_TAG: run, STEP_TAG: record.reference, PARENT_TAG: parent["run_id"]}
    return found or str(client.create_run(parent["experiment_id"], run_name=record.reference, tags=tags).info.run_id)


def _search(client: MlflowClient, experiment_id: str, query: str) -> str | None:
    runs = client.search_runs([experiment_id], query, max_results=1)
    return str(runs[0].info.run_id) if runs else None


def address(workspace: Workspace, experiment_id: str, run_id: str) -> str:
    """Where a browser finds the run: the server, or the UI that `make up` starts on this machine."""
    uri = shown_uri(workspace)
    base = os.environ.get("NASLINE_MLFLOW_UI") or (uri if uri.startswith("http") else "http://127.0.0.1:5000")
    return f"{base.rstrip('/')}/#/experiments/{experiment_id}/runs/{run_id}"


@contextmanager
def _delivery_state(path: Path) -> Iterator[dict[str, Any]]:
    """What was delivered so far; written back even when the delivery breaks off in the middle."""
    with file_lock(path.with_suffix(".lock")):
        state = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        try:
            yield state
        finally:
            write_json(path, state)


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"a": {"b": 1}}` as `{"a.b": 1}`."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _relative(path: Path | None, workspace: Workspace) -> str | None:
    return None if path is None else str(path.relative_to(workspace.root))
