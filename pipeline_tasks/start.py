"""`nasline start`: resolve and freeze a run, so that every later step reads the same facts."""

from __future__ import annotations

import json
import logging
import subprocess
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from pipeline_tasks import digests
from pipeline_tasks.champion import LINEAGE_FILE
from pipeline_tasks.errors import DataError, ParameterError, RejectedError, UsageError
from pipeline_tasks.keys import parameters_digest
from pipeline_tasks.params import Parameters
from pipeline_tasks.tracking import registry
from pipeline_tasks.tracking.client import tracking_uri
from pipeline_tasks.workspace import Workspace

log = logging.getLogger(__name__)

ROLES = {"target": "dataset", "pretrain": "pretrain_dataset", "unlabeled": "unlabeled_dataset"}
"""Role of a set, and the field of `start` that names its folder."""


def start(
    workspace: Workspace, run: str, parameters: Parameters, replace: bool = False, if_changed: bool = False
) -> dict[str, Any]:
    """Write runs/RUN/run.json and return it.

    Started again with the same facts, the run is left as it is, with the steps it has finished.

    Raises:
        DataError: a dataset folder is missing.
        ParameterError: no target dataset was given.
        UsageError: the run exists with other facts, or a champion was asked for and there is none.
        RejectedError: `if_changed`, and the champion was made from the same data with the same parameters.
    """
    workspace.run_directory(run).mkdir(parents=True, exist_ok=True)
    frozen = _freeze(workspace, run, parameters)
    if if_changed:
        _require_change(workspace, frozen, parameters)
    path = workspace.run_directory(run) / "run.json"
    if path.exists() and not replace:
        return _continue_existing(workspace.read_run(run), frozen)
    workspace.write_run(run, frozen)
    log.info("run %s started in workspace %s", run, workspace.place)
    return frozen


def _freeze(workspace: Workspace, run: str, parameters: Parameters) -> dict[str, Any]:
    return {
        "schema_version": 1,
        "run": run,
        "created_ms": int(time.time() * 1000),
        "parameters": parameters.to_json(),
        "datasets": {role: _dataset(parameters, role, field) for role, field in ROLES.items()},
        "champion": _champion(workspace, parameters),
        "registry": digests.of_json(_registry_name(workspace))[:16],
        "code_version": code_version(),
        "steps": {},
    }


def _require_change(workspace: Workspace, frozen: dict[str, Any], parameters: Parameters) -> None:
    """A scheduled retraining with nothing new would only repeat the champion."""
    champion = frozen["champion"]
    if champion is None:
        return
    path = workspace.root / champion["directory"] / LINEAGE_FILE
    made_from = json.loads(path.read_text(encoding="utf-8"))
    datasets = {role: entry["digest"] for role, entry in frozen["datasets"].items() if entry}
    if (made_from["datasets"], made_from["parameters"]) == (datasets, parameters_digest(parameters)):
        raise RejectedError(
            f"nothing to do: {champion['name']} v{champion['version']} was made from these datasets "
            "with these parameters"
        )


def _continue_existing(existing: dict[str, Any], frozen: dict[str, Any]) -> dict[str, Any]:
    changed = [name for name in ("parameters", "datasets") if _facts(existing, name) != _facts(frozen, name)]
    if changed:
        raise UsageError(
            f"run {existing['run']!r} exists with other {' and '.join(changed)}; "
            "choose another --run, or --replace to forget its list of steps (finished work is kept)"
        )
    log.info("run %s exists already; it goes on with %d finished steps", existing["run"], len(existing["steps"]))
    return existing


def _facts(frozen: dict[str, Any], name: str) -> Any:
    """What must be equal: a dataset's content, not the repository's commit, which moves with unrelated work."""
    if name == "parameters":
        return frozen["parameters"]
    return {role: entry and entry["digest"] for role, entry in frozen["datasets"].items()}


def _dataset(parameters: Parameters, role: str, field: str) -> dict[str, Any] | None:
    folder = getattr(parameters.start, field)
    if not folder:
        if role == "target":
            raise ParameterError("start.dataset is empty; give the folder of the labelled target set")
        return None
    path = Path(folder).expanduser().resolve()
    if not path.is_dir():
        raise DataError(f"start.{field}: folder {path} does not exist; give a folder in COCO layout")
    from pipeline_tasks.data.versioning import dataset_digest, dvc_revision

    return {"path": str(path), "digest": dataset_digest(path), "dvc_revision": dvc_revision(path)}


def _champion(workspace: Workspace, parameters: Parameters) -> dict[str, Any] | None:
    """The champion of this moment, fetched into the workspace and pinned for the whole run."""
    name = parameters.start.model_name
    champion = registry.fetch_champion(workspace, name)
    if champion is None and parameters.start.from_champion:
        raise UsageError(f"model {name!r} has no champion to start from; run the full chain (train_yolo_nas) first")
    return champion


def _registry_name(workspace: Workspace) -> str:
    """The registry a version number belongs to; the workspace's own is named without its place."""
    uri = tracking_uri(workspace)
    return "workspace" if str(workspace.root) in uri else uri.rsplit("@", 1)[-1]


def code_version() -> str:
    """Version of the installed package, and the git commit when it runs from a checkout."""
    try:
        released = version("nasline")
    except PackageNotFoundError:
        released = "not installed"
    checkout = Path(__file__).resolve().parent.parent
    if not (checkout / ".git").exists():
        return released
    result = subprocess.run(
        ["git", "-C", str(checkout), "describe", "--always", "--dirty", "--abbrev=12"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    commit = result.stdout.strip()
    return f"{released}+{commit}" if commit else released
