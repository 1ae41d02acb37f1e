"""Validation of the target, pretraining and unlabelled sets, from raw tables to published ones."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from model.data.tables import write_dataset
from pipeline_tasks.data.raw import RawDataset
from pipeline_tasks.data.table_builder import release_pages
from pipeline_tasks.errors import DataError
from pipeline_tasks.validation import report
from pipeline_tasks.validation.drift import Reference, with_drift
from pipeline_tasks.validation.file_rows import file_rows
from pipeline_tasks.validation.images import SizeLimit, inspect_images, look_for_images
from pipeline_tasks.validation.judgement import JudgedSet, JudgedTable, violations
from pipeline_tasks.validation.limits import ValidationLimits
from pipeline_tasks.validation.oddities import odd_boxes, odd_images
from pipeline_tasks.validation.published import Published, publishable
from pipeline_tasks.validation.rules import IMAGE_RULES, NO_TARGET_TEST_IMAGE, box_rules
from pipeline_tasks.validation.suites import Suite, run_suites
from pipeline_tasks.validation.tables import derive_boxes, derive_images
from pipeline_tasks.validation.warning_rules import BOX_WARNINGS, FILE_RULES, IMAGE_WARNINGS, adjusted

ROLES = ("target", "pretrain", "unlabeled")
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RoleResult:
    """Rows of one set that are published, and rows that were taken out."""

    images: int
    boxes: int
    quarantined_images: int
    quarantined_boxes: int
    warnings: int = 0


@dataclass(frozen=True)
class ValidationResult:
    """What `validate` found; `report` is the content of validation.json."""

    roles: dict[str, RoleResult]
    report: dict[str, Any]

    def summary(self) -> dict[str, Any]:
        """The numbers worth comparing between runs, by role."""
        numbers: dict[str, Any] = {}
        for role, result in self.roles.items():
            described = self.report["sets"][role]
            numbers[role] = {**asdict(result), "clipped_boxes": described["clipped_boxes"]}
            for split, counts in described["splits"].items():
                numbers[role][split] = {name: counts[name] for name in ("images", "boxes", "images_without_boxes")}
            if "drift" in described:
                numbers[role]["drift"] = {k: v for k, v in described["drift"].items() if isinstance(v, float)}
            for split, ratio in described["class_balance"].get("imbalance_ratio", {}).items():
                numbers[role][split]["imbalance_ratio"] = ratio
        return numbers


def validate(
    raw: Mapping[str, RawDataset],
    roots: Mapping[str, Path],
    limits: ValidationLimits,
    output: Path,
    threads: int = 0,
    reference: Reference | None = None,
) -> ValidationResult:
    """Judge the sets of the roles "target", "pretrain" and "unlabeled", quarantine bad rows, publish the others.

    Writes to `output`, for each role ROLE/{images.parquet,boxes.parquet,dataset.json} (equal bytes for equal input),
    then validation.json, quarantine and warnings (.jsonl, .csv) and data_docs/ with index.html. `roots`: folder of each
    role; `threads`: decoders, 0 for every core; `reference`: what the champion was trained on, for the drift rules.
    Raises `DataError` when more is bad than `limits` allow: the report is then in `output`, but no tables are.
    """
    found = examine(raw, roots, limits, output, threads, reference=reference)
    if found.broken:
        others = f" (other limits exceeded: {len(found.broken) - 1})" if len(found.broken) > 1 else ""
        raise DataError(found.broken[0] + others)
    roles = {role: _result(role, found.published[role], one) for role, one in found.judged.items()}
    return ValidationResult(roles, found.content)


@dataclass(frozen=True)
class Examination:
    """All that was found, and the sentences that keep it from being used."""

    judged: dict[str, JudgedSet]
    published: dict[str, Published]
    broken: list[str]
    content: dict[str, Any]  # of validation.json


def examine(
    raw: Mapping[str, RawDataset],
    roots: Mapping[str, Path],
    limits: ValidationLimits,
    output: Path,
    threads: int = 0,
    publish: bool = True,
    reference: Reference | None = None,
    decode: bool = True,
) -> Examination:
    """Do what `validate` does and return what was found, whatever it is; without `publish` no tables are written.

    Without `decode` no picture is opened: it is only looked whether they exist, and no rule on their content is judged.
    """
    judged = _judge_all(raw, roots, limits, threads, decode)
    release_pages()
    published = {role: publishable(one) for role, one in judged.items()}
    drift = None
    if "target" in judged:
        judged["target"], drift = with_drift(judged["target"], published["target"], reference, limits)
    broken = [sentence for one in judged.values() for sentence in violations(one, limits)]
    output.mkdir(parents=True, exist_ok=True)
    suites = run_suites([suite for one in judged.values() for suite in _suites(one, limits)], output / "data_docs")
    release_pages()
    if publish and not broken:
        for role, one in published.items():
            write_dataset(output / role, one.images, one.boxes, one.metadata)
    sets = {role: report.describe_set(judged[role], published[role], output / role) for role in judged}
    release_pages()
    if drift is not None:
        sets["target"]["drift"] = drift
    content = report.assemble(sets, broken, limits, suites)
    report.write(output, content, judged.values())
    return Examination(judged, published, broken, content)


def _judge_all(
    raw: Mapping[str, RawDataset], roots: Mapping[str, Path], limits: ValidationLimits, threads: int, decode: bool
) -> dict[str, JudgedSet]:
    """The target comes first: its test images must not be in the other sets."""
    if unknown := sorted(set(raw) - set(ROLES)):
        raise ValueError(f"unknown role {unknown[0]!r}; roles are {', '.join(ROLES)}")
    judged: dict[str, JudgedSet] = {}
    for role in ROLES:
        if role in raw:
            target_test = _test_images(judged["target"]) if "target" in judged else None
            judged[role] = judge_set(role, raw[role], roots[role], limits, target_test, threads, decode)
    return judged


def judge_set(
    role: str,
    raw: RawDataset,
    root: Path,
    limits: ValidationLimits,
    target_test: pa.Table | None = None,
    threads: int = 0,
    decode: bool = True,
) -> JudgedSet:
    """Read the pictures of one set and judge its rows; `target_test`: sha256 and path of pictures it must not have."""
    paths = raw.images["path"]
    limit = SizeLimit(limits.maximum_image_megapixels, limits.maximum_image_megabytes)
    files = inspect_images(root, paths.to_pylist(), threads, limit) if decode else look_for_images(root, paths)
    images = derive_images(raw, files, target_test)
    boxes = derive_boxes(raw, images, limits.box_tolerance_pixels)
    images, boxes = odd_images(images, boxes, limits), odd_boxes(raw, boxes, limits)
    rules = IMAGE_RULES if target_test is None else (*IMAGE_RULES, NO_TARGET_TEST_IMAGE)
    image_rules = (*rules, *adjusted(IMAGE_WARNINGS, limits.severities))
    all_box_rules = (*box_rules(limits.box_tolerance_pixels), *adjusted(BOX_WARNINGS, limits.severities))
    return JudgedSet(
        role,
        raw,
        JudgedTable("images", images, image_rules),
        JudgedTable("boxes", boxes, all_box_rules),
        JudgedTable("files", file_rows(raw), adjusted(FILE_RULES, limits.severities)),
    )


def _test_images(target: JudgedSet) -> pa.Table:
    rows = target.images.rows
    return rows.filter(pc.equal(rows["split"], "test")).select(["sha256", "path"])


def _suites(judged: JudgedSet, limits: ValidationLimits) -> list[Suite]:
    """Every error rule, and the warning rules that found something: an expectation costs some 20 ms."""
    return [
        Suite(
            name=f"{judged.role}_{table.kind}",
            table=table.rows,
            rules=(rules := tuple(r for r in table.rules if r.severity == "error" or table.bad[r.name].any())),
            bad_rows={rule.name: int(table.bad[rule.name].sum()) for rule in rules},
            allowed_fractions={rule.name: limits.allowed_fraction(rule, table.kind) for rule in rules},
            needs_rows=table.kind != "files",
        )
        for table in judged.tables
    ]


def _result(role: str, published: Published, judged: JudgedSet) -> RoleResult:
    result = RoleResult(
        images=len(published.images),
        boxes=len(published.boxes),
        quarantined_images=int((~judged.images.good).sum()),
        quarantined_boxes=int((~judged.boxes.good).sum()),
        warnings=report.warning_count(judged),
    )
    logger.log(
        logging.WARNING if result.quarantined_images or result.quarantined_boxes else logging.INFO,
        "%s: %d images and %d boxes published, %d images and %d boxes quarantined, %d warnings",
        role, result.images, result.boxes, result.quarantined_images, result.quarantined_boxes, result.warnings,
    )  # fmt: skip
    return result
