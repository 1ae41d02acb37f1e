"""`nasline runs`: the pipeline runs as a table: data, variants, the gate's verdict, what became champion and why."""

from __future__ import annotations

import argparse
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from pipeline_tasks.errors import ConfigurationError, DataError, ParameterError, UnavailableError, UsageError
from pipeline_tasks.text_table import aligned

if TYPE_CHECKING:
    from pipeline_tasks.run_facts import RunFacts
    from pipeline_tasks.tracking.registered import RegisteredModel
    from pipeline_tasks.workspace import Workspace

log = logging.getLogger(__name__)

HEADING = ("run", "started", "state", "data", "student < teacher", "mAP50-95", "p50 ms", "gate", "registered")
MOST_LETTERS = 48
"""Of a verdict in the table; --json has all."""


def add_to(commands: Any) -> None:
    """Add the command to the parser's subcommands."""
    text = "List pipeline runs: data, variants, the gate's result, which one made the champion, and why."
    command = commands.add_parser("runs", help=text, description=text, allow_abbrev=False)
    command.add_argument("--limit", type=int, default=20, metavar="N", help="the newest N runs (default 20)")
    command.add_argument("--json", action="store_true", help="all facts as JSON")
    command.add_argument("--workspace", default=os.environ.get("NASLINE_WORKSPACE", ".nasline"))
    command.set_defaults(command_function=_run)


def _run(arguments: argparse.Namespace) -> int:
    from pipeline_tasks.workspace import open_workspace

    if arguments.limit < 1:
        raise ParameterError(f"--limit must be at least 1, got {arguments.limit}")
    workspace = open_workspace(arguments.workspace)
    found, champions = collect(workspace, arguments.limit)
    if arguments.json:
        print(json.dumps([_content(one, champions) for one in found], indent=1, sort_keys=True))
    else:
        print("\n".join(table(found, champions)))
    return 0


def collect(workspace: Workspace, limit: int) -> tuple[list[RunFacts], dict[str, RegisteredModel]]:
    """The newest runs that MLflow or the workspace knows, the newest first, and the registered models by name."""
    from pipeline_tasks.tracking import pipeline_runs, registered

    models: dict[str, RegisteredModel] = {}
    mirrored: list[RunFacts] = []
    try:
        mirrored = pipeline_runs.list_runs(workspace, limit)
        models = {model.name: model for model in registered.models(workspace)}
    except (UnavailableError, ConfigurationError) as error:
        log.warning("%s; these are the workspace's runs alone, without champions", error)
    known = {one.run for one in mirrored}
    ours = list(_readable(workspace, [run for run in workspace.run_ids() if run not in known]))
    newest_first = sorted([*mirrored, *ours], key=lambda one: (-one.started_ms, one.run))
    return newest_first[:limit], models


def _readable(workspace: Workspace, runs: Sequence[str]) -> Iterator[RunFacts]:
    """Runs without their curves; one that is damaged, or was removed meanwhile, does not hide the others."""
    from pipeline_tasks.run_facts import in_workspace

    for run in runs:
        try:
            yield in_workspace(workspace, run, with_curves=False)
        except (DataError, UsageError, KeyError) as error:
            reason = f"its files lack {error}" if isinstance(error, KeyError) else error
            log.warning("run %s is left out: %s", run, reason)


def table(found: Sequence[RunFacts], models: Mapping[str, RegisteredModel]) -> list[str]:
    """The lines to print: a row per run, then a sentence per champion."""
    from pipeline_tasks.tracking.champions import minute

    if not found:
        return ["no runs yet; `nasline start` makes the first"]
    lines = aligned([HEADING, *(_cells(one, models) for one in found)])
    for model in models.values():
        if model.made is not None:
            move = model.made
            reason = f"since {minute(move.at)} ({move.kind}, by {move.by}): {move.because}"
            lines.append(f"\n{model.name} v{move.version} is champion {reason}")
        elif model.champion is not None:
            lines.append(f"\n{model.name} v{model.champion} is champion; nobody wrote down since when and why")
    return lines


def _cells(one: RunFacts, models: Mapping[str, RegisteredModel]) -> tuple[str, ...]:
    started = datetime.fromtimestamp(one.started_ms / 1000, UTC)
    return (
        one.run,
        f"{started:%Y-%m-%d %H:%M}",
        one.state,
        one.data,
        one.variants,
        _number(one.metrics.get("gate/int8_map50_95"), 4),
        _number(one.metrics.get("gate/int8_latency_p50_ms"), 2),
        _shortened(one.verdict or "-"),
        f"{one.registered or '-'}{' champion' if is_champion(one, models) else ''}",
    )


def is_champion(one: RunFacts, models: Mapping[str, RegisteredModel]) -> bool:
    """Whether the run's version is the champion of its model now."""
    name, _, version = (one.registered or "").rpartition(" v")
    return name in models and models[name].champion == version


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _shortened(text: str) -> str:
    return text if len(text) <= MOST_LETTERS else text[: MOST_LETTERS - 1] + "…"


def _content(one: RunFacts, models: Mapping[str, RegisteredModel]) -> dict[str, Any]:
    return {
        "run": one.run,
        "started_ms": one.started_ms,
        "state": one.state,
        "datasets": one.datasets,
        "parameters": one.parameters,
        "metrics": one.metrics,
        "verdict": one.verdict,
        "registered": one.registered,
        "is_champion": is_champion(one, models),
    }
