"""`nasline validate_data`: folders in any known format become validated Parquet datasets."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline_tasks.errors import DataError

if TYPE_CHECKING:
    from pipeline_tasks.execution import StepContext
    from pipeline_tasks.validation import ValidationLimits
    from pipeline_tasks.validation.drift import Reference
    from pipeline_tasks.validation_parameters import ValidateDataParameters

log = logging.getLogger(__name__)


def validate_data(context: StepContext) -> dict[str, Any]:
    """Read the run's sets, validate them together, publish tables, report, quarantine and data docs.

    Raises:
        DataError: a set is unreadable, or more rows than the limits allow are bad.
    """
    from pipeline_tasks.data.readers import open_reader
    from pipeline_tasks.validation import validate

    roots, given = context.dataset_roots(), context.parameters.validate_data
    raw = {}
    for role, folder in roots.items():
        reader = open_reader(folder, allow_links=given.allow_links)
        log.info("%s: %s is read as %s: %s", role, folder, reader.recognised.format, reader.recognised.reason)
        raw[role] = (
            reader.read_unlabeled(role)
            if role == "unlabeled"
            else reader.read(role, ("train", "val", "test") if role == "target" else ("train",))
        )
    try:
        result = validate(raw, roots, limits_of(given), context.output, reference=_champions_data(context))
    except DataError as error:
        raise DataError(f"{error}; the whole report is in {context.output}") from None
    _publish_missing_roles(context.output, roots)
    return result.summary()


def _champions_data(context: StepContext) -> Reference | None:
    """What the target is compared with; `start` has pinned whether there is anything to compare."""
    from pipeline_tasks import champion_data
    from pipeline_tasks.validation.drift import Reference

    if not champion_data.differs(context.run) or context.champion is None:
        return None
    reference = Reference(champion_data.name(context.run), champion_data.statistics(context.champion))
    if reference.statistics is None:
        log.warning(
            "%s was registered without statistics of its data, so drift against them is not judged", reference.champion
        )
    return reference


def limits_of(given: ValidateDataParameters) -> ValidationLimits:
    """The section validate_data as limits of the validation."""
    from pipeline_tasks.validation import ValidationLimits

    values = given.model_dump(exclude={"allow_links"})
    values["maximum_bad_images_fraction"] = values.pop("maximum_bad_image_fraction")
    values["maximum_bad_boxes_fraction"] = values.pop("maximum_bad_box_fraction")
    return ValidationLimits(**values)


def _publish_missing_roles(output: Path, roots: dict[str, Path]) -> None:
    """A set that was not given is a folder with a note, so that later steps see "none" and not "unfinished"."""
    for role in ("pretrain", "unlabeled"):
        if role not in roots:
            (output / role).mkdir(exist_ok=True)
            (output / role / "absent.json").write_text('{"absent": true}\n', encoding="utf-8")


def require_fitting_teachers(frozen: Mapping[str, Any], published: Path, champion: Path | None) -> None:
    """Compare the target's classes with those of the run's finished teachers, whichever run made the tables: `teach`
    would refuse a teacher only after the pretraining.

    champion: folder of its network, where that is to teach.

    Raises:
        DataError: a teacher does not know one of the classes.
    """
    from model.checkpoint import read_metadata
    from model.data.tables import read_dataset
    from pipeline_tasks import pinned_files, teacher_checkpoint

    own = [] if champion is None else teacher_checkpoint.member_folders(champion)
    others = [entry for entry in pinned_files.of_step(frozen, "teach").values() if pinned_files.CLASS_NAMES in entry]
    if not own and not others:  # also where an older release pinned them without their classes
        return
    class_names = read_dataset(published / "target").metadata.class_names
    for folder in own:
        known = read_metadata(folder)[0].class_names
        teacher_checkpoint.require_classes(folder, known, class_names, "teach.source")
    for entry in others:
        known = entry[pinned_files.CLASS_NAMES]
        teacher_checkpoint.require_classes(entry["path"], known, class_names, "teach.extra_checkpoints")


def is_absent(folder: Path) -> bool:
    """Whether a published set says that none was given."""
    return (folder / "absent.json").exists()
