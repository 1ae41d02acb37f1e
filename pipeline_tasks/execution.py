"""How every step is run: find its inputs, compute its key, reuse or lease, work, publish, track."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from pipeline_tasks import digests, process
from pipeline_tasks.errors import RejectedError, StepError, TemporaryError, UsageError
from pipeline_tasks.params import Parameters
from pipeline_tasks.steps import Input, StepDefinition, definition, reference
from pipeline_tasks.tracking.mirror import Tracker
from pipeline_tasks.tracking.registry import fetch_model
from pipeline_tasks.workspace import Published, Workspace

log = logging.getLogger(__name__)


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
) -> StepResult:
    """Run one step of a run, or reuse what any run published under the same key.

    A shard (`0-of-4`) has the key of the whole step and publishes beside it, in `KEY.shards/0-of-4`: the step's own
    folder comes into being in one rename, so nothing may lie in it before.

    Raises:
        UsageError: the run was not started, or an earlier step has not finished.
        TemporaryError: told to stop, or another process works on the same key.
        StepError: whatever the step itself refuses.
    """
    step_definition, frozen = definition(step), workspace.read_run(run)
    parameters = Parameters.model_validate(frozen["parameters"])
    inputs = _resolve_inputs(workspace, run, frozen, step_definition)
    key_content = _key_content(step_definition, parameters, part, inputs, frozen)
    key = digests.of_json(key_content)[:32]
    if shard:
        key, part = f"{key}.shards/{shard}", f"shard-{shard}"
    tracker = Tracker(workspace, run, reference(step, part))
    tracker.record.parameters = key_content["parameters"]
    with workspace.lease(step, key):
        published = workspace.published(step, key)
        reused = published is not None
        if published is None:
            if step_definition.sharded and not shard:
                _fetch_shards(workspace, step, key, parameters)
            context = StepContext(
                parameters=parameters,
                part=part,
                inputs={name: path for name, (path, _) in inputs.items()},
                input_digests={name: digest for name, (_, digest) in inputs.items()},
                output=_empty_output(workspace, step, key),
                state=_state_folder(workspace, step, key),
                published=workspace.step_directory(step, key),
                workspace=workspace,
                run=frozen,
                champion=_champion_folder(workspace, frozen),
                stopper=stopper,
                tracker=tracker,
                save_state=partial(workspace.save_state, step, key),
            )
            with _tracked(tracker):
                summary = _work(body, context)
            manifest = _manifest(step, part, key, key_content, summary, frozen)
            published = workspace.publish(step, key, manifest)
    workspace.record_step(run, reference(step, part), key)
    return _finish(workspace, run, step, part, published, reused, tracker)


def _work(body: StepBody, context: StepContext) -> dict[str, Any]:
    context.tracker.record.metrics_file = context.state / "metrics.jsonl"
    context.tracker.deliver()
    try:
        return body(context)
    except TemporaryError:
        context.save_state()
        raise


def _finish(
    workspace: Workspace, run: str, step: str, part: str, published: Published, reused: bool, tracker: Tracker
) -> StepResult:
    manifest = published.manifest
    key, summary = manifest["key"], manifest["summary"]
    record = tracker.record
    record.metrics_file = published.directory / "metrics.jsonl"
    record.artifacts = published.directory
    record.summary, record.status = summary, "FINISHED"
    if reused:
        record.reused_from = manifest["made_by_run"]
        record.note = f"Reused: made by run {manifest['made_by_run']} (key {key})."
        log.info("%s reused: key %s was made by run %s", reference(step, part), key[:12], manifest["made_by_run"])
    else:
        log.info("%s published: key %s", reference(step, part), key[:12])
    return StepResult(run, step, part, key, reused, summary, tracker.deliver())


@contextmanager
def _tracked(tracker: Tracker) -> Iterator[None]:
    """Mark the child run when the step ends in an error."""
    tracker.record.status = "RUNNING"
    try:
        yield
    except TemporaryError as error:
        _mark(tracker, "KILLED", error)
        raise
    except RejectedError:
        raise
    except StepError as error:
        _mark(tracker, "FAILED", error)
        raise


def _mark(tracker: Tracker, status: str, error: Exception) -> None:
    tracker.record.status, tracker.record.note = status, str(error)
    tracker.deliver()


def _resolve_inputs(
    workspace: Workspace, run: str, frozen: dict[str, Any], step: StepDefinition
) -> dict[str, tuple[Path, str]]:
    """Folder and content digest of each input."""
    return {
        entry.name: _champion_weights(workspace, frozen, entry) or _published_input(workspace, run, frozen, step, entry)
        for entry in step.inputs
    }


def _published_input(
    workspace: Workspace, run: str, frozen: dict[str, Any], step: StepDefinition, entry: Input
) -> tuple[Path, str]:
    needed = reference(entry.step, entry.part)
    key = frozen["steps"].get(needed)
    published = workspace.published(entry.step, key) if key else None
    if published is None:
        option = {"pretrain": f" --role {entry.part}", "pseudo_label": " --merge"}.get(entry.step, "")
        raise UsageError(
            f"{step.name} needs {needed} of run {run!r}, which has not finished; "
            f"run `nasline {entry.step}{option} --run {run}` first"
        )
    return published.directory / entry.folder, published.digest(entry.folder)


def _champion_weights(workspace: Workspace, frozen: dict[str, Any], entry: Input) -> tuple[Path, str] | None:
    """Retraining starts from the champion's networks where a first run starts from pretraining."""
    if entry.step != "pretrain" or not frozen["parameters"]["start"]["from_champion"]:
        return None
    champion = frozen["champion"]
    folder = _fetched_champion(workspace, champion) / entry.part
    return folder, digests.of_json([champion["digest"], entry.part])


def _key_content(
    step: StepDefinition,
    parameters: Parameters,
    part: str,
    inputs: dict[str, tuple[Path, str]],
    frozen: dict[str, Any],
) -> dict[str, Any]:
    """What the step's result depends on: no times, no paths."""
    own = key_fields(parameters.section(step.name))
    shared = {f"start.{name}": getattr(parameters.start, name) for name in step.shared_parameters}
    content: dict[str, Any] = {
        "step": step.name,
        "contract_version": step.contract_version,
        "parameters": {**own, **shared},
        "inputs": {name: digest for name, (_, digest) in inputs.items()},
    }
    if part:
        content["parameters"]["variant"] = getattr(parameters.start, f"{part}_variant")
    if step.name == "validate_data":
        content["inputs"] = {role: entry["digest"] for role, entry in frozen["datasets"].items() if entry}
    if step.name == "gate":
        content["inputs"]["champion"] = frozen["champion"]["digest"] if frozen["champion"] else None
    if step.name == "register":
        content["registry"] = {"name": parameters.start.model_name, "store": frozen["registry"]}
    return content


def key_fields(section: BaseModel) -> dict[str, Any]:
    """The fields of a section that can change a result."""
    values: dict[str, Any] = {}
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if isinstance(value, BaseModel):
            values[name] = key_fields(value)
        elif _in_key(field.json_schema_extra):
            values[name] = value
    return values


def _in_key(extra: Any) -> bool:
    return not isinstance(extra, dict) or bool(extra.get("in_key", True))


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


def _fetch_shards(workspace: Workspace, step: str, key: str, parameters: Parameters) -> None:
    """Have the shards that other machines published in this machine's folder, where the merge looks for them."""
    count = parameters.pseudo_label.shards
    for index in range(count):
        workspace.published(step, f"{key}.shards/{index}-of-{count}")


def _champion_folder(workspace: Workspace, frozen: dict[str, Any]) -> Path | None:
    champion = frozen["champion"]
    return _fetched_champion(workspace, champion) if champion else None


def _fetched_champion(workspace: Workspace, champion: dict[str, Any]) -> Path:
    """`start` fetched it, but maybe on another machine."""
    folder = workspace.root / champion["directory"]
    return folder if folder.is_dir() else fetch_model(workspace, f"models:/{champion['name']}/{champion['version']}")


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
    }
