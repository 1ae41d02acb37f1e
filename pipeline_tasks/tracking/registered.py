"""A registered model as a reader wants it: its versions, its champion, and what the gate measured of one version."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipeline_tasks.errors import DataError
from pipeline_tasks.tracking.champions import Move, history, made_champion
from pipeline_tasks.tracking.client import ask, away, open_store, server_errors, shown_uri, store_exists
from pipeline_tasks.tracking.registry import BUNDLE, CHAMPION, ENGINE_TAG, version_by_number

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

    from pipeline_tasks.workspace import Workspace

NUMBER = re.compile(r"[0-9]{1,9}")
MISSING = re.compile(r"No such|404 Client Error|error code 404")
"""In what an artifact store says of a file that is not there."""


@dataclass(frozen=True)
class RegisteredModel:
    """Name, the champion's version (None without one), and every recorded move of that alias, the oldest first."""

    name: str
    champion: str | None
    moves: tuple[Move, ...]

    @property
    def made(self) -> Move | None:
        """The move that made the present champion; None where another hand moved the alias last."""
        last = self.moves[-1] if self.moves else None
        return last if last is not None and last.version == self.champion else None

    def made_before(self, version: str) -> Move | None:
        """The move that made a version champion the last time."""
        return made_champion(self.moves, version)


@dataclass(frozen=True)
class Version:
    """One version that nasline made: its tags, and the gate's and the engine's files from its bundle."""

    name: str
    number: str
    created_ms: int
    tags: Mapping[str, str]
    verdict: Mapping[str, Any]
    latency: Mapping[str, Any]
    engine: Mapping[str, Any]


def models(workspace: Workspace) -> list[RegisteredModel]:
    """Every model of the registry that has a champion or had one, by name.

    Raises:
        UnavailableError: the registry does not answer.
    """
    if not store_exists(workspace):
        return []
    client = open_store(workspace)
    found = ask(lambda: list(client.search_registered_models(max_results=1000)), workspace) or []
    known = [_model(one) for one in sorted(found, key=lambda one: str(one.name))]
    return [model for model in known if model.champion or model.moves]


def model(workspace: Workspace, name: str) -> RegisteredModel:
    """A model of the registry.

    Raises:
        DataError: the registry is empty or has no model of that name.
        UnavailableError: the registry does not answer.
    """
    place = shown_uri(workspace)
    if not store_exists(workspace):
        raise DataError(f"the registry at {place} is empty; `nasline register` puts the first version there")
    client = open_store(workspace)
    found = ask(lambda: client.get_registered_model(name), workspace)
    if found is None:
        names = _names(client, workspace)
        remedy = f"it has {names}" if names else "it is empty; `nasline register` puts the first version there"
        raise DataError(f"model {name!r} is not in the registry at {place}; {remedy}")
    return _model(found)


def version(workspace: Workspace, name: str, number: str) -> Version:
    """A version that nasline made.

    Raises:
        DataError: there is no such version, another hand registered it, or its files are gone.
        UnavailableError: the registry does not answer.
    """
    client, number = open_store(workspace), plain_number(number)
    found = version_by_number(client, workspace, name, number) if NUMBER.fullmatch(number) else None
    if found is None:
        raise DataError(f"model {name!r} has no version {number!r}; it has {_numbers(client, workspace, name)}")
    if ENGINE_TAG not in found.tags:
        raise DataError(f"{name} v{number} was not made by nasline; choose a version that `nasline register` made")
    files = ("gate/verdict.json", "gate/latency.json", "engine/engine.json")
    verdict, latency, engine = (_read(workspace, name, number, file) for file in files)
    return Version(name, number, int(found.creation_timestamp), dict(found.tags), verdict, latency, engine)


def plain_number(number: str) -> str:
    """`02` as the registry writes it; what is no number stays."""
    return str(int(number)) if NUMBER.fullmatch(number) else number


def _model(found: Any) -> RegisteredModel:
    champion = found.aliases.get(CHAMPION)
    return RegisteredModel(str(found.name), None if champion is None else str(champion), history(found.tags))


def _names(client: MlflowClient, workspace: Workspace) -> str:
    found = ask(lambda: list(client.search_registered_models(max_results=20)), workspace) or []
    return ", ".join(sorted(str(one.name) for one in found))


def _numbers(client: MlflowClient, workspace: Workspace, name: str) -> str:
    found = ask(lambda: list(client.search_model_versions(f"name = '{name}'", max_results=20)), workspace) or []
    return ", ".join(sorted((str(one.version) for one in found), key=int)) or "none"


def _read(workspace: Workspace, name: str, number: str, file: str) -> dict[str, Any]:
    """A JSON file of a version's bundle, without fetching the rest."""
    import mlflow

    try:
        content: dict[str, Any] = mlflow.artifacts.load_dict(f"models:/{name}/{number}/artifacts/{BUNDLE}/{file}")
    except server_errors() as error:
        if isinstance(error, FileNotFoundError) or MISSING.search(str(error)):
            raise DataError(f"{name} v{number} lacks {file} in the artifact store; choose another version") from None
        raise away(workspace, error) from None
    return content
