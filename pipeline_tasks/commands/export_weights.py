"""`nasline export-weights`: a checkpoint folder as a file that the reference (super-gradients) loads."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import Any

from pipeline_tasks.errors import ParameterError
from pipeline_tasks.output_place import require_place

log = logging.getLogger(__name__)


def add_to(commands: Any) -> None:
    """Add the command to the parser's subcommands."""
    text = "Write a checkpoint folder as a super-gradients checkpoint (.pth)."
    command = commands.add_parser("export-weights", help=text, description=text, allow_abbrev=False)
    command.add_argument("checkpoint", type=Path, metavar="DIR", help="checkpoint folder, not folded, not quantized")
    command.add_argument("--out", type=Path, required=True, metavar="FILE.pth")
    command.set_defaults(command_function=_run)


def _run(arguments: argparse.Namespace) -> int:
    export_weights(arguments.checkpoint, arguments.out)
    return 0


def export_weights(checkpoint: Path, out: Path) -> None:
    """Write `net` and `ema_net` in the reference's names, and the class names.

    Raises:
        ParameterError: `out` exists, or is no possible place.
        ValueError: no checkpoint is there, or one that the reference has no form for.
    """
    from model.checkpoint import load_checkpoint
    from model.reference_file import write_reference_file
    from model.reference_weights import reference_state

    require_place("--out", out)
    if out.exists():
        raise ParameterError(f"--out {out} exists; give a file that does not exist yet")
    network, metadata = load_checkpoint(checkpoint)
    state = reference_state(network)
    write_reference_file(out, state, metadata.class_names)
    log.info(
        "YOLO-NAS %s with %d classes is in %s: %d tensors; licences of its weights: %s", metadata.variant,
        network.num_classes, out, len(state), ", ".join(metadata.lineage.get("weights", [])) or "not told",
    )  # fmt: skip
