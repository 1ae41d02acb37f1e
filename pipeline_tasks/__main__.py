"""The command `nasline`: one subcommand per step, and the few around them."""

from __future__ import annotations

import argparse
import errno
import json
import logging
import os
import sys
import traceback
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from pipeline_tasks import launch, process
from pipeline_tasks.commands import (
    bench,
    champion,
    compare,
    data,
    evaluate,
    evaluate_champion,
    export_weights,
    import_weights,
    init,
    plan_run,
    promote,
    reproduce,
    runs,
    summary,
)
from pipeline_tasks.commands.report import report
from pipeline_tasks.errors import EXIT_UNFORESEEN, StepError, UsageError
from pipeline_tasks.output_place import obstacle
from pipeline_tasks.params import Parameters, form_fields, resolve
from pipeline_tasks.steps import STEPS, StepDefinition

if TYPE_CHECKING:
    from pipeline_tasks.workspace import Workspace

log = logging.getLogger("nasline")

EXIT_BAD_INPUT = 65
EXIT_TEMPORARY = 75
EXIT_INTERRUPTED = 130  # as shells count SIGINT
NOISY = (
    "mlflow", "alembic", "great_expectations", "matplotlib", "PIL", "urllib3", "torch", "onnxscript", "onnx_ir",
    "boto3", "botocore", "s3transfer",
)  # fmt: skip
"""Packages whose loggers only warn, also with NASLINE_DEBUG (botocore's would show who signed which request)."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit code says what a retry could cure (see pipeline_tasks.errors)."""
    configure_logging()
    process.share_cores_kindly()
    arguments = argparse.Namespace()
    try:
        arguments = _parser().parse_args(argv)
        arguments.words = sys.argv[1:] if argv is None else list(argv)
        process.die_with_parent()
        code: int = arguments.command_function(arguments)
        process.end_undisturbed()
        return code
    except KeyboardInterrupt:  # steps handle the signal themselves
        log.error("interrupted by Ctrl-C")
        return EXIT_INTERRUPTED
    except Exception as error:
        process.end_undisturbed()
        exit_code, sentence = _in_words(error, arguments)
        if not launch.report(exit_code, sentence):
            if exit_code == EXIT_UNFORESEEN:
                raise
            log.error("%s", sentence)
        log.debug("where it was refused", exc_info=error)
        return exit_code


def _in_words(error: Exception, arguments: argparse.Namespace) -> tuple[int, str]:
    """Exit code and the sentence for the user; the traceback of what nobody foresaw."""
    if isinstance(error, StepError):
        return error.exit_code, str(error)
    if refused := _impossible_place(error, arguments):
        return EXIT_BAD_INPUT, refused
    if refused := _refused_write(error, str(getattr(arguments, "workspace", ""))):
        return EXIT_TEMPORARY, f"{refused}; make room or choose another place, then run the step again"
    if isinstance(error, ValueError):  # the package `model` refuses input so
        return EXIT_BAD_INPUT, str(error)
    return EXIT_UNFORESEEN, "".join(traceback.format_exception(error)).rstrip()


def _impossible_place(error: Exception, arguments: argparse.Namespace) -> str:
    """What is wrong with the place that the command was told to write to, "" for another error."""
    for option in ("out", "to"):
        place = getattr(arguments, option, None)
        if isinstance(error, OSError) and isinstance(place, Path) and (reason := obstacle(place, error)):
            return f"--{option} {place} is no possible place: {reason}; give another one"
    return ""


def _refused_write(error: Exception, workspace: str) -> str:
    """What could not be written and why, "" for another error. Where a write itself failed, and not the opening of a
    file, Python does not know the file; safetensors has an error of its own, and so has a copy of a folder.
    """
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
        place = error.filename2 or error.filename or f"in the workspace {workspace}"
        return f"cannot write {place}: {os.strerror(error.errno)}"
    full = os.strerror(errno.ENOSPC)
    return f"cannot write in the workspace {workspace}: {full}" if full in str(error) else ""


def configure_logging() -> None:
    """One line per event on standard output; the only place where logging is set up. Of several training processes
    the first one alone tells what is done.
    """
    usual = logging.INFO if launch.rank() == 0 else logging.ERROR
    level = logging.DEBUG if os.environ.get("NASLINE_DEBUG") else usual
    logging.basicConfig(
        level=level, stream=sys.stdout, format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S", force=True
    )
    for noisy in NOISY:
        logging.getLogger(noisy).setLevel(logging.WARNING)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="nasline", description="A pipeline that produces YOLO-NAS engines you own.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for step in STEPS:
        command = commands.add_parser(step.name, help=step.summary, description=step.summary, allow_abbrev=False)
        _add_run_options(command, run_required=step.name != "start")
        _add_step_options(command, step)
    _add_predict(commands)
    _add_deliver(commands)
    around = (
        init, data, bench, evaluate, import_weights, export_weights, summary, runs, compare, champion, promote,
        evaluate_champion, plan_run, reproduce,
    )  # fmt: skip
    for module in around:
        module.add_to(commands)
    commands.add_parser("params", help="Print params.yaml with all defaults.").set_defaults(command_function=_params)
    return parser


def _add_run_options(command: argparse.ArgumentParser, run_required: bool = True) -> None:
    default = os.environ.get("NASLINE_WORKSPACE", ".nasline")
    command.add_argument("--workspace", default=default, help=f"folder or s3://BUCKET/PREFIX (default {default})")
    command.add_argument("--run", required=run_required, help="id of the pipeline run")


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
    if step.name in launch.TRAINING_STEPS:
        text = "training processes on this machine, which share each batch (default: start.processes)"
        command.add_argument("--processes", type=int, metavar="N", help=text)
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
    text = "tell what the run will take (start.estimate_steps), also as a note in Airflow; exit 75 if the disk is short"
    command.add_argument("--estimate", action="store_true", help=text)
    command.add_argument("--replace", action="store_true", help="forget an existing run of that id")
    command.add_argument(
        "--dry-run", action="store_true", help="resolve every step and print it, write nothing; needs no --run"
    )
    fields = form_fields()  # making their schema takes a tenth of a second
    for name in dict.fromkeys(field.key.rsplit(".", 1)[0] for field in fields):
        group = command.add_argument_group(name)
        for field in fields:
            if field.key.rsplit(".", 1)[0] == name:
                help_text = str(field.schema.get("description", "")).replace("%", "%%")
                default = json.dumps(field.schema.get("default"))
                text = f"{help_text} (default {default})"
                group.add_argument(f"--{field.key}", dest=field.key, metavar="V", help=text)
    command.set_defaults(command_function=_start)


def _start(arguments: argparse.Namespace) -> int:
    from pipeline_tasks import start_estimate
    from pipeline_tasks.links import link_start
    from pipeline_tasks.start import start
    from pipeline_tasks.workspace import open_workspace

    parameters = resolve(arguments.params, _options(arguments))
    if arguments.dry_run:
        return _dry_run(open_workspace(arguments.workspace), parameters)
    if arguments.run is None:
        raise UsageError("--run is missing; give the run an id, or look at it first with --dry-run")
    workspace = open_workspace(arguments.workspace)
    frozen = start(
        workspace,
        arguments.run,
        parameters,
        replace=arguments.replace,
        if_changed=arguments.if_changed,
    )
    if arguments.link:
        link_start(frozen, arguments.link)
    estimate = start_estimate.tell(workspace, parameters) if arguments.estimate else ""
    report(
        {
            "run": arguments.run,
            "step": "start",
            "shards": parameters.pseudo_label.shards,
            "target": parameters.gate.target,
            "champion": frozen["champion"] and frozen["champion"]["version"],
            **({"estimate": estimate} if estimate else {}),
            "datasets": {role: entry["digest"] for role, entry in frozen["datasets"].items() if entry},
        }
    )
    return 0


def _dry_run(workspace: Workspace, parameters: Parameters) -> int:
    from pipeline_tasks.plan import plan, text

    found = plan(workspace, parameters)
    print(text(found, parameters), flush=True)
    if sentence := found.sentence():
        log.warning("%s", sentence)
    report({"step": "start", "dry_run": True, "steps": [asdict(step) for step in found.steps]})
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
    if step.name in launch.TRAINING_STEPS:
        ended = _run_in_processes(arguments, workspace)
        if ended is not None:
            return ended
    result, code = run_step(
        workspace,
        arguments.run,
        step.name,
        part=getattr(arguments, "role", ""),
        shard=getattr(arguments, "shard", None),
    )
    if arguments.link:
        link_published(workspace.step_directory(step.name, result.key), arguments.link)
    report(asdict(result))
    return 0 if getattr(arguments, "rejection_is_result", False) else code


def _run_in_processes(arguments: argparse.Namespace, workspace: Workspace) -> int | None:
    """Exit code of a training step that several processes did; None where this process is to do it and report."""
    from pipeline_tasks.run_step import assist_step, processes_to_start

    step, part = arguments.step.name, getattr(arguments, "role", "")
    count, device = processes_to_start(workspace, arguments.run, step, part, arguments.processes)
    if count > 1:
        return launch.run(arguments.words, count, device)
    return assist_step(workspace, arguments.run, step, part) if launch.rank() > 0 else None


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
