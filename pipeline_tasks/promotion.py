"""Moving the champion by a person's decision: what may be promoted, and where a rollback leads."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import Literal

from pipeline_tasks.errors import DataError, UsageError
from pipeline_tasks.tracking import registered
from pipeline_tasks.tracking.champions import Compared, move_champion, require_compared
from pipeline_tasks.tracking.client import open_store
from pipeline_tasks.tracking.registered import RegisteredModel, Version
from pipeline_tasks.workspace import Workspace

log = logging.getLogger(__name__)

NO_CHAMPION = "none"
"""In place of a version, where the new champion is to be the first."""


@dataclass(frozen=True)
class Plan:
    """A move that is allowed. `before` is the present champion, None without one; nothing is to do where both are one.

    what: how the version came through the gate.
    """

    name: str
    version: str
    before: str | None
    kind: Literal["promote", "rollback"]
    what: str

    @property
    def nothing_to_do(self) -> bool:
        """Whether the alias stands there already."""
        return self.version == self.before

    def sentence(self) -> str:
        """The move in a line."""
        if self.nothing_to_do:
            return f"nothing to do: {self.name} v{self.version} is champion already ({self.what})"
        word = {"promote": "promote", "rollback": "roll back to"}[self.kind]
        return f"{word} {self.name} v{self.version} ({self.what}); the champion is {_named(self.name, self.before)}"


def plan_promotion(workspace: Workspace, name: str, version: str) -> Plan:
    """Check that a version may be champion.

    Raises:
        DataError: no such model or version, another hand registered it, or the gate did not accept it.
        UnavailableError: the registry does not answer.
    """
    model = registered.model(workspace, name)
    found = registered.version(workspace, name, version)
    return Plan(name, found.number, model.champion, "promote", _accepted(found))


def plan_rollback(workspace: Workspace, name: str, to: str | None = None) -> Plan:
    """Find where a rollback leads: to the version that was champion before the present one, or to the one named.

    Told again without a version, right after a rollback, it leads nowhere: who wants to go further back names where.

    Raises:
        UsageError: there is no champion, none before it, or nobody wrote down which one was.
        DataError: as for a promotion; or the named version never was champion.
        UnavailableError: the registry does not answer.
    """
    model = registered.model(workspace, name)
    if model.champion is None:
        raise UsageError(f"model {name!r} has no champion to roll back; use `nasline promote {name} VERSION`")
    version = _previous(model, model.champion) if to is None else _former(model, to)
    found = registered.version(workspace, name, version)
    return Plan(name, found.number, model.champion, "rollback", _accepted(found))


def require_reason(because: str) -> None:
    """UsageError for a reason without words."""
    if not because.strip():
        raise UsageError("--reason is empty; say why, for those who look at the champion later")


def require_champion(plan: Plan, instead_of: str | None) -> None:
    """ChampionMovedError where a plan replaces another champion than the one named; `carry_out` looks again."""
    if not plan.nothing_to_do:
        require_compared(_compared(instead_of), plan.name, plan.version, plan.kind, plan.before)


def carry_out(workspace: Workspace, plan: Plan, by: str, because: str, instead_of: str | None = None) -> None:
    """Move the alias, and write down who did it and why.

    Args:
        instead_of: the champion that the decision was about, or NO_CHAMPION; None to replace whichever it is.

    Raises:
        ChampionMovedError: another version is champion by now.
        UsageError: no reason was given.
        UnavailableError: the registry does not answer; the same command makes the move then.
    """
    require_reason(because)
    client, compared = open_store(workspace), _compared(instead_of)
    if move_champion(client, workspace, plan.name, plan.version, plan.kind, by, because.strip(), compared) is None:
        log.info("%s", replace(plan, before=plan.version).sentence())  # or another was faster


def _compared(instead_of: str | None) -> Compared | None:
    if instead_of is None:
        return None
    return Compared(None if instead_of == NO_CHAMPION else registered.plain_number(instead_of))


def _accepted(found: Version) -> str:
    """The gate's sentence of a version it accepted; read from verdict.json, since tags can be edited."""
    sentence = found.verdict.get("sentence", "no sentence is told")
    if found.verdict.get("passed") is not True:
        raise DataError(f"{found.name} v{found.number} did not pass the gate ({sentence}); it cannot be champion")
    return str(sentence)


def _previous(model: RegisteredModel, champion: str) -> str:
    made = model.made or model.made_before(champion)  # not the last move where a later one broke off
    if made is not None and made.kind == "rollback":
        log.warning(
            "%s was rolled back from %s already; to go further back name the version with --to",
            model.name, _version(made.before),
        )  # fmt: skip
        return champion
    if made is None:
        raise UsageError(
            f"nobody wrote down which version of {model.name} was champion before v{champion}; "
            "name it with --to VERSION"
        )
    if made.before is None:
        raise UsageError(f"{model.name} v{champion} is the first champion; there is none before it")
    return made.before


def _former(model: RegisteredModel, to: str) -> str:
    to = registered.plain_number(to)
    champions = dict.fromkeys(move.version for move in model.moves)
    told_from_the_first = bool(model.moves) and model.moves[0].before is None
    if told_from_the_first and to not in (*champions, model.champion):
        known = ", ".join(f"v{number}" for number in champions)
        raise DataError(f"{model.name} v{to} never was champion, only {known}; use `nasline promote {model.name} {to}`")
    return to


def _named(name: str, version: str | None) -> str:
    return "none yet" if version is None else f"{name} v{version}"


def _version(version: str | None) -> str:
    return "nothing" if version is None else f"v{version}"
