"""`nasline plan`: what a run would do and cost, before it is started."""

from __future__ import annotations

import argparse
import logging
import os
from pathlib import Path
from typing import Any

import yaml

from pipeline_tasks.errors import UsageError

log = logging.getLogger(__name__)

PROBE_STEPS = 20


def add_to(commands: Any) -> None:
    """Add the command to the parser's subcommands."""
    text = "Tell images, steps, hours, memory and disk of a run from a short probe; refuse when the disk is short."
    command = commands.add_parser("plan", help=text, description=text, allow_abbrev=False)
    default = os.environ.get("NASLINE_WORKSPACE", ".nasline")
    command.add_argument("--workspace", default=default, help=f"folder or s3://BUCKET/PREFIX (default {default})")
    command.add_argument("--params", type=Path, metavar="FILE", help="parameter file, as for `nasline start`")
    text = "override a parameter: --set distill.epochs=20 (may be given again)"
    command.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help=text)
    text = f"optimiser steps measured of each training (default {PROBE_STEPS}); 0 measures nothing"
    command.add_argument("--probe-steps", type=int, default=PROBE_STEPS, metavar="N", help=text)
    command.set_defaults(command_function=_plan)


def _plan(arguments: argparse.Namespace) -> int:
    from pipeline_tasks import plan
    from pipeline_tasks.estimate import estimate, text
    from pipeline_tasks.params import resolve
    from pipeline_tasks.workspace import open_workspace

    if arguments.probe_steps and arguments.probe_steps < 3:
        raise UsageError(
            f"--probe-steps {arguments.probe_steps} must be 0 or at least 3: the first two are not measured"
        )
    workspace = open_workspace(arguments.workspace)
    parameters = resolve(arguments.params, dict(_option(text) for text in arguments.set))
    planned = plan.plan(workspace, parameters)
    if sentence := planned.sentence():
        log.warning("%s", sentence)
    found = estimate(workspace, parameters, planned, arguments.probe_steps)
    print(text(found, parameters), flush=True)
    found.require_disk()
    return 0


def _option(text: str) -> tuple[str, Any]:
    key, separator, value = text.partition("=")
    if not separator:
        raise UsageError(f"--set {text!r} must be KEY=VALUE, such as distill.epochs=20")
    try:
        return key, yaml.safe_load(value)
    except yaml.YAMLError:
        return key, value
