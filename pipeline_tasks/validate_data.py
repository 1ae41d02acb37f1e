"""`nasline validate_data`: COCO folders become validated Parquet datasets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline_tasks.errors import DataError
from pipeline_tasks.execution import StepContext


def validate_data(context: StepContext) -> dict[str, Any]:
    """Read the run's sets, validate them together, publish tables, report, quarantine and data docs.

    Raises:
        DataError: a set is unreadable, or more rows than the limits allow are bad.
    """
    from pipeline_tasks.data.coco import read_coco_folder, read_unlabeled_folder
    from pipeline_tasks.validation import ValidationLimits, validate

    roots = context.dataset_roots()
    raw = {}
    for role, folder in roots.items():
        raw[role] = (
            read_unlabeled_folder(folder, role)
            if role == "unlabeled"
            else read_coco_folder(folder, role, ("train", "val", "test") if role == "target" else ("train",))
        )
    given = context.parameters.validate_data
    limits = ValidationLimits(
        maximum_bad_images_fraction=given.maximum_bad_image_fraction,
        maximum_bad_boxes_fraction=given.maximum_bad_box_fraction,
        box_tolerance_pixels=given.box_tolerance_pixels,
    )
    try:
        result = validate(raw, roots, limits, context.output)
    except DataError as error:
        raise DataError(f"{error}; the whole report is in {context.output}") from None
    _publish_missing_roles(context.output, roots)
    return result.summary()


def _publish_missing_roles(output: Path, roots: dict[str, Path]) -> None:
    """A set that was not given is a folder with a note, so that later steps see "none" and not "unfinished"."""
    for role in ("pretrain", "unlabeled"):
        if role not in roots:
            (output / role).mkdir(exist_ok=True)
            (output / role / "absent.json").write_text('{"absent": true}\n', encoding="utf-8")


def is_absent(folder: Path) -> bool:
    """Whether a published set says that none was given."""
    return (folder / "absent.json").exists()
