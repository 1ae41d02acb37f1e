"""`start.initial_checkpoint`: a checkpoint folder in the place of random weights, pinned when the run starts."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline_tasks import digests
from pipeline_tasks.errors import DataError, ParameterError
from pipeline_tasks.params import Parameters, StartParameters

log = logging.getLogger(__name__)

INPUT = "initial_checkpoint"
"""Its name in run.json and among the inputs of `pretrain`."""

FILES = ("checkpoint.json", "model.safetensors")
PARTS = ("student", "teacher")


def pin(parameters: Parameters) -> dict[str, Any] | None:
    """Place, digest and variant of the checkpoint that the run starts from; None for random weights.

    Raises:
        DataError: the folder does not exist.
        ParameterError: the checkpoint fits neither network, is folded, or the champion was asked for too.
        ValueError: a file of it is missing or damaged.
    """
    given = parameters.start
    if not given.initial_checkpoint:
        return None
    from model.checkpoint import load_checkpoint

    folder = Path(given.initial_checkpoint).expanduser().resolve()
    if not folder.is_dir():
        raise DataError(f"start.initial_checkpoint: folder {folder} does not exist; give a checkpoint folder")
    if given.from_champion:
        raise ParameterError("start.initial_checkpoint and start.from_champion are two beginnings; give one of them")
    network, metadata = load_checkpoint(folder)
    if network.fused:
        raise ParameterError(f"start.initial_checkpoint: {folder} is folded, so it cannot be trained; give another")
    _tell_parts(given, folder, metadata.variant)
    return {"path": str(folder), "digest": _digest(folder), "variant": metadata.variant}


def _tell_parts(given: StartParameters, folder: Path, variant: str) -> None:
    variants = {part: getattr(given, f"{part}_variant") for part in PARTS}
    if variant not in variants.values():
        needed = " and ".join(f"start.{part}_variant is {name}" for part, name in variants.items())
        raise ParameterError(f"start.initial_checkpoint: {folder} is of variant {variant}, but {needed}; change one")
    for part, name in variants.items():
        log.info("%s (%s) starts from %s", part, name, folder if name == variant else "random weights")


def _digest(folder: Path) -> str:
    return digests.of_json({name: digests.of_file(folder / name) for name in FILES})


def pinned_digest(frozen: Mapping[str, Any]) -> str | None:
    """Digest of the checkpoint that a run began from; None for random weights."""
    pinned = frozen.get(INPUT)
    return pinned["digest"] if pinned else None


def for_part(frozen: Mapping[str, Any], part: str) -> dict[str, Any] | None:
    """What the run pinned, if that part's network is of its variant."""
    pinned: dict[str, Any] | None = frozen.get(INPUT)
    fits = pinned is not None and pinned["variant"] == frozen["parameters"]["start"][f"{part}_variant"]
    return pinned if fits else None


def require_unchanged(folder: Path, digest: str) -> None:
    """Compare the checkpoint with the one that was pinned.

    Raises:
        DataError: a file is gone or was changed since the run started.
    """
    try:
        unchanged = _digest(folder) == digest
    except OSError as error:
        raise DataError(f"start.initial_checkpoint: {error.filename} cannot be read ({error.strerror})") from None
    if not unchanged:
        raise DataError(f"start.initial_checkpoint: {folder} was changed since the run started; start the run anew")
