"""Who is champion and who was: every move of the alias, written down where the alias is.

Each move adds a tag `nasline.champion.TIME` to the registered model, which is never changed again, and puts who, when,
why and the version before on the version itself, where MLflow's page of it shows them. An alias that stands elsewhere
than the last move left it was moved by another hand, and that is said.
"""

from __future__ import annotations

import getpass
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Literal

from pipeline_tasks.tracking.client import ask, away, server_errors
from pipeline_tasks.tracking.mirror import PARENT_TAG
from pipeline_tasks.tracking.registry import CHAMPION

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

    from pipeline_tasks.workspace import Workspace

log = logging.getLogger(__name__)

Kind = Literal["register", "promote", "rollback"]
LOG_TAG = "nasline.champion."
IS_CHAMPION_TAG = "nasline.is_champion"
"""Of a pipeline run in MLflow."""
TIME_FORMAT = "%Y-%m-%dT%H:%M:%S.%fZ"
MOST_LETTERS = 2000
"""Of a reason; MLflow's database keeps up to 5000 of a tag."""


@dataclass(frozen=True)
class Move:
    """One move of the alias; `before` is None for a model's first champion. `at` is UTC, ISO 8601."""

    version: str
    before: str | None
    kind: Kind
    at: str
    by: str
    because: str


def history(tags: Mapping[str, str]) -> tuple[Move, ...]:
    """The moves in a registered model's tags, the oldest first."""
    names = sorted(name for name in tags if name.startswith(LOG_TAG))
    return tuple(Move(**json.loads(tags[name])) for name in names)


def made_champion(moves: Sequence[Move], version: str) -> Move | None:
    """The move that made a version champion the last time; None where none was recorded."""
    return next((move for move in reversed(moves) if move.version == version), None)


def move_champion(
    client: MlflowClient, workspace: Workspace, name: str, version: str, kind: Kind, by: str, because: str
) -> Move | None:
    """Let the alias stand at a version and write the move down; None where it stands there already.

    The alias is moved last: a move that broke off is made again by the same call.

    Raises:
        UnavailableError: the registry does not answer.
    """
    before = aliases(client, workspace, name).get(CHAMPION)
    if before == version:
        return None
    at = datetime.now(UTC).strftime(TIME_FORMAT)
    move = Move(version, before, kind, at, by, because[:MOST_LETTERS])
    try:
        _write(client, name, move)
    except server_errors() as error:
        raise away(workspace, error) from None
    try:
        _tell_runs(client, name, move)
    except server_errors() as error:  # such as a run that was deleted; the champion is moved and written down
        log.warning(
            "the pipeline runs in MLflow do not say yet who is champion: %s", " ".join(str(error).split())[:200]
        )
    log.info("models:/%s@%s is now version %s, before it %s", name, CHAMPION, version, before or "none")
    return move


def aliases(client: MlflowClient, workspace: Workspace, name: str) -> dict[str, str]:
    """Alias to version, empty where there is no such model."""
    model = ask(lambda: client.get_registered_model(name), workspace)
    return {} if model is None else {alias: str(version) for alias, version in model.aliases.items()}


def actor() -> str:
    """Who acts where nobody was named: the user of this process."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        return "unknown"


def _write(client: MlflowClient, name: str, move: Move) -> None:
    content = json.dumps(asdict(move), sort_keys=True, ensure_ascii=False)
    client.set_registered_model_tag(name, f"{LOG_TAG}{move.at}", content)
    told = {"since": move.at, "by": move.by, "because": move.because, "before": move.before or "none"}
    for field, value in told.items():
        client.set_model_version_tag(name, move.version, f"{LOG_TAG}{field}", value)
    client.set_registered_model_alias(name, CHAMPION, move.version)


def _tell_runs(client: MlflowClient, name: str, move: Move) -> None:
    """So that the table of runs says which one made the champion, since when and why."""
    when = minute(move.at)
    sentences = {move.version: f"{name} v{move.version} since {when}, by {move.by}: {move.because}"}
    if move.before is not None:
        sentences[move.before] = f"no longer: {name} v{move.before} until {when}, then v{move.version}"
    for version, sentence in sentences.items():
        made_by = client.get_model_version(name, version).run_id
        parent = client.get_run(made_by).data.tags.get(PARENT_TAG) if made_by else None
        if parent:
            client.set_tag(parent, IS_CHAMPION_TAG, sentence)


def minute(at: str) -> str:
    """A move's time as a reader wants it: `2026-11-22 07:10 UTC`."""
    return f"{at[:10]} {at[11:16]} UTC"
