"""The command `nasline`: one subcommand per step, and the few around them."""

from __future__ import annotations

import argparse
import errno
import json
import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from pipeline_tasks import process
from pipeline_tasks.errors import StepError, UsageError
from pipeline_tasks.params import form_fields, resolve
from pipeline_tasks.steps import STEPS, StepDefinition

log = logging.getLogger("nasline")

EXIT_BAD_INPUT = 65
EXIT_TEMPORARY = 75
NOISY = (
    "mlflow", "alembic", "great_expectations", "matplotlib", "PIL", "urllib3", "torch", "onnxscript", "onnx_ir",
    "boto3", "botocore", "s3transfer",
)  # fmt: skip
"""Packages whose loggers only warn, also with NASLINE_DEBUG (botocore's would show who signed which request)."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit code says what a retry could cure (see pipeline_tasks.errors)."""
    configure_logging()
    process.share_cores_kindly()
    try:
        arguments = _parser().parse_args(argv)
        process.die_with_parent()
        code: int = arguments.command_function(arguments)
        return code
    except StepError as error:
        log.error("%s", error)
        return error.exit_code
    except ValueError as error:
        _log_refusal(error)
        return EXIT_BAD_INPUT
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
            raise
        message = "cannot write %s: %s; make room or choose another place, then run the step again"
        log.error(message, error.filename, error.strerror)
        return EXIT_TEMPORARY


def configure_logging() -> None:
    """One line per event on standard output; the only place where logging is set up."""
    level = logging.DEBUG if os.environ.get("NASLINE_DEBUG") else logging.INFO
    logging.basicConfig(
        level=level, stream=sys.stdout, format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S", force=True
    )
    for noisy in NOISY:
        logging.getLogger(noisy).setLevel(logging.WARNING)


def _log_refusal(error: ValueError) -> None:
    """The package `model` refuses input by ValueError; its text is the sentence for the user."""
    log.error("%s", error)
    log.debug("where it was refused", exc_info=error)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="nasline", description="A pipeline that produces YOLO-NAS engines you own.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for step in STEPS:
        command = commands.add_parser(step.name, help=step.summary, description=step.summary, allow_abbrev=False)
        _add_run_options(command)
        _add_step_options(command, step)
    _add_predict(commands)
    _add_data(commands)
    _add_deliver(commands)
    commands.add_parser("params", help="Print params.yaml with all defaults.").set_defaults(command_function=_params)
    return parser


def _add_run_options(command: argparse.ArgumentParser) -> None:
    default = os.environ.get("NASLINE_WORKSPACE", ".nasline")
    command.add_argument("--workspace", default=default, help=f"folder or s3://BUCKET/PREFIX (default {default})")
    command.add_argument("--run", required=True, help="id of the pipeline run")


def _add_step_options(command: argparse.ArgumentParser, step: StepDefinition) -> None:
    command.add_argument(
        "--link", type=Path, metavar="DIR", help="copy the finished content here too (used by dvc.yaml)"
    )
    if step.name == "start":
        _add_start_options(command)
        return
    if step.parts:
        command.add_argument("--role", choices=step.parts, required=True, help="which of the two networks")
    if step.sharded:
        which = command.add_mutually_exclusive_group(required=True)
        which.add_argument("--shard", metavar="I/N", help="label shard I (from 0) of N, or `all` in turn")
        which.add_argument("--merge", action="store_true", help="join all shards into the step's output")
    if step.name in ("gate", "register"):
        command.add_argument(
            "--rejection-is-result", action="store_true", help="exit 0 when the engine is rejected (used by dvc.yaml)"
        )
    command.set_defaults(command_function=_run_step, step=step)


def _add_start_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--params", type=Path, help="parameter file, one section per step")
    command.add_argument("--options-json", default="{}", help='overrides as JSON: {"distill.epochs": 20, ...}')
    command.add_argument("--from-champion", action="store_true", help="retrain from the registered champion")
    command.add_argument(
        "--if-changed", action="store_true", help="exit 99 when the champion has these data and parameters"
    )
    command.add_argument("--replace", action="store_true", help="forget an existing run of that id")
    for name, group in _option_groups(command).items():
        for field in form_fields():
            if field.key.rsplit(".", 1)[0] == name:
                help_text = str(field.schema.get("description", "")).replace("%", "%%")
                default = json.dumps(field.schema.get("default"))
                text = f"{help_text} (default {default})"
                group.add_argument(f"--{field.key}", dest=field.key, metavar="V", help=text)
    command.set_defaults(command_function=_start)


def _option_groups(command: argparse.ArgumentParser) -> dict[str, Any]:
    names = dict.fromkeys(field.key.rsplit(".", 1)[0] for field in form_fields())
    return {name: command.add_argument_group(name) for name in names}


def _start(arguments: argparse.Namespace) -> int:
    from pipeline_tasks.links import link_start
    from pipeline_tasks.start import start
    from pipeline_tasks.workspace import open_workspace

    parameters = resolve(arguments.params, _options(arguments))
    frozen = start(
        open_workspace(arguments.workspace),
        arguments.run,
        parameters,
        replace=arguments.replace,
        if_changed=arguments.if_changed,
    )
    if arguments.link:
        link_start(frozen, arguments.link)
    _report(
        {
            "run": arguments.run,
            "step": "start",
            "shards": parameters.pseudo_label.shards,
            "champion": frozen["champion"] and frozen["champion"]["version"],
            "datasets": {role: entry["digest"] for role, entry in frozen["datasets"].items() if entry},
        }
    )
    return 0


def _options(arguments: argparse.Namespace) -> dict[str, Any]:
    """Overrides from JSON (the trigger form), then from the command line."""
    try:
        options = json.loads(arguments.options_json)
    except json.JSONDecodeError as error:
        raise UsageError(f"--options-json is not valid JSON: {error.msg} at character {error.pos}") from None
    if not isinstance(options, dict):
        raise UsageError("--options-json must be an object of section.field to value")
    for field in form_fields():
        text = getattr(arguments, field.key)
        if text is not None:
            options[field.key] = _scalar(text)
    if arguments.from_champion:
        options["start.from_champion"] = True
    return options


def _scalar(text: str) -> Any:
    """The value of an option, read as YAML: 3, 1e-3, true, null, [a, b] or plain text."""
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def _run_step(arguments: argparse.Namespace) -> int:
    from pipeline_tasks.links import link_published
    from pipeline_tasks.run_step import run_step
    from pipeline_tasks.workspace import open_workspace

    workspace, step = open_workspace(arguments.workspace), arguments.step
    result, code = run_step(
        workspace,
        arguments.run,
        step.name,
        part=getattr(arguments, "role", ""),
        shard=getattr(arguments, "shard", None),
    )
    if arguments.link:
        link_published(workspace.step_directory(step.name, result.key), arguments.link)
    _report(asdict(result))
    return 0 if getattr(arguments, "rejection_is_result", False) else code


def _report(content: dict[str, Any]) -> None:
    """The last line, for the program that started the step (the DAG's operator); a person has read the log."""
    if not sys.stdout.isatty():
        print("NASLINE_RESULT " + json.dumps(content, sort_keys=True), flush=True)


Subcommands = Any
"""What add_subparsers returns; argparse keeps the class private."""


def _add_predict(commands: Subcommands) -> None:
    command = commands.add_parser("predict", help="Detect objects in images with an engine.")
    command.add_argument("engine", metavar="ENGINE", help="engine directory, or models:/NAME@champion")
    command.add_argument("source", metavar="SOURCE", help="image, folder or glob pattern")
    command.add_argument("--out", type=Path, required=True, metavar="DIR", help="where pictures and detections.json go")
    command.add_argument("--score-threshold", type=float, default=None, help="lowest score shown, 0 to 1")
    command.add_argument("--workspace", default=os.environ.get("NASLINE_WORKSPACE", ".nasline"))
    command.set_defaults(command_function=_predict)


def _predict(arguments: argparse.Namespace) -> int:
    from pipeline_tasks.predict import predict
    from pipeline_tasks.workspace import open_workspace

    workspace = open_workspace(arguments.workspace).root
    predict(arguments.engine, arguments.source, arguments.out, arguments.score_threshold, workspace)
    return 0


def _add_data(commands: Subcommands) -> None:
    group = commands.add_parser("data", help="Datasets.").add_subparsers(dest="action", required=True, metavar="ACTION")
    command = group.add_parser("add", help="Version a dataset folder with DVC and print its digest.")
    command.add_argument("path", type=Path, metavar="PATH")
    command.add_argument("--to", type=Path, metavar="DIR", help="copy a folder from outside the repository to here")
    command.set_defaults(command_function=_data_add)


def _data_add(arguments: argparse.Namespace) -> int:
    from pipeline_tasks.data.versioning import add

    add(arguments.path, to=arguments.to)
    return 0


def _params(arguments: argparse.Namespace) -> int:
    from pipeline_tasks.parameter_file import parameter_file

    print(parameter_file(), end="")
    return 0


def _add_deliver(commands: Subcommands) -> None:
    command = commands.add_parser("deliver", help="Send a run's tracking data that the server missed.")
    _add_run_options(command)
    command.set_defaults(command_function=_deliver)


def _deliver(arguments: argparse.Namespace) -> int:
    from pipeline_tasks.tracking.mirror import deliver_run
    from pipeline_tasks.workspace import open_workspace

    count = deliver_run(open_workspace(arguments.workspace), arguments.run)
    log.info("run %s: %d steps are complete in MLflow", arguments.run, count)
    return 0


if __name__ == "__main__":
    sys.exit(main())
