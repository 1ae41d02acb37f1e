"""The model registry: what `start` and `predict` take from it (`registration` puts it there)."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
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
BUNDLE_TAG = "nasline.bundle_digest"
"""Digest of all files of a bundle; releases before it left it out."""
VERDICT_TAG = "nasline.verdict"
BEST_TAG = "nasline.best_of_line"
PINNED = "bundle"
"""Field of a champion's entry in run.json: digest of all of its bundle's files."""
ITSELF = "itself"
"""Value of BEST_TAG where no ancestor was measured better."""
BUNDLE = "bundle"
"""Folder inside the registered model: engine/, gate/, student/, teacher/, lineage.json, sometimes best/."""


def fetch_champion(workspace: Workspace, name: str) -> dict[str, Any] | None:
    """Pin the champion of a model: fetch its bundle into `champions/`, once per version.

    Returns name, version, digests of its engine and of its whole bundle, name of the best of its line and the folder
    (relative to the workspace); None without a champion. Of an older release's registration nothing tells what the
    bundle must be: there the digest is that of the bundle as it was found.

    Raises:
        DataError: the bundle is not the one that was registered.
        UnavailableError: the registry does not answer.
    """
    champion = find_champion(workspace, name)
    if champion is None:
        return None
    folder = _fetch_bundle(workspace, champion)
    return {**champion, PINNED: champion[PINNED] or bundle_digest(folder)}


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
    if ENGINE_TAG not in version.tags:
        raise DataError(
            f"models:/{name}@{CHAMPION} is version {version.version}, which nasline did not make; "
            "move the alias to one of its own versions, or choose another start.model_name"
        )
    return _entry(name, version)


def _entry(name: str, version: ModelVersion) -> dict[str, Any]:
    """What run.json holds of a registered version; `bundle` is None where an older release registered it."""
    tags, digest = version.tags, version.tags[ENGINE_TAG]
    return {
        "name": name,
        "version": str(version.version),
        "digest": digest,
        PINNED: tags.get(BUNDLE_TAG),
        "best": tags.get(BEST_TAG, ITSELF),
        "directory": str(Path("champions") / f"{name}-v{version.version}-{digest[:12]}"),
    }


def fetch_model(workspace: Workspace, uri: str) -> Path:
    """Folder of the bundle behind `models:/NAME@ALIAS` or `models:/NAME/VERSION`, fetched once per version.

    Raises:
        DataError: no such model, alias or version, or its bundle is not the one that was registered.
        UnavailableError: the registry does not answer.
    """
    return _fetch_bundle(workspace, _entry(*_parse(open_store(workspace), workspace, uri)))


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


def _fetch_bundle(workspace: Workspace, champion: Mapping[str, Any]) -> Path:
    """Folder of a bundle, fetched unless it is there, and compared with what was registered."""
    folder: Path = workspace.root / champion["directory"]
    with file_lock(folder.with_suffix(".lock"), 600.0):
        if not folder.is_dir():
            _download(workspace, f"models:/{champion['name']}/{champion['version']}", folder)
    require_unchanged(folder, champion)
    return folder


def _download(workspace: Workspace, uri: str, folder: Path) -> None:
    """Beside and renamed, so that a broken download is never taken for a bundle."""
    import mlflow

    temporary = folder.with_name(folder.name + ".partial")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        downloaded = mlflow.artifacts.download_artifacts(artifact_uri=uri, dst_path=str(temporary))
    except server_errors() as error:
        raise away(workspace, error) from None
    os.rename(Path(downloaded) / "artifacts" / BUNDLE, folder)
    shutil.rmtree(temporary, ignore_errors=True)


def require_unchanged(bundle: Path, champion: Mapping[str, Any]) -> None:
    """Compare all files of a run's champion with the digest that was registered, and that the run pinned.

    Its engines are to be beaten, its networks train on, its lineage says which test images count, and its data are
    compared with today's. Of what an older release registered or started the engine alone is known.

    Raises:
        DataError: a file was changed, removed or added since it was fetched.
    """
    whole = champion.get(PINNED) is not None
    folder, pinned = (bundle, champion[PINNED]) if whole else (bundle / "engine", champion["digest"])
    if bundle_digest(folder) != pinned:
        raise DataError(
            f"{folder} is not the {'bundle' if whole else 'engine'} of {champion['name']} v{champion['version']} (its "
            f"digest is not {pinned[:12]}): remove the folder {bundle}, it is fetched anew; where that does not help, "
            "MLflow's artifact store was changed, and another version has to be promoted"
        )


def bundle_digest(folder: Path) -> str:
    """Content digest of a bundle or of a folder in it."""
    return digests.of_files(digests.of_folder(folder))
