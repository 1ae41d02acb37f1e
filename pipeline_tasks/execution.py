"""How every step is run: find its inputs, compute its key, reuse or lease, work, publish, track."""

from __future__ import annotations

import logging
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from pipeline_tasks import process, system_metrics
from pipeline_tasks.errors import EXIT_DONE, TemporaryError
from pipeline_tasks.keys import RunKeys, StepKey, champion_folder
from pipeline_tasks.params import Parameters, of_run
from pipeline_tasks.steps import StepDefinition, definition, reference
from pipeline_tasks.team import Helped, Team
from pipeline_tasks.tracking.mirror import StepRecord, Tracker
from pipeline_tasks.tracking.registry import require_unchanged
from pipeline_tasks.workspace import Published, Workspace, lease_wait_seconds

log = logging.getLogger(__name__)

JUDGES = ("gate", "register")
"""Steps whose own output is compared with its digests when it is reused: their exit code is read from it."""


@dataclass(frozen=True)
class StepContext:
    """All that a step's function may use."""

    parameters: Parameters
    part: str
    inputs: dict[str, Path]
    """Published folders, by the names in `steps.STEPS`."""
    input_digests: dict[str, str]
    output: Path
    """Empty folder; what is in it at the end is published."""
    state: Path
    """Survives a kill; a second attempt finds here what the first left."""
    published: Path
    """Where the output will lie once it is published."""
    workspace: Workspace
    run: dict[str, Any]
    """The content of run.json."""
    champion: Path | None
    """Folder of the pinned champion, if there is one."""
    stopper: process.Stopper
    tracker: Tracker
    save_state: Callable[[], None]
    """Lets another machine go on from `state` as it is now."""

    def dataset_roots(self) -> dict[str, Path]:
        """Where each set's images lie, by the root names used in the dataset tables."""
        return {role: Path(entry["path"]) for role, entry in self.run["datasets"].items() if entry}

    def on_epoch_end(self, metrics: dict[str, Any]) -> None:
        """Keep the state that the training loop has just saved, and mirror the lines it has just written."""
        self.save_state()
        self.tracker.deliver()


@dataclass(frozen=True)
class StepResult:
    """What a finished step tells its caller; small enough for an XCom."""

    run: str
    step: str
    part: str
    key: str
    reused: bool
    summary: dict[str, Any]
    mlflow_url: str | None


StepBody = Callable[[StepContext], dict[str, Any]]
"""A step's function: writes into `context.output`, returns its summary (numbers and short texts)."""


def execute(
    workspace: Workspace,
    run: str,
    step: str,
    body: StepBody,
    stopper: process.Stopper,
    part: str = "",
    shard: str = "",
    team: Team | None = None,
) -> StepResult:
    """Run one step of a run, or reuse what any run published under the same key.

    A shard (`0-of-4`) has the key of the whole step and publishes beside it, in `KEY.shards/0-of-4`: the step's own
    folder comes into being in one rename, so nothing may lie in it before. The other processes of a `team` are told
    whether there is work to share.

    Raises:
        UsageError: the run was not started, or an earlier step has not finished.
        TemporaryError: told to stop, or another process works on the same key.
        StepError: whatever the step itself refuses.
    """
    team = team or Team()
    step_definition, frozen = definition(step), workspace.read_run(run)
    keys = RunKeys(workspace, frozen)
    step_key = keys.of(step, part)
    key = step_key.key
    if shard:
        key, part = f"{key}.shards/{shard}", f"shard-{shard}"
    tracker = Tracker(workspace, run, reference(step, part))
    tracker.record.parameters = step_key.content["parameters"]
    with workspace.lease(step, key, lease_wait_seconds()):
        published = (workspace.verified if step in JUDGES else workspace.published)(step, key)
        reused = published is not None
        if published is None:
            _fetch_inputs(keys, step_definition, workspace.verified)
            if step_definition.sharded and not shard:
                _fetch_shards(workspace, step, key, of_run(frozen))
            if frozen["champion"]:
                require_unchanged(champion_folder(workspace, frozen["champion"]), frozen["champion"])
            team.tell(None)
            context = _context(
                workspace,
                frozen,
                step_key,
                part=part,
                output=_empty_output(workspace, step, key),
                state=_state_folder(workspace, step, key),
                published=workspace.step_directory(step, key),
                stopper=stopper,
                tracker=tracker,
                save_state=partial(workspace.save_state, step, key),
            )
            with _tracked(tracker):
                summary = _work(body, context)
            manifest = _manifest(step, part, key, step_key.content, summary, frozen)
            published = workspace.publish(step, key, manifest)
        team.tell(EXIT_DONE)
    workspace.record_step(run, reference(step, part), key)
    return _finish(workspace, run, step, part, published, reused, tracker)


def assist(workspace: Workspace, run: str, step: str, body: StepBody, stopper: process.Stopper, part: str = "") -> None:
    """As one of the other processes of a team: do the step's work up to the end of its training, and keep nothing.

    Raises:
        StepError: whatever the step itself refuses.
    """
    frozen = workspace.read_run(run)
    keys = RunKeys(workspace, frozen)
    step_key = keys.of(step, part)
    # the first process of the team compares the files with their digests, once for all
    _fetch_inputs(keys, definition(step), lambda name, key, _: workspace.published(name, key))
    with tempfile.TemporaryDirectory(prefix="nasline-") as scratch, suppress(Helped):
        output, state = Path(scratch, "output"), Path(scratch, "state")
        output.mkdir()
        state.mkdir()
        body(
            _context(
                workspace,
                frozen,
                step_key,
                part=part,
                output=output,
                state=state,
                published=output,
                stopper=stopper,
                tracker=Tracker(workspace, run, reference(step, part)),
                save_state=lambda: None,
            )
        )


def _context(workspace: Workspace, frozen: dict[str, Any], step_key: StepKey, **own: Any) -> StepContext:
    """A step's context; `own` are the fields in which the first process and its helpers differ."""
    return StepContext(
        parameters=of_run(frozen),
        inputs={name: entry.folder for name, entry in step_key.inputs.items()},
        input_digests={name: entry.digest for name, entry in step_key.inputs.items()},
        workspace=workspace,
        run=frozen,
        champion=champion_folder(workspace, frozen["champion"]) if frozen["champion"] else None,
        **own,
    )


def _work(body: StepBody, context: StepContext) -> dict[str, Any]:
    record = context.tracker.record
    system_file = context.workspace.run_directory(context.run["run"]) / "tracking" / "system" / _file_name(record)
    record.metrics_file, record.system_file = context.state / "metrics.jsonl", system_file
    _announce(context.tracker.deliver())
    context.stopper.stop_if_requested()  # while it waited for the tracking server
    seconds = 0.0 if record.reference == "gate" else system_metrics.interval()
    try:
        with context.stopper.told_apart(), system_metrics.sampled(system_file, seconds):
            return body(context)
    except TemporaryError:
        context.save_state()
        raise


def _file_name(record: StepRecord) -> str:
    return record.reference.replace("/", "-") + ".jsonl"


def _announce(mlflow_url: str | None) -> None:
    """Tell the DAG's operator at once where the step can be watched; a person on a terminal is told at the end."""
    if mlflow_url and not sys.stdout.isatty():
        print(f"NASLINE_MLFLOW {mlflow_url}", flush=True)


def _finish(
    workspace: Workspace, run: str, step: str, part: str, published: Published, reused: bool, tracker: Tracker
) -> StepResult:
    manifest = published.manifest
    key, summary = manifest["key"], manifest["summary"]
    record = tracker.record
    record.metrics_file = published.directory / "metrics.jsonl"
    record.artifacts = published.directory
    record.summary, record.status = summary, "FINISHED"
    if step == "register" or (step == "gate" and not summary["passed"]):
        record.outcome = outcome(step, summary)
    if reused:
        record.reused_from = manifest["made_by_run"]
        record.note = f"Reused: made by run {manifest['made_by_run']} (key {key})."
        log.info("%s reused: key %s was made by run %s", reference(step, part), key[:12], manifest["made_by_run"])
    else:
        log.info("%s published: key %s", reference(step, part), key[:12])
    return StepResult(run, step, part, key, reused, summary, tracker.deliver())


def outcome(step: str, summary: dict[str, Any]) -> dict[str, str]:
    """Tags that tell a pipeline run's end, for the parent run in MLflow."""
    if step == "gate":
        return {"nasline.verdict": summary["verdict"]}
    if not summary["registered"]:
        return {"nasline.verdict": summary["because"]}
    return {"nasline.verdict": summary["verdict"], "nasline.registered": f"{summary['model']} v{summary['version']}"}


@contextmanager
def _tracked(tracker: Tracker) -> Iterator[None]:
    """Mark the child run when the step ends in an error."""
    tracker.record.status = "RUNNING"
    try:
        yield
    except TemporaryError as error:
        _mark(tracker, "KILLED", error)
        raise
    except Exception as error:  # whatever ends the step, its MLflow run must not look as if it went on
        _mark(tracker, "FAILED", error)
        raise


def _mark(tracker: Tracker, status: str, error: Exception) -> None:
    tracker.record.status, tracker.record.note = status, str(error)
    tracker.deliver()


def _empty_output(workspace: Workspace, step: str, key: str) -> Path:
    """What an earlier attempt left half-written is thrown away."""
    output = workspace.partial_directory(step, key) / "output"
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True)
    return output


def _state_folder(workspace: Workspace, step: str, key: str) -> Path:
    state = workspace.partial_directory(step, key) / "state"
    workspace.load_state(step, key)
    state.mkdir(parents=True, exist_ok=True)
    return state


def _fetch_inputs(keys: RunKeys, step: StepDefinition, fetch: Callable[[str, str, str], object]) -> None:
    """Have in this machine's folder what the step reads; its key needed no more than the manifests.

    fetch: called with step, key and subfolder of each input.
    """
    for entry in step.inputs:
        if not keys.from_champion(entry):
            fetch(entry.step, keys.of(entry.step, entry.part).key, entry.folder)


def _fetch_shards(workspace: Workspace, step: str, key: str, parameters: Parameters) -> None:
    """Have the shards that other machines published in this machine's folder, where the merge looks for them."""
    count = parameters.pseudo_label.shards
    for index in range(count):
        workspace.verified(step, f"{key}.shards/{index}-of-{count}")


def _manifest(
    step: str, part: str, key: str, key_content: dict[str, Any], summary: dict[str, Any], frozen: dict[str, Any]
) -> dict[str, Any]:
    return {
        "schema_version": 1,
        "step": step,
        "part": part,
        "key": key,
        "key_content": key_content,
        "summary": summary,
        "made_by_run": frozen["run"],
        "code_version": frozen["code_version"],
        "datasets": {role: _version(entry) for role, entry in frozen["datasets"].items() if entry},
    }


def _version(dataset: dict[str, Any]) -> dict[str, Any]:
    """What names a set wherever it lies."""
    return {name: dataset.get(name) for name in ("digest", "dvc_revision", "dvc_remote")}
