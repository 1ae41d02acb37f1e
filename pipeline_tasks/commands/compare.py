"""`nasline compare`: runs side by side: parameters that differ, final numbers, and curves in one picture."""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline_tasks.errors import UnavailableError, UsageError
from pipeline_tasks.output_place import require_folder
from pipeline_tasks.text_table import aligned

if TYPE_CHECKING:
    from pipeline_tasks.run_facts import RunFacts
    from pipeline_tasks.workspace import Workspace

log = logging.getLogger(__name__)

PICTURE = "curves.png"


def add_to(commands: Any) -> None:
    """Add the command to the parser's subcommands."""
    text = "Compare runs: parameters that differ, final numbers side by side, curves in one picture."
    command = commands.add_parser("compare", help=text, description=text, allow_abbrev=False)
    command.add_argument("runs", metavar="RUN", nargs="+", help="ids of two or more runs")
    command.add_argument("--out", type=Path, metavar="DIR", help=f"write {PICTURE} and comparison.json there")
    command.add_argument("--all", action="store_true", help="also numbers that are equal in all runs")
    command.add_argument("--workspace", default=os.environ.get("NASLINE_WORKSPACE", ".nasline"))
    command.set_defaults(command_function=_run)


def _run(arguments: argparse.Namespace) -> int:
    from pipeline_tasks.workspace import open_workspace

    runs = list(dict.fromkeys(arguments.runs))
    if len(runs) < 2:
        raise UsageError("give the ids of two or more runs; `nasline runs` lists them")
    if arguments.out is not None:
        require_folder("--out", arguments.out)
    workspace = open_workspace(arguments.workspace)
    found = [read(workspace, run) for run in runs]
    print("\n".join(lines(found, equal_too=arguments.all)), flush=True)
    if arguments.out is not None:
        _write(arguments.out, found)
    return 0


def read(workspace: Workspace, run: str) -> RunFacts:
    """A run from the workspace, where all of it is, else from MLflow.

    Raises:
        UsageError: neither has it.
        UnavailableError: the workspace has not, and the tracking server does not answer.
    """
    from pipeline_tasks.run_facts import in_workspace
    from pipeline_tasks.tracking.client import shown_uri
    from pipeline_tasks.tracking.pipeline_runs import find_run

    if run in workspace.run_ids():
        return in_workspace(workspace, run)
    try:
        found = find_run(workspace, run)
    except UnavailableError as error:
        raise UnavailableError(f"run {run!r} is not in workspace {workspace.place}, and {error}") from None
    if found is None:
        raise UsageError(
            f"run {run!r} is neither in workspace {workspace.place} nor in MLflow at {shown_uri(workspace)}; "
            "`nasline runs` lists those there are"
        )
    return found


def lines(found: Sequence[RunFacts], equal_too: bool = False) -> list[str]:
    """The lines to print: what was trained, differing parameters, final numbers."""
    head = [("data", *(one.data for one in found)), ("verdict", *(one.verdict or "none yet" for one in found))]
    parameters = differing_parameters(found)
    numbers = [row for row in final_numbers(found) if equal_too or len(set(row[1:])) > 1]
    names = ("", *(one.run for one in found))
    return [
        *aligned([names, *head]),
        "",
        *aligned([("parameters that differ", *names[1:]), *parameters] if parameters else [("parameters are equal",)]),
        "",
        *aligned([("final numbers", *names[1:]), *numbers] if numbers else [("final numbers are equal",)]),
    ]


def differing_parameters(found: Sequence[RunFacts]) -> list[tuple[str, ...]]:
    """Name and value in each run of every parameter that is not the same in all; `-` where a run knows none."""
    names = sorted({name for one in found for name in one.parameters})
    rows = [(name, *(one.parameters.get(name, "-") for one in found)) for name in names]
    return [row for row in rows if len(set(row[1:])) > 1]


def final_numbers(found: Sequence[RunFacts]) -> list[tuple[str, ...]]:
    """`STEP/NAME` and its value in each run, in the order in which the steps report them."""
    names = dict.fromkeys(name for one in found for name in one.metrics)
    return [(name, *(_number(one.metrics.get(name)) for one in found)) for name in names]


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return str(int(value)) if value.is_integer() else f"{value:.4g}"


def _write(out: Path, found: Sequence[RunFacts]) -> None:
    from pipeline_tasks.overlaid_curves import draw
    from pipeline_tasks.workspace import write_json

    content = [
        {"run": one.run, "parameters": one.parameters, "metrics": one.metrics, "verdict": one.verdict} for one in found
    ]
    write_json(out / "comparison.json", content)
    if draw(found, out / PICTURE):
        log.info("%s and comparison.json are in %s", PICTURE, out)
    else:
        log.warning("no run has curves yet, so there is no %s; comparison.json is in %s", PICTURE, out)
