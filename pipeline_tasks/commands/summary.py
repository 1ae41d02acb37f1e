"""`nasline summary`: the layers of a network with their shapes, parameters and multiply-adds, as a table."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline_tasks.errors import ParameterError, UsageError

if TYPE_CHECKING:
    from model.summary import Cost, Summary

COCO_CLASSES = 80
DEFAULT_SIZE = 640


def add_to(commands: Any) -> None:
    """Add the command to the parser's subcommands."""
    text = "Print a network's layers: output shapes, parameters and multiply-adds in training and deploy form."
    command = commands.add_parser("summary", help=text, description=text, allow_abbrev=False)
    command.add_argument("--variant", help="pico, t, n, s, m or l")
    command.add_argument("--size", type=int, metavar="PIXELS", help="side of the square input, a multiple of 32")
    command.add_argument("--classes", type=int, metavar="N", help=f"number of classes (default {COCO_CLASSES})")
    command.add_argument(
        "--checkpoint", type=Path, metavar="DIR", help="take variant, input size and classes from a checkpoint folder"
    )
    command.set_defaults(command_function=_run)


def _run(arguments: argparse.Namespace) -> int:
    from model.summary import summarize

    variant, classes, size = _what(arguments)
    print("\n".join(table(summarize(variant, classes, size, size))))
    return 0


def _what(arguments: argparse.Namespace) -> tuple[str, int, int]:
    """Variant, class count and input size from the options, or from the checkpoint where they leave them open."""
    if arguments.checkpoint is None:
        if arguments.variant is None:
            raise UsageError("give --variant, or --checkpoint to read it from there")
        return arguments.variant, _or(arguments.classes, COCO_CLASSES), _or(arguments.size, DEFAULT_SIZE)
    from model.checkpoint import read_metadata

    metadata, _ = read_metadata(arguments.checkpoint)
    told = {"variant": metadata.variant, "classes": len(metadata.class_names)}
    for name, value in told.items():
        given = getattr(arguments, name)
        if given is not None and given != value:
            raise ParameterError(f"--{name} {given}: {arguments.checkpoint} has {value}; leave the option out")
    return metadata.variant, len(metadata.class_names), _or(arguments.size, metadata.preprocessing.input_size)


def _or(given: int | None, default: int) -> int:
    return default if given is None else given


def table(summary: Summary) -> list[str]:
    """The lines to print: a row per layer, a row per part, and the totals."""
    from model.summary import PARTS

    heading = _row("layer", "kind", "output", ("parameters", "MMACs"), ("parameters", "MMACs"))
    rows = []
    for layer in summary.layers:
        shape = "x".join(str(length) for length in layer.output_shape)
        rows.append(_row(layer.name, layer.kind, shape, _figures(layer.training), _figures(layer.deploy)))
    forms = _row("", "", "", ("training form", ""), ("deploy form", ""))
    title = f"YOLO-NAS {summary.variant}, {summary.num_classes} classes, {summary.height}x{summary.width}"
    ruler = "-" * len(heading)
    parts = [_total(summary, part, "") for part in PARTS]
    return [title, forms.rstrip(), heading, ruler, *rows, ruler, *parts, *_whole(summary)]


def _total(summary: Summary, part: str, kind: str) -> str:
    training, deploy = summary.total(part)
    return _row(part or "total", kind, "", _figures(training), _figures(deploy))


def _whole(summary: Summary) -> list[str]:
    training, deploy = summary.total()
    return [
        _total(summary, "", f"{len(summary.layers)} convolutions"),
        f"training form {training.multiply_adds / 1e9:.3f} GMACs, deploy form {deploy.multiply_adds / 1e9:.3f} GMACs; "
        f"{len(summary.scaled_shortcuts)} shortcut scalars are counted in the training form alone, as published",
    ]


def _figures(cost: Cost) -> tuple[str, str]:
    return f"{cost.parameters:,}", f"{cost.multiply_adds / 1e6:,.2f}"


def _row(name: str, kind: str, shape: str, training: tuple[str, str], deploy: tuple[str, str]) -> str:
    return f"{name:<42}{kind:<18}{shape:>12}{training[0]:>15}{training[1]:>12}{deploy[0]:>15}{deploy[1]:>12}"
