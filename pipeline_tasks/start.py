"""`nasline start`: resolve and freeze a run, so that every later step reads the same facts."""

from __future__ import annotations

import json
import logging
import subprocess
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from pipeline_tasks import champion_data, digests, initial_checkpoint, pinned_files
from pipeline_tasks.combinations import require_possible
from pipeline_tasks.errors import DataError, ParameterError, RejectedError, UsageError
from pipeline_tasks.keys import parameters_digest
from pipeline_tasks.params import Parameters
from pipeline_tasks.seen_images import LINEAGE_FILE
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
        ParameterError: no target dataset was given, or parameters are impossible together.
        UsageError: the run exists with other facts, or a champion was asked for and there is none.
        RejectedError: `if_changed`, and the champion was made from the same data with the same parameters.
    """
    require_possible(parameters)
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
        "datasets": {role: pin_dataset(parameters, role, field) for role, field in ROLES.items()},
        "champion": _champion(workspace, parameters),
        "initial_checkpoint": initial_checkpoint.pin(parameters),
        pinned_files.FIELD: pinned_files.pin(parameters),
        "registry": registry_name(workspace),
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
    made_of = [made_from["datasets"], made_from["parameters"], made_from.get(initial_checkpoint.INPUT)]
    made_of.append(made_from.get(pinned_files.EXTRA_TEACHERS, []))
    files = [initial_checkpoint.pinned_digest(frozen), pinned_files.extra_teachers(frozen)]
    if made_of == [datasets, parameters_digest(parameters), *files]:
        raise RejectedError(
            f"nothing to do: {champion['name']} v{champion['version']} was made from these datasets "
            "with these parameters"
        )


def _continue_existing(existing: dict[str, Any], frozen: dict[str, Any]) -> dict[str, Any]:
    names = ("parameters", "datasets", initial_checkpoint.INPUT, pinned_files.FIELD)
    changed = [name for name in names if _facts(existing, name) != _facts(frozen, name)]
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
    if name == initial_checkpoint.INPUT:
        return initial_checkpoint.pinned_digest(frozen)
    if name == pinned_files.FIELD:
        return [pinned_files.facts(frozen, step) for step in ("teach", "pseudo_label")]
    return {role: entry and entry["digest"] for role, entry in frozen["datasets"].items()}


def pin_dataset(parameters: Parameters, role: str, field: str) -> dict[str, Any] | None:
    """Place, content digest, DVC revision and remote of a set; None where none was given.

    Raises:
        ParameterError: it is the target set, which must be given.
        DataError: the folder does not exist.
    """
    folder = getattr(parameters.start, field)
    if not folder:
        if role == "target":
            raise ParameterError("start.dataset is empty; give the folder of the labelled target set")
        return None
    path = Path(folder).expanduser().resolve()
    if not path.is_dir():
        raise DataError(f"start.{field}: folder {path} does not exist; give the folder of a dataset")
    from pipeline_tasks.data.versioning import dataset_digest, dvc_remote, dvc_revision

    revision = dvc_revision(path)
    remote = dvc_remote(path) if revision else None
    return {"path": str(path), "digest": dataset_digest(path), "dvc_revision": revision, "dvc_remote": remote}


def _champion(workspace: Workspace, parameters: Parameters) -> dict[str, Any] | None:
    """The champion of this moment, fetched into the workspace and pinned for the whole run."""
    name = parameters.start.model_name
    champion = registry.fetch_champion(workspace, name)
    if champion is None and (parameters.start.from_champion or parameters.teach.source != "train"):
        raise no_champion(parameters)
    if champion is not None:
        champion[champion_data.FIELD] = champion_data.pin(workspace.root / champion["directory"])
    return champion


def no_champion(parameters: Parameters) -> UsageError:
    """The error of a run that needs a champion where there is none."""
    name = parameters.start.model_name
    return UsageError(f"model {name!r} has no champion to start from; run the full chain (train_yolo_nas) first")


def registry_name(workspace: Workspace) -> str:
    """Digest of the registry a version number belongs to; the workspace's own is named without its place."""
    uri = tracking_uri(workspace)
    return digests.of_json("workspace" if str(workspace.root) in uri else uri.rsplit("@", 1)[-1])[:16]


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
