"""The model registry: what `start` and `predict` take from it (`registration` puts it there)."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline_tasks import digests
from pipeline_tasks.errors import DataError
from pipeline_tasks.tracking.client import ask, away, open_store, server_errors, shown_uri, store_exists
from pipeline_tasks.workspace import Workspace, file_lock

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion
    from mlflow.tracking import MlflowClient

CHAMPION = "champion"
CANDIDATE = "candidate"
ENGINE_TAG = "nasline.engine_digest"
VERDICT_TAG = "nasline.verdict"
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
    client = open_store(workspace)
    version = version_by_alias(client, workspace, name, CHAMPION)
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
    client = open_store(workspace)
    name, version = _parse(client, workspace, uri)
    folder = workspace.root / "champions" / f"{name}-v{version.version}-{version.tags[ENGINE_TAG][:12]}"
    _fetch_bundle(workspace, f"models:/{name}/{version.version}", folder)
    return folder


def _parse(client: MlflowClient, workspace: Workspace, uri: str) -> tuple[str, ModelVersion]:
    rest = uri.removeprefix("models:/")
    name, _, alias = rest.partition("@")
    if alias:
        version = version_by_alias(client, workspace, name, alias)
    else:
        name, _, number = rest.partition("/")
        version = version_by_number(client, workspace, name, number)
    if version is None or ENGINE_TAG not in version.tags:
        raise DataError(
            f"{uri} is not in the registry at {shown_uri(workspace)}; "
            "give models:/NAME@champion or models:/NAME/VERSION of a model that `nasline register` made"
        )
    return name, version


def version_by_alias(client: MlflowClient, workspace: Workspace, name: str, alias: str) -> ModelVersion | None:
    """The version an alias stands at; UnavailableError while the registry does not answer."""
    version: ModelVersion | None = ask(lambda: client.get_model_version_by_alias(name, alias), workspace)
    return version


def version_by_number(client: MlflowClient, workspace: Workspace, name: str, number: str) -> ModelVersion | None:
    """The version of that number; UnavailableError while the registry does not answer."""
    version: ModelVersion | None = ask(lambda: client.get_model_version(name, number), workspace)
    return version


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
            raise away(workspace, error) from None
        os.rename(Path(downloaded) / "artifacts" / BUNDLE, folder)
        shutil.rmtree(temporary, ignore_errors=True)


def bundle_digest(engine: Path) -> str:
    """Content digest of an engine directory."""
    return digests.of_files(digests.of_folder(engine))
