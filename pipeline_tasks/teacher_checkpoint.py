"""The teacher on disk: a checkpoint folder, with further checkpoints in `members/` where it is an ensemble."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pipeline_tasks.errors import DataError
from pipeline_tasks.text_table import some
from pipeline_tasks.training_task import merge_lineage

if TYPE_CHECKING:
    from model.checkpoint import CheckpointMetadata
    from model.teacher import Teacher, TeacherPrecision
    from model.yolo_nas import YoloNAS

MEMBERS = "members"
Field = Literal["teach.source", "teach.extra_checkpoints"]
REMEDIES: dict[Field, str] = {"teach.source": "set teach.source to train", "teach.extra_checkpoints": "leave it out"}
"""By the parameter that brings a network which is taken as it is."""


def load_teacher(folder: Path, precision: TeacherPrecision = "as_student") -> tuple[Teacher, CheckpointMetadata]:
    """The teacher, and its first network's metadata with the lineage of all of them."""
    from model.checkpoint import load_checkpoint
    from model.teacher import Teacher

    loaded = [load_checkpoint(member) for member in member_folders(folder)]
    metadata = loaded[0][1]
    lineage = merge_lineage(*(entry.lineage for _, entry in loaded)) if len(loaded) > 1 else metadata.lineage
    return Teacher([network for network, _ in loaded], precision), replace(metadata, lineage=lineage)


def member_folders(folder: Path) -> list[Path]:
    """The checkpoint itself, then the further ones of its ensemble."""
    further = (folder / MEMBERS).iterdir() if (folder / MEMBERS).is_dir() else []
    return [folder, *sorted(further, key=lambda member: int(member.name))]


def write_members(folder: Path, networks: list[tuple[YoloNAS, CheckpointMetadata]], like: CheckpointMetadata) -> None:
    """Put further networks into a teacher's folder; they see the same images with the same classes as its first."""
    from model.checkpoint import save_checkpoint

    for number, (network, metadata) in enumerate(networks, start=1):
        own = replace(metadata, class_names=like.class_names, preprocessing=like.preprocessing)
        save_checkpoint(folder / MEMBERS / str(number), network, own)


def load_for_classes(folder: Path, class_names: tuple[str, ...], field: Field) -> tuple[YoloNAS, CheckpointMetadata]:
    """A finished network whose outputs are these classes in this order; what else it knows is left out.

    field: the parameter that brought it.

    Raises:
        DataError: it does not know one of the classes.
    """
    import model
    from model.checkpoint import load_checkpoint, transfer_weights

    network, metadata = load_checkpoint(folder)
    if metadata.class_names == class_names:
        return network, metadata
    require_classes(folder, metadata.class_names, class_names, field)
    fitting = model.build(metadata.variant, len(class_names)).eval()
    if network.fused:
        fitting.fuse()
    transfer_weights(fitting, network.state_dict(), metadata.class_names, class_names)
    return fitting, metadata


def require_classes(folder: Path | str, known: Sequence[str], class_names: Sequence[str], field: Field) -> None:
    """Compare what a finished network knows with the target's classes.

    Raises:
        DataError: it does not know one of them.
    """
    if unknown := [name for name in class_names if name not in known]:
        raise DataError(
            f"{field}: the teacher {folder} does not know the target's classes {some(unknown)}; "
            f"it cannot teach without training: {REMEDIES[field]}"
        )
