"""`nasline init`: a project of one's own."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add_to(commands: Any) -> None:
    """Add the command to the parser's subcommands."""
    text = "Make a project: params.yaml, dvc.yaml, Git and DVC set up. What is there already stays as it is."
    command = commands.add_parser("init", help=text, description=text)
    command.add_argument("folder", type=Path, metavar="DIR", help="an empty or existing folder, or a new one")
    text = "where DVC pushes sets to: a folder or s3://BUCKET/PREFIX (credentials: AWS's own chain, never an address)"
    command.add_argument("--remote", metavar="URL", help=text)
    command.set_defaults(command_function=_init)


def _init(arguments: argparse.Namespace) -> int:
    from pipeline_tasks.data.project import init

    made = init(arguments.folder, arguments.remote)
    print(f"{arguments.folder}: made {', '.join(made)}" if made else f"{arguments.folder} has everything already")
    print(
        f"Next:\n  cd {arguments.folder}\n  nasline data add PATH --to data/NAME\n"
        "  set start.dataset: data/NAME in params.yaml\n  nasline plan --params params.yaml\n  dvc repro"
    )
    return 0
