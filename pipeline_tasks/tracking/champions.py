"""Who is champion and who was: every move of the alias, written down where the alias is.

Each move adds a tag `nasline.champion.TIME` to the registered model, which is never changed again, and puts who, when,
why and the version before on the version itself, where MLflow's page of it shows them. An alias that stands elsewhere
than the last move left it was moved by another hand, and that is said.
"""

from __future__ import annotations

import getpass
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Literal

from pipeline_tasks.errors import DataError, TemporaryError
from pipeline_tasks.tracking.client import ask, away, one_line, server_errors
from pipeline_tasks.tracking.mirror import PARENT_TAG
from pipeline_tasks.tracking.registry import CHAMPION

if TYPE_CHECKING:
    from mlflow.entities.model_registry import RegisteredModel
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
MOST_LETTERS_OF_A_NAME = 200


@dataclass(frozen=True)
class Move:
    """One move of the alias; `before` is None for a model's first champion. `at` is UTC, ISO 8601."""

    version: str
    before: str | None
    kind: Kind
    at: str
    by: str
    because: str


@dataclass(frozen=True)
class Compared:
    """The champion that a gate compared its candidate with, or that a person decided about; the version is None where
    there was none.
    """

    version: str | None


class ChampionMovedError(DataError):
    """The champion is not the one that was decided about: neither verdict nor approval says anything of this one."""


def history(tags: Mapping[str, str]) -> tuple[Move, ...]:
    """The moves in a registered model's tags, the oldest first; a tag that another hand wrote there is none."""
    names = sorted(name for name in tags if name.startswith(LOG_TAG))
    return tuple(move for name in names if (move := _move(name, tags[name])) is not None)


def _move(tag: str, content: str) -> Move | None:
    try:
        return Move(**json.loads(content))
    except (TypeError, ValueError):
        log.warning("the tag %s of the model is no move of the champion that nasline wrote; it is left out", tag)
        return None


def made_champion(moves: Sequence[Move], version: str) -> Move | None:
    """The move that made a version champion the last time; None where none was recorded."""
    return next((move for move in reversed(moves) if move.version == version), None)


def move_champion(
    client: MlflowClient,
    workspace: Workspace,
    name: str,
    version: str,
    kind: Kind,
    by: str,
    because: str,
    compared: Compared | None = None,
) -> Move | None:
    """Let the alias stand at a version and write the move down; None where it stands there already.

    The alias is moved last: a move that broke off is made again by the same call. One that broke off behind it, before
    the pipeline runs were told, is told by the same call. Of two at once in one workspace, on one machine or on two,
    the second waits for the first. Two workspaces of one registry know nothing of each other, and MLflow has no move on
    a condition: the alias is read again right before it is moved; of two moves within that request the later wins.

    Args:
        compared: what the candidate was compared with, where a gate decided; what it was to replace, where a person
            said so; None to move the alias whatever it stands at.

    Raises:
        ChampionMovedError: the champion is another than `compared`; nothing is written.
        UnavailableError: the registry does not answer.
        TemporaryError: another process has been moving this alias for a minute, took the right to while this one
            stood still, or moved it from another workspace in this moment.
    """
    with workspace.champion_lease(name) as confirm:
        model = ask(lambda: client.get_registered_model(name), workspace)
        moves = history(model.tags) if model else ()
        before = _champion(model) if model else None
        if before == version:
            if moves and moves[-1].version == version:
                _tell_runs(client, name, moves[-1])
            return None
        require_compared(compared, name, version, kind, before)
        who, why = _plain(by)[:MOST_LETTERS_OF_A_NAME], _plain(because)[:MOST_LETTERS]
        move = Move(version, before, kind, _later(moves), who, why)
        try:
            _write(client, name, move, confirm)
        except TemporaryError:
            raise
        except server_errors() as error:
            raise away(workspace, error) from None
        _tell_runs(client, name, move)
    log.info("models:/%s@%s is now version %s, before it %s", name, CHAMPION, version, before or "none")
    return move


def require_compared(compared: Compared | None, name: str, version: str, kind: Kind, champion: str | None) -> None:
    """ChampionMovedError where the champion is another than the one that was decided about."""
    if compared is not None and champion != compared.version:
        sentence = _moved if kind == "register" else _not_the_one
        raise ChampionMovedError(sentence(name, version, compared.version, champion))


def _later(moves: Sequence[Move]) -> str:
    """Now, or just after the last move where this machine's clock is behind: the tags are read in the order of time."""
    now = datetime.now(UTC)
    if moves:
        now = max(now, datetime.strptime(moves[-1].at, TIME_FORMAT).replace(tzinfo=UTC) + timedelta(microseconds=1))
    return now.strftime(TIME_FORMAT)


def _plain(text: str) -> str:
    """Words as one line without control characters, which terminals obey and JSON writes with six letters."""
    return " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())


def actor() -> str:
    """Who acts where nobody was named: the user of this process."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        return "unknown"


def _write(client: MlflowClient, name: str, move: Move, confirm: Callable[[], None]) -> None:
    content = json.dumps(asdict(move), sort_keys=True, ensure_ascii=False)
    client.set_registered_model_tag(name, f"{LOG_TAG}{move.at}", content)
    told = {"since": move.at, "by": move.by, "because": move.because, "before": move.before or "none"}
    for field, value in told.items():
        client.set_model_version_tag(name, move.version, f"{LOG_TAG}{field}", value)
    confirm()
    if _champion(client.get_registered_model(name)) != move.before:
        raise TemporaryError(f"another workspace moved the champion of {name} in this moment; do the same again")
    client.set_registered_model_alias(name, CHAMPION, move.version)


def _champion(model: RegisteredModel) -> str | None:
    return str(model.aliases[CHAMPION]) if CHAMPION in model.aliases else None


def _moved(name: str, version: str, then: str | None, now: str | None) -> str:
    compared = f"v{then}, which is champion no longer" if then else "no champion, and there is one by now"
    present = f" (it is v{now})" if now else ""
    return (
        f"{name} v{version} was compared with {compared}{present}; start another run, which compares with the "
        f"present one and reuses what does not depend on it, or decide yourself: `nasline promote {name} {version}`"
    )


def _not_the_one(name: str, version: str, then: str | None, now: str | None) -> str:
    present = f"v{now}" if now else "no version"
    meant = f"to replace v{then}" if then else "to be the first"
    return (
        f"the champion of {name} is {present}, but v{version} was {meant}; nothing was moved: "
        f"`nasline champion {name}` tells who made it champion, then decide again"
    )


def _tell_runs(client: MlflowClient, name: str, move: Move) -> None:
    """So that the table of runs says which one made the champion, since when and why. A warning where that fails, such
    as for a run that was deleted: the champion is moved and written down.
    """
    when = minute(move.at)
    sentences = {move.version: f"{name} v{move.version} since {when}, by {move.by}: {move.because}"}
    if move.before is not None:
        sentences[move.before] = f"no longer: {name} v{move.before} until {when}, then v{move.version}"
    try:
        for version, sentence in sentences.items():
            made_by = client.get_model_version(name, version).run_id
            parent = client.get_run(made_by).data.tags.get(PARENT_TAG) if made_by else None
            if parent:
                client.set_tag(parent, IS_CHAMPION_TAG, sentence)
    except server_errors() as error:
        log.warning("the pipeline runs in MLflow do not say yet who is champion: %s", one_line(error))


def minute(at: str) -> str:
    """A move's time as a reader wants it: `2026-11-22 07:10 UTC`."""
    return f"{at[:10]} {at[11:16]} UTC"
