"""`nasline data announce`: tell Airflow of the version of a set that lies here, which starts a retraining."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add_to(group: Any) -> None:
    """Add the command to the actions of `nasline data`."""
    text = "Give Airflow's asset nasline_dataset an event, unless its last one told of this version already."
    command = group.add_parser("announce", help=text, description=text, allow_abbrev=False)
    command.add_argument("path", type=Path, nargs="+", metavar="PATH", help="folder of a set")
    command.add_argument("--again", action="store_true", help="also where Airflow knows this version")
    command.set_defaults(command_function=_run)


def _run(arguments: argparse.Namespace) -> int:
    from pipeline_tasks.announcement import announce, tell

    for path in arguments.path:
        tell(announce(path, arguments.again))
    return 0
