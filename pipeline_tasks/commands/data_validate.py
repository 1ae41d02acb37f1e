"""`nasline data validate`: what is wrong with a folder, and a copy without what could be put right."""

from __future__ import annotations

import argparse
import logging
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline_tasks.errors import DataError, UsageError

if TYPE_CHECKING:
    from pipeline_tasks.validation.folder import FolderReport

log = logging.getLogger(__name__)


def add_to(group: Any) -> None:
    """Add the command to the actions of `nasline data`."""
    text = "Tell everything that is wrong or odd in a folder of any format; exit 65 when there are errors."
    command = group.add_parser("validate", help=text, description=text, allow_abbrev=False)
    command.add_argument("path", type=Path, metavar="PATH")
    command.add_argument("--format", metavar="NAME", help="format of the folder; without it, it is recognised")
    command.add_argument("--params", type=Path, metavar="FILE", help="thresholds and severities, section validate_data")
    command.add_argument("--out", type=Path, metavar="DIR", help="folder for the whole report; it must not exist")
    command.add_argument("--fix", action="store_true", help="repair what is unambiguous in a copy, --to")
    command.add_argument("--to", type=Path, metavar="DIR", help="the repaired copy; it must not exist")
    text = "open no picture: look at the records alone, and whether the pictures exist"
    command.add_argument("--no-decode", action="store_true", help=text)
    command.set_defaults(command_function=_run)


def _run(arguments: argparse.Namespace) -> int:
    given = arguments
    if given.fix != (given.to is not None):
        raise UsageError("--fix and --to DIR go together: the original is never changed")
    if given.fix and given.no_decode:
        raise UsageError("--fix needs what is in the pictures; leave out --no-decode")
    validate_data_folder(given.path, given.format, given.params, given.out, given.to, not given.no_decode)
    return 0


def validate_data_folder(
    path: Path,
    format: str | None = None,
    params: Path | None = None,
    out: Path | None = None,
    fix_to: Path | None = None,
    decode: bool = True,
) -> FolderReport:
    """Log what was found, write the report to `out` and a repaired copy to `fix_to` where they are given.

    Raises:
        DataError: the folder cannot be read, or has errors (with `fix_to`: after the copy was written).
        UsageError: `out` or `fix_to` exists.
    """
    from pipeline_tasks.data.versioning import require_new, written_aside
    from pipeline_tasks.params import resolve
    from pipeline_tasks.validate_data import limits_of
    from pipeline_tasks.validation.folder import validate_folder

    for option, folder in (("--out", out), ("--to", fix_to)):
        if folder is not None and folder.exists():
            raise UsageError(f"{option} {folder} exists; give a folder that does not exist yet")
        if folder is not None:
            require_new(folder)
    section = resolve(params, {}).validate_data
    with written_aside(out) if out else tempfile.TemporaryDirectory(prefix="nasline-validate-") as output:
        limits = limits_of(section)
        report = validate_folder(path, Path(output), limits, format, section.allow_links, decode=decode)
    recognised = report.reader.recognised
    log.info("%s is read as %s: %s", path, recognised.format, recognised.reason)
    for line in report.lines():
        log.info("%s", line)
    if fix_to is not None:
        _write_copy(report, fix_to, section.box_tolerance_pixels)
    _conclude(path, report, out)
    return report


def _write_copy(report: FolderReport, target: Path, tolerance_pixels: float) -> None:
    from pipeline_tasks.validation.repair import REPAIRS_FILE, write_repaired

    written, repairs = write_repaired(report, target, tolerance_pixels)
    log.info("%s: %d repairs, listed in %s", target, len(repairs), REPAIRS_FILE)
    for lost in written.lost:
        log.warning("%s: %s", target, lost)


def _conclude(path: Path, report: FolderReport, out: Path | None) -> None:
    errors, warnings = report.counts("error"), report.counts("warning")
    place = f"the report is in {out}" if out else "--out DIR writes the whole report"
    if errors:
        rules = ", ".join(f"{name} ({count})" for name, count in errors.items())
        raise DataError(f"{path} has {sum(errors.values())} errors: {rules}; {place}")
    log.info("%s has no errors and %d warnings; %s", path, sum(warnings.values()), place)
