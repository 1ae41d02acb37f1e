"""From a step's name to its function."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path
from typing import Any

from pipeline_tasks import errors, launch, pseudo_label, validate_data, verdict
from pipeline_tasks.combinations import PROCESSES, require_images_for
from pipeline_tasks.errors import StepError, UsageError
from pipeline_tasks.execution import StepBody, StepResult, assist, execute
from pipeline_tasks.keys import RunKeys
from pipeline_tasks.params import StartParameters, of_run
from pipeline_tasks.process import Stopper
from pipeline_tasks.team import Team
from pipeline_tasks.workspace import Workspace


def run_step(
    workspace: Workspace, run: str, step: str, part: str = "", shard: str | None = None
) -> tuple[StepResult, int]:
    """Run one step (or one part or shard of it). Returns its result and the exit code: 0, or 99 for a rejection."""
    stopper = Stopper()
    stopper.install()
    if shard is not None:
        with stopper.told_apart():
            return _run_shards(workspace, run, shard, stopper), errors.EXIT_DONE
    team = _team(workspace, run, step)
    try:
        with stopper.told_apart():
            result = execute(workspace, run, step, _body(step), stopper, part, team=team)
            if step == "validate_data":  # here, as the step itself is not done where its tables are reused
                _require_fitting_teachers(workspace, run, workspace.step_directory(step, result.key))
    except StepError as error:
        team.tell(error.exit_code)
        raise
    return result, _exit_code(workspace.step_directory(step, result.key), step)


def _require_fitting_teachers(workspace: Workspace, run: str, published: Path) -> None:
    frozen = workspace.read_run(run)
    validate_data.require_fitting_teachers(frozen, published, RunKeys(workspace, frozen).champion_teacher())


def assist_step(workspace: Workspace, run: str, step: str, part: str = "") -> int:
    """Do one process's share of a step that the first process runs; gives the exit code."""
    stopper = Stopper()
    stopper.install()
    team = _team(workspace, run, step)
    told = team.hear()
    if told is not None:
        return told
    with stopper.told_apart():
        assist(workspace, run, step, _body(step), stopper, part)
    return errors.EXIT_DONE


def processes_to_start(workspace: Workspace, run: str, step: str, part: str, asked: int | None) -> tuple[int, str]:
    """How many training processes a step still needs, 1 meaning this one, and the device they train on.

    Raises:
        UsageError: the run was not started, an earlier step has not finished, or the number cannot be.
        ParameterError: some of them would have no image of a batch.
    """
    frozen = workspace.read_run(run)
    parameters = of_run(frozen)
    shared = parameters.start
    count = launch.count(asked, shared.processes)
    if count > 1 and workspace.find(step, RunKeys(workspace, frozen).of(step, part).key):
        count = 1
    require_images_for(count, parameters, step, PROCESSES if asked is None else "--processes")
    return count, shared.device


def _team(workspace: Workspace, run: str, step: str) -> Team:
    if step not in launch.TRAINING_STEPS or not launch.is_member():
        return Team()
    return Team(_shared(workspace.read_run(run)))


def _shared(frozen: dict[str, Any]) -> StartParameters:
    return of_run(frozen).start


def _run_shards(workspace: Workspace, run: str, shard: str, stopper: Stopper) -> StepResult:
    """One shard, or every shard of the run one after the other; gives the last one's result."""
    if shard != "all":
        return pseudo_label.run_shard(workspace, run, *_parse_shard(shard), stopper)
    count = int(workspace.read_run(run)["parameters"]["pseudo_label"]["shards"])
    return [pseudo_label.run_shard(workspace, run, index, count, stopper) for index in range(count)][-1]


def _body(step: str) -> StepBody:
    """Each step is a module with a function of the same name; only the one needed is imported."""
    body: StepBody = getattr(importlib.import_module(f"pipeline_tasks.{step}"), step)
    return body


def _exit_code(directory: Path, step: str) -> int:
    if step not in ("gate", "register"):
        return errors.EXIT_DONE
    content = json.loads((directory / verdict.FILE).read_text(encoding="utf-8"))
    return errors.EXIT_DONE if content["passed"] else errors.RejectedError.exit_code


def _parse_shard(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or not int(match[1]) < int(match[2]):
        raise UsageError(f"--shard {text!r} must be `all` or I/N with I from 0 to N-1, for example 0/4")
    return int(match[1]), int(match[2])
