"""`nasline promote` and `nasline rollback`: a person moves the champion, and says why."""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline_tasks.promotion import Plan
    from pipeline_tasks.workspace import Workspace


def add_to(commands: Any) -> None:
    """Add both commands to the parser's subcommands."""
    text = "Make a registered version champion; refused unless the gate accepted it."
    promote = commands.add_parser("promote", help=text, description=text, allow_abbrev=False)
    promote.add_argument("name", metavar="NAME", help="registered model")
    promote.add_argument("version", metavar="VERSION", help="number of the version")
    _add_common(promote)
    promote.set_defaults(command_function=_promote)
    text = "Go back to the champion before, or to an earlier one."
    rollback = commands.add_parser("rollback", help=text, description=text, allow_abbrev=False)
    rollback.add_argument("name", metavar="NAME", nargs="?", help="registered model (default: the only one)")
    rollback.add_argument("--to", metavar="VERSION", help="an earlier champion (default: the one before)")
    _add_common(rollback)
    rollback.set_defaults(command_function=_rollback)


def _add_common(command: argparse.ArgumentParser) -> None:
    command.add_argument("--reason", required=True, metavar="TEXT", help="why; kept beside the version")
    command.add_argument("--by", metavar="WHO", help="who decided (default: the user of this machine)")
    replaced = "refuse unless this version is champion (`none`: no version is); without it replace whichever is"
    command.add_argument("--instead-of", metavar="VERSION", help=replaced)
    command.add_argument("--dry-run", action="store_true", help="check and say what would be done, change nothing")
    command.add_argument("--workspace", default=os.environ.get("NASLINE_WORKSPACE", ".nasline"))


def _promote(arguments: argparse.Namespace) -> int:
    from pipeline_tasks.promotion import plan_promotion
    from pipeline_tasks.workspace import open_workspace

    workspace = open_workspace(arguments.workspace)
    return _carry_out(arguments, workspace, plan_promotion(workspace, arguments.name, arguments.version))


def _rollback(arguments: argparse.Namespace) -> int:
    from pipeline_tasks.commands.champion import only_model
    from pipeline_tasks.promotion import plan_rollback
    from pipeline_tasks.workspace import open_workspace

    workspace = open_workspace(arguments.workspace)
    name = arguments.name or only_model(workspace)
    return _carry_out(arguments, workspace, plan_rollback(workspace, name, arguments.to or None))


def _carry_out(arguments: argparse.Namespace, workspace: Workspace, plan: Plan) -> int:
    from pipeline_tasks.commands.report import report
    from pipeline_tasks.promotion import carry_out, require_champion, require_reason
    from pipeline_tasks.tracking.champions import actor

    require_reason(arguments.reason)
    if arguments.dry_run:
        require_champion(plan, arguments.instead_of)
        print(plan.sentence(), flush=True)
    else:
        carry_out(workspace, plan, arguments.by or actor(), arguments.reason, arguments.instead_of)
    report({"model": plan.name, "version": plan.version, "before": plan.before, "kind": plan.kind})
    return 0
