"""`nasline reproduce`: repeat a run from what it wrote down, and compare."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from pipeline_tasks.errors import DataError

TOLERANCE = 0.005


def add_to(commands: Any) -> None:
    """Add the command to the parser's subcommands."""
    text = "Check out a run's data, parameters and code, run its steps again and compare the numbers."
    command = commands.add_parser("reproduce", help=text, description=text, allow_abbrev=False)
    command.add_argument("run", metavar="RUN_ID", help="of this workspace, or known to the tracking server")
    default = os.environ.get("NASLINE_WORKSPACE", ".nasline")
    command.add_argument("--workspace", default=default, help=f"where the run is (default {default})")
    command.add_argument("--into", type=Path, metavar="DIR", help="where to repeat it (default reproduced/RUN_ID)")
    command.add_argument("--project", type=Path, metavar="DIR", help="DVC project that has the run's sets")
    command.add_argument("--any-code", action="store_true", help="repeat it with this code, whatever made it")
    text = f"largest difference of a number that still agrees (default {TOLERANCE}, half a point of mAP)"
    command.add_argument("--tolerance", type=float, default=TOLERANCE, metavar="X", help=text)
    command.set_defaults(command_function=_reproduce)


def _reproduce(arguments: argparse.Namespace) -> int:
    from pipeline_tasks.reproduction import REPORT, reproduce
    from pipeline_tasks.reproduction_report import text
    from pipeline_tasks.workspace import open_workspace

    folder = (arguments.into or Path("reproduced", arguments.run)).resolve()
    workspace = open_workspace(arguments.workspace)
    found = reproduce(workspace, arguments.run, folder, arguments.project, arguments.any_code)
    print(text(found, arguments.tolerance))
    if differing := found.differing(arguments.tolerance):
        first = differing[0]
        now = "nothing" if first.reproduced is None else f"{first.reproduced:.6g}"
        judged = sum(one.judged for one in found.numbers)
        raise DataError(
            f"{len(differing)} of {judged} numbers differ by more than {arguments.tolerance:g}, the first is "
            f"{first.name} of {first.step}: {first.recorded:.6g} became {now}; {folder / REPORT} has them all"
        )
    return 0
