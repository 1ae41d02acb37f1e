"""The model registry: what `register` puts there, and what `start` and `predict` take from it."""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline_tasks import digests
from pipeline_tasks.errors import DataError, UnavailableError
from pipeline_tasks.tracking.client import connect, server_errors, store_exists, tracking_uri
from pipeline_tasks.workspace import Workspace, file_lock

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion
    from mlflow.tracking import MlflowClient

log = logging.getLogger(__name__)

CHAMPION = "champion"
CANDIDATE = "candidate"
ENGINE_TAG = "nasline.engine_digest"
BEST_TAG = "nasline.best_of_line"
ITSELF = "itself"
"""Value of BEST_TAG where no ancestor was measured better."""
BUNDLE = "bundle"
"""Folder inside the registered model: engine/, gate/, student/, teacher/, lineage.json, sometimes best/."""


def fetch_champion(workspace: Workspace, name: str) -> dict[str, Any] | None:
    """Pin the champion of a model: fetch its bundle into `champions/`, once per version.

    Returns name, version, engine digest, name of the best of its line and the folder (relative to the workspace); None
    without a champion.

    Raises:
        UnavailableError: the registry does not answer.
    """
    champion = find_champion(workspace, name)
    if champion is not None:
        _fetch_bundle(workspace, f"models:/{name}/{champion['version']}", workspace.root / champion["directory"])
    return champion


def find_champion(workspace: Workspace, name: str) -> dict[str, Any] | None:
    """What `fetch_champion` returns, without fetching: the folder need not exist.

    Raises:
        UnavailableError: the registry does not answer.
    """
    if not store_exists(workspace):
        return None
    client = connect(workspace)
    version = _version_by_alias(client, workspace, name, CHAMPION)
    if version is None:
        return None
    digest = version.tags.get(ENGINE_TAG)
    if digest is None:
        raise DataError(
            f"models:/{name}@{CHAMPION} is version {version.version}, which nasline did not make; "
            "move the alias to one of its own versions, or choose another start.model_name"
        )
    directory = Path("champions") / f"{name}-v{version.version}-{digest[:12]}"
    best = version.tags.get(BEST_TAG, ITSELF)
    return {
        "name": name, "version": str(version.version), "digest": digest, "best": best, "directory": str(directory)
    }  # fmt: skip


def fetch_model(workspace: Workspace, uri: str) -> Path:
    """Folder of the bundle behind `models:/NAME@ALIAS` or `models:/NAME/VERSION`, fetched once per version.

    Raises:
        DataError: no such model, alias or version.
        UnavailableError: the registry does not answer.
    """
    client = connect(workspace)
    name, version = _parse(client, workspace, uri)
    folder = workspace.root / "champions" / f"{name}-v{version.version}-{version.tags[ENGINE_TAG][:12]}"
    _fetch_bundle(workspace, f"models:/{name}/{version.version}", folder)
    return folder


def _parse(client: MlflowClient, workspace: Workspace, uri: str) -> tuple[str, ModelVersion]:
    rest = uri.removeprefix("models:/")
    name, _, alias = rest.partition("@")
    if alias:
        version = _version_by_alias(client, workspace, name, alias)
    else:
        name, _, number = rest.partition("/")
        version = _version_by_number(client, workspace, name, number)
    if version is None or ENGINE_TAG not in version.tags:
        raise DataError(
            f"{uri} is not in the registry at {tracking_uri(workspace)}; "
            "give models:/NAME@champion or models:/NAME/VERSION of a model that `nasline register` made"
        )
    return name, version


def _version_by_alias(client: MlflowClient, workspace: Workspace, name: str, alias: str) -> ModelVersion | None:
    version: ModelVersion | None = _ask(lambda: client.get_model_version_by_alias(name, alias), workspace)
    return version


def _version_by_number(client: MlflowClient, workspace: Workspace, name: str, number: str) -> ModelVersion | None:
    version: ModelVersion | None = _ask(lambda: client.get_model_version(name, number), workspace)
    return version


def _ask(question: Any, workspace: Workspace) -> Any:
    """The answer, None when the registry knows no such thing."""
    from mlflow.exceptions import MlflowException
    from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE, RESOURCE_DOES_NOT_EXIST, ErrorCode

    unknown = {ErrorCode.Name(RESOURCE_DOES_NOT_EXIST), ErrorCode.Name(INVALID_PARAMETER_VALUE)}
    try:
        return question()
    except MlflowException as error:
        if error.error_code in unknown:
            return None
        raise UnavailableError(_away(workspace, error)) from None
    except server_errors() as error:
        raise UnavailableError(_away(workspace, error)) from None


def _away(workspace: Workspace, error: Exception) -> str:
    text = " ".join(str(error).split())[:200]
    place = tracking_uri(workspace)
    return f"the model registry at {place} does not answer ({text}); start it or set MLFLOW_TRACKING_URI"


def _fetch_bundle(workspace: Workspace, uri: str, folder: Path) -> None:
    """Download beside and rename, so that a broken download is never taken for a bundle."""
    import mlflow

    with file_lock(folder.with_suffix(".lock"), 600.0):
        if folder.is_dir():
            return
        temporary = folder.with_name(folder.name + ".partial")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        try:
            downloaded = mlflow.artifacts.download_artifacts(artifact_uri=uri, dst_path=str(temporary))
        except server_errors() as error:
            raise UnavailableError(_away(workspace, error)) from None
        os.rename(Path(downloaded) / "artifacts" / BUNDLE, folder)
        shutil.rmtree(temporary, ignore_errors=True)


def register_bundle(
    workspace: Workspace,
    name: str,
    bundle: Path,
    run_id: str | None,
    tags: dict[str, str],
    promote: bool,
    description: str = "",
) -> dict[str, Any]:
    """Register a bundle as a new version and move the aliases; an engine that is registered already, with the same best
    ancestor to beat, keeps its version.

    Args:
        bundle: Folder with engine/, gate/, student/, teacher/, lineage.json and perhaps best/.
        run_id: MLflow run of the step `register`, which then owns the model.
        tags: Tags of the version; ENGINE_TAG and BEST_TAG among them.
        description: The version's page, in Markdown.

    Raises:
        UnavailableError: the registry does not answer; nothing was promoted.
    """
    client = connect(workspace)
    try:
        version = _existing_version(client, name, tags) or _new_version(client, name, bundle, run_id)
        for key, value in tags.items():
            client.set_model_version_tag(name, version, key, value)
        if description:
            client.update_model_version(name, version, description)
        client.set_registered_model_alias(name, CANDIDATE, version)
        if promote:
            client.set_registered_model_alias(name, CHAMPION, version)
    except server_errors() as error:
        raise UnavailableError(_away(workspace, error)) from None
    log.info("registered models:/%s/%s%s", name, version, ", now @champion" if promote else "")
    return {"model": name, "version": version, "aliases": [CANDIDATE, *([CHAMPION] if promote else [])]}


def _existing_version(client: MlflowClient, name: str, tags: dict[str, str]) -> str | None:
    same = [f"tags.`{tag}` = '{tags[tag]}'" for tag in (ENGINE_TAG, BEST_TAG)]
    found = client.search_model_versions(" and ".join([f"name = '{name}'", *same]))
    return str(found[0].version) if found else None


def _new_version(client: MlflowClient, name: str, bundle: Path, run_id: str | None) -> str:
    import mlflow

    with mlflow.start_run(run_id=run_id, log_system_metrics=False):
        info = mlflow.pyfunc.log_model(
            name="engine",
            python_model=str(Path(__file__).with_name("engine_model.py")),
            artifacts={BUNDLE: str(bundle)},
            pip_requirements=[f"nasline=={_version()}"],
            registered_model_name=name,
        )
    return str(info.registered_model_version)


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("nasline")
    except PackageNotFoundError:
        return "0.1.0"


def bundle_digest(engine: Path) -> str:
    """Content digest of an engine directory."""
    return digests.of_files(digests.of_folder(engine))
