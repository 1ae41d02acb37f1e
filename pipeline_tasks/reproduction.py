"""`nasline reproduce`: run a finished pipeline run again, from what it wrote down alone, and compare the numbers."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline_tasks import digests, initial_checkpoint, pinned_files
from pipeline_tasks.errors import EXIT_DONE, ConfigurationError, DataError, StepError, UsageError
from pipeline_tasks.params import Parameters, of_run
from pipeline_tasks.reproduction_report import ComparedNumber, Reproduction
from pipeline_tasks.start import code_version
from pipeline_tasks.steps import STEPS, reference
from pipeline_tasks.tracking.metric_lines import metric_name
from pipeline_tasks.tracking.mirror import flatten
from pipeline_tasks.workspace import Workspace, write_json

log = logging.getLogger(__name__)

REPORT = "reproduction.json"


@dataclass(frozen=True)
class _Source:
    """The run that is repeated: from its workspace, or from the tracking server."""

    frozen: dict[str, Any]
    files: dict[str, digests.FileDigests]
    """Of the finished steps' outputs that are still there, by reference."""
    numbers: dict[str, dict[str, float]]
    references: list[str]
    """The steps that the run had finished, but for `register`."""


def reproduce(
    workspace: Workspace, run: str, folder: Path, project: Path | None = None, any_code: bool = False
) -> Reproduction:
    """Repeat a run below `folder` and compare. Killed, the same command goes on where it was.

    Sets come from where they lay if their content is still the same, else from the DVC cache or remote of `project`
    (by default the project that they lay in). The code is the running one if it is of that version, else a Git
    worktree of it. The engine is not registered again.

    Raises:
        UsageError: neither the workspace nor the tracking server knows the run, or it has finished no step.
        DataError: a set or a checkpoint of the run is nowhere.
        ConfigurationError: the code of the run is not here, and `any_code` was not given.
        StepError: a step ends as it did not before; with the step's own exit code.
    """
    source = _source(workspace, run)
    if not source.references:
        raise UsageError(f"run {run!r} has finished no step, so there is nothing to repeat; give another RUN_ID")
    again = Workspace(folder / "workspace")
    code = _code(source.frozen["code_version"], folder, any_code)
    name = f"{run}-again"
    if not (again.run_directory(name) / "run.json").exists():
        again.write_run(name, _frozen_again(source.frozen, name, workspace, again, folder, project, code))
    for arguments in _commands(source.references):
        _run([*arguments, "--workspace", again.place, "--run", name], code)
    found = _compare(source, again, name, code)
    write_json(folder / REPORT, found.to_json())
    return found


def _source(workspace: Workspace, run: str) -> _Source:
    try:
        frozen = workspace.read_run(run)
    except UsageError:
        return _source_from_tracking(workspace, run)
    files, numbers = {}, {}
    references = [name for name in _all_steps() if name in frozen["steps"]]
    for name in references:
        published = workspace.find(name.split("/")[0], frozen["steps"][name])
        if published is not None:
            files[name] = published.manifest["files"]
            numbers[name] = _numbers(published.manifest["summary"])
    return _Source(frozen, files, numbers, references)


def _source_from_tracking(workspace: Workspace, run: str) -> _Source:
    from pipeline_tasks.tracking.recorded_run import recorded_run

    recorded = recorded_run(workspace, run)
    if recorded is None:
        raise UsageError(
            f"run {run!r} is neither in workspace {workspace.place} nor, with its run.json, on the tracking server; "
            "name another --workspace, or set MLFLOW_TRACKING_URI"
        )
    numbers: dict[str, dict[str, float]] = {}
    for name in _all_steps():
        begin = name.replace("/", "_") + "/"
        of_step = {key.removeprefix(begin): value for key, value in recorded.metrics.items() if key.startswith(begin)}
        if of_step:
            numbers[name] = of_step
    return _Source(recorded.frozen, {}, numbers, list(numbers))


def _all_steps() -> list[str]:
    """All that can be repeated: `start` was frozen, and a second version in the registry helps nobody."""
    repeated = [step for step in STEPS if step.name not in ("start", "register")]
    return [reference(step.name, part) for step in repeated for part in step.parts or ("",)]


def _numbers(summary: Mapping[str, Any]) -> dict[str, float]:
    return {k: float(v) for k, v in flatten(dict(summary)).items() if isinstance(v, int | float)}


def _frozen_again(
    frozen: Mapping[str, Any],
    name: str,
    before: Workspace,
    again: Workspace,
    folder: Path,
    project: Path | None,
    code: _Code,
) -> dict[str, Any]:
    """The same run.json, but for where things lie: no key depends on that."""
    parameters = of_run(frozen)
    _require_same_files(parameters, frozen)
    datasets = {
        role: entry and {**entry, "path": str(_dataset(role, entry, folder, project))}
        for role, entry in frozen["datasets"].items()
    }
    if champion := frozen["champion"]:
        bundle = before.root / champion["directory"]
        if bundle.is_dir():
            shutil.copytree(bundle, again.root / champion["directory"], dirs_exist_ok=True)
    fresh = {"run": name, "created_ms": int(time.time() * 1000), "steps": {}, "code_version": code.version}
    return {**frozen, **fresh, "datasets": datasets}


def _require_same_files(parameters: Parameters, frozen: Mapping[str, Any]) -> None:
    """Checkpoints and files that parameters name by their place must be there, unchanged."""
    if pinned := frozen.get(initial_checkpoint.INPUT):
        initial_checkpoint.require_unchanged(Path(pinned["path"]), pinned["digest"])
    now = pinned_files.pin(parameters)
    for step, entries in frozen.get(pinned_files.FIELD, {}).items():
        for name, entry in entries.items():
            if now[step][name]["digest"] != entry["digest"]:
                raise DataError(f"{entry['path']} ({name} of {step}) was changed since the run; put the old one back")


def _dataset(role: str, entry: Mapping[str, Any], folder: Path, project: Path | None) -> Path:
    from pipeline_tasks.data.revisions import check_out_digest
    from pipeline_tasks.data.versioning import dataset_digest, project_root

    place = Path(entry["path"])
    if place.is_dir() and dataset_digest(place) == entry["digest"]:
        return place
    target = folder / "data" / role
    if target.is_dir() and dataset_digest(target) == entry["digest"]:
        return target
    home = project or project_root(place)
    if home is None:
        raise DataError(
            f"the set {role} of the run ({entry['digest']}) is not at {place} any more, and that is no DVC project; "
            "name the project that has it with --project"
        )
    log.info("%s: %s from the cache or remote of %s", role, entry["digest"], home)
    shutil.rmtree(target, ignore_errors=True)
    check_out_digest(home.resolve(), entry["digest"], target)
    return target


@dataclass(frozen=True)
class _Code:
    """Which code runs the steps: its version, and the checkout that is not the running one."""

    version: str
    checkout: Path | None


def _code(wanted: str, folder: Path, any_code: bool) -> _Code:
    running = code_version()
    if wanted == running and not wanted.endswith("-dirty"):
        return _Code(running, None)
    if any_code:
        log.warning("the run was made by code %s, %s repeats it", wanted, running)
        return _Code(running, None)
    commit = wanted.partition("+")[2]
    if wanted.endswith("-dirty"):
        raise ConfigurationError(
            f"the run was made by code {wanted}: changes that no commit holds; --any-code repeats it with {running}"
        )
    here = _running_checkout()
    if not commit or here is None:
        raise ConfigurationError(
            f"the run was made by code {wanted}, this is {running}; install that version (in another environment) "
            "or repeat it with this one: --any-code"
        )
    return _Code(wanted, _worktree(here, commit, folder / "code"))


def _running_checkout() -> Path | None:
    """The Git checkout that this code runs from, None where it is installed."""
    here = Path(__file__).resolve().parent.parent
    return here if (here / ".git").exists() else None


def _worktree(repository: Path, commit: str, target: Path) -> Path:
    if target.exists():
        there = _git(target, "rev-parse", "HEAD").stdout == _git(repository, "rev-parse", f"{commit}^{{commit}}").stdout
        if not (target / ".git").exists() or not there or _git(target, "status", "--porcelain").stdout:
            raise ConfigurationError(f"{target} is not the code {commit} as it was committed; remove that folder")
        return target
    _git(repository, "worktree", "prune")  # of one that was removed by hand
    made = _git(repository, "worktree", "add", "--detach", "--quiet", str(target), commit)
    if made.returncode:
        raise ConfigurationError(f"the code {commit} cannot be checked out: {made.stderr.strip()}; git fetch it")
    return target


def _git(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=False)


def _commands(references: list[str]) -> Iterator[list[str]]:
    """The command lines of steps, in their order."""
    for name in references:
        step, _, part = name.partition("/")
        if step == "pseudo_label":
            yield [step, "--shard", "all"]
            yield [step, "--merge"]
        else:
            yield [step, *(["--role", part] if part else []), *(["--rejection-is-result"] if step == "gate" else [])]


def _run(arguments: list[str], code: _Code) -> None:
    """Run a step by that code, from the current folder: a relative address of the tracking server stays what it is."""
    environment = {**os.environ, "PYTHONSAFEPATH": "1"}  # else the code of the current folder comes first
    if (checkout := code.checkout or _running_checkout()) is not None:
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(checkout), environment.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "pipeline_tasks", *arguments]
    ended = subprocess.run(command, env=environment, check=False).returncode
    if ended != EXIT_DONE:
        failure = StepError(f"nasline {' '.join(arguments)} ended with exit code {ended}; its last lines say why")
        failure.exit_code = ended if ended > 0 else 75
        raise failure


def _compare(source: _Source, again: Workspace, name: str, code: _Code) -> Reproduction:
    keys = again.read_run(name)["steps"]
    steps: dict[str, tuple[str, ...] | None] = {}
    numbers = []
    for step in source.references:
        published = again.find(step.split("/")[0], keys[step])
        assert published is not None
        steps[step] = _differing(source.files.get(step), published.manifest["files"])
        now = {metric_name(key): value for key, value in _numbers(published.manifest["summary"]).items()}
        for key, before in source.numbers.get(step, {}).items():  # MLflow knows them by names of its own
            numbers.append(ComparedNumber(step, key, before, now.get(metric_name(key))))
    return Reproduction(source.frozen["run"], again.root, code.version, steps, numbers)


def _differing(before: digests.FileDigests | None, now: digests.FileDigests) -> tuple[str, ...] | None:
    """Files that are not equal; the data docs tell times and places, so they never are."""
    if before is None:
        return None
    names = sorted(name for name in before.keys() | now.keys() if not name.startswith("data_docs/"))
    return tuple(name for name in names if before.get(name) != now.get(name))
