"""`nasline champion`: who is champion, since when and why, what the gate measured of it, and who was before."""

from __future__ import annotations

import argparse
import json
import logging
import os
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from pipeline_tasks.errors import DataError, UsageError
from pipeline_tasks.lineage_tags import licences

if TYPE_CHECKING:
    from pipeline_tasks.tracking.champions import Move
    from pipeline_tasks.tracking.registered import RegisteredModel, Version
    from pipeline_tasks.workspace import Workspace

log = logging.getLogger(__name__)

DATASET_TAG = "nasline.dataset."


def add_to(commands: Any) -> None:
    """Add the command to the parser's subcommands."""
    text = "Print the champion: since when and why, verdict, latency, lineage, and the champions before it."
    command = commands.add_parser("champion", help=text, description=text, allow_abbrev=False)
    command.add_argument("name", metavar="NAME", nargs="?", help="registered model (default: every one)")
    command.add_argument("--json", action="store_true", help="all of it as JSON")
    command.add_argument("--workspace", default=os.environ.get("NASLINE_WORKSPACE", ".nasline"))
    command.set_defaults(command_function=_run)


def _run(arguments: argparse.Namespace) -> int:
    from pipeline_tasks.tracking import registered
    from pipeline_tasks.workspace import open_workspace

    workspace = open_workspace(arguments.workspace)
    names = [arguments.name] if arguments.name else _known(workspace)
    found = []
    for name in names:
        model = registered.model(workspace, name)
        try:
            version = registered.version(workspace, name, model.champion) if model.champion else None
        except DataError as error:
            if arguments.name:
                raise
            log.warning("%s is left out: %s", name, error)  # a registry may have models of others
            continue
        found.append((model, version))
    if arguments.json:
        print(json.dumps([_content(*one) for one in found], indent=1, sort_keys=True))
    else:
        print("\n\n".join("\n".join(lines(*one)) for one in found))
    return 0


def only_model(workspace: Workspace) -> str:
    """Name of the registry's one model with a champion.

    Raises:
        DataError: there is none.
        UsageError: there are several.
    """
    names = _known(workspace)
    if len(names) > 1:
        raise UsageError(f"the registry has several models; name one of {', '.join(names)}")
    return names[0]


def _known(workspace: Workspace) -> list[str]:
    from pipeline_tasks.tracking import registered
    from pipeline_tasks.tracking.client import shown_uri

    names = [model.name for model in registered.models(workspace)]
    if not names:
        place = shown_uri(workspace)
        raise DataError(f"the registry at {place} has no champion yet; `nasline register` makes the first")
    return names


def lines(model: RegisteredModel, version: Version | None) -> list[str]:
    """What is printed of one model."""
    if version is None:
        return [f"{model.name} has no champion; its alias was taken away", *_former(model)]
    tags, verdict = version.tags, version.verdict
    return [
        f"{model.name} v{version.number}, {_since(model, version.number)}",
        *_row("run", f"{tags.get('nasline.run', 'not told')}, variant {tags.get('nasline.variant', 'not told')}"),
        *_row("verdict", str(verdict.get("sentence", "not told"))),
        *_row("accuracy", _accuracy(tags)),
        *[line for name in ("int8", "float") for line in _row(f"{name} engine", _latency(version.latency.get(name)))],
        *[line for name, value in licences(version.engine).items() for line in _row(name, value)],
        *_row("datasets", _datasets(tags)),
        *_former(model),
    ]


def _row(name: str, value: str) -> list[str]:
    return [f"  {name:<20}{value}"] if value else []


def _since(model: RegisteredModel, version: str) -> str:
    from pipeline_tasks.tracking.champions import minute

    made = model.made
    if made is None:
        last = model.moves[-1] if model.moves else None
        if last is not None and last.before == version:
            return (
                f"champion; a move to v{last.version} broke off at {minute(last.at)}, or was taken back without nasline"
            )
        return "champion; its alias was moved without nasline, so nobody wrote down when and why"
    return f"champion since {minute(made.at)} ({made.kind}, by {made.by}): {made.because}"


def _accuracy(tags: Mapping[str, str]) -> str:
    known = [(name, tags.get(f"nasline.{name}_map50_95")) for name in ("int8", "float")]
    told = ", ".join(f"{name} {value}" for name, value in known if value)
    return f"{told} mAP50-95 on the gate's test images" if told else ""


def _latency(record: Mapping[str, Any] | None) -> str:
    if record is None:
        return ""
    version = str(record["runtime_version"]).partition("-")[0]
    return (
        f"min {record['min_ms']:.2f}, p50 {record['p50_ms']:.2f}, p90 {record['p90_ms']:.2f}, "
        f"p99 {record['p99_ms']:.2f} ms; {record['precision']}, {record['runtime']} {version}, "
        f"{record['input_size']} px, batch {record['batch']}, {record['threads'] or 'all'} threads, "
        f"{record['repeats']} runs on {record['device']['device']}{', noisy' if record['noisy'] else ''}"
    )


def _datasets(tags: Mapping[str, str]) -> str:
    named = {tag.removeprefix(DATASET_TAG): value for tag, value in tags.items() if tag.startswith(DATASET_TAG)}
    return ", ".join(f"{role} {digest[:12]}" for role, digest in named.items())


def _former(model: RegisteredModel) -> list[str]:
    """The moves before the last one, the newest first."""
    from pipeline_tasks.tracking.champions import minute

    moves = list(reversed(model.moves[:-1] if model.made else model.moves))
    if not moves:
        return []
    rows = [f"    v{move.version:<5}{minute(move.at)}  {move.kind} by {move.by}: {move.because}" for move in moves]
    return ["  champions before", *rows]


def _content(model: RegisteredModel, version: Version | None) -> dict[str, Any]:
    made: Move | None = model.made
    return {
        "model": model.name,
        "champion": model.champion,
        "made_champion": made and asdict(made),
        "moves": [asdict(move) for move in model.moves],
        "tags": dict(version.tags) if version else {},
        "verdict": dict(version.verdict) if version else None,
        "latency": dict(version.latency) if version else None,
        "lineage": version.engine.get("lineage") if version else None,
    }
