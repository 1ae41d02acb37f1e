"""The report of a validation: validation.json, the quarantine list and the first page of the Data Docs."""

from __future__ import annotations

import csv
import importlib.metadata
import json
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline_tasks import digests
from pipeline_tasks.validation import data_docs
from pipeline_tasks.validation.columns import codes_of, split_counts
from pipeline_tasks.validation.judgement import JudgedSet
from pipeline_tasks.validation.limits import ValidationLimits
from pipeline_tasks.validation.plain_text import plain_text
from pipeline_tasks.validation.published import Published

SCHEMA_VERSION = 1
WARNINGS_OF_A_RULE = 10_000
"""Entries of one rule and set in warnings.jsonl; validation.json counts them all."""
QUARANTINE_FIELDS = ("role", "split", "kind", "file", "record", "rule", "detail", "remedy")


def describe_set(judged: JudgedSet, published: Published, folder: Path) -> dict[str, Any]:
    """One role's part of validation.json; `folder` holds its published tables, unless it was refused."""
    metadata, images, boxes = published.metadata, judged.images, judged.boxes
    kept = len(published.boxes)
    return {
        "name": metadata.name,
        "source": metadata.source,
        "source_digests": metadata.digests,
        "splits": _splits(judged, published),
        "rules": {r.name: int(t.bad[r.name].sum()) for t in judged.tables for r in t.rules if r.severity == "error"},
        "warnings": {name: count for name, count in _warnings(judged).items() if count},
        "quarantined_images": int((~images.good).sum()),
        "quarantined_boxes": int((~boxes.good).sum()),
        "boxes_left_out_with_their_image": int(boxes.good.sum()) - kept,
        "clipped_boxes": published.clipped_boxes,
        "repeated_images_within_a_split": _repeated_within_splits(judged),
        "pictures_without_record": len(judged.raw.unlisted_files),
        "class_balance": _class_balance(published) if judged.raw.labelled else {},
        "licences": metadata.licences,
        "tables": digests.of_folder(folder) if folder.is_dir() else {},
    }


def _warnings(judged: JudgedSet) -> dict[str, int]:
    """Rows that each rule warns of."""
    return {
        rule.name: int(table.bad[rule.name].sum())
        for table in judged.tables
        for rule in table.rules
        if rule.severity == "warning"
    }


def warning_count(judged: JudgedSet) -> int:
    """All warnings of a set."""
    return sum(_warnings(judged).values())


def assemble(
    sets: dict[str, dict[str, Any]],
    violations: list[str],
    limits: ValidationLimits,
    suites: dict[str, dict[str, Any]],
) -> dict[str, Any]:
    """The content of validation.json."""
    return {
        "schema_version": SCHEMA_VERSION,
        "passed": not violations,
        "violations": violations,
        "limits": {
            **asdict(replace(limits, rule_fractions={}, severities={})),
            "rule_fractions": dict(limits.rule_fractions),
            "severities": dict(limits.severities),
        },
        "sets": sets,
        "great_expectations": {"version": importlib.metadata.version("great_expectations"), "suites": suites},
    }


def write(output: Path, content: dict[str, Any], judged: Iterable[JudgedSet]) -> None:
    """Write validation.json, quarantine and warnings as JSON lines and CSV, and data_docs/index.html below `output`."""
    text = json.dumps(content, indent=2, ensure_ascii=False, sort_keys=True)
    (output / "validation.json").write_text(text + "\n", encoding="utf-8")
    sets = list(judged)
    quarantine = _write_entries(output, "quarantine", (entry for one in sets for entry in one.entries()))
    warned = (entry for one in sets for entry in one.entries("warning", WARNINGS_OF_A_RULE))
    warnings = _write_entries(output, "warnings", warned)
    data_docs.finish(output / "data_docs", content, quarantine, warnings)


def _write_entries(output: Path, name: str, entries: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Write `name`.jsonl and `name`.csv; returns the first entries."""
    first: list[dict[str, Any]] = []
    with (
        (output / f"{name}.jsonl").open("w", encoding="utf-8") as lines,
        (output / f"{name}.csv").open("w", encoding="utf-8", newline="") as sheet,
    ):
        table = csv.DictWriter(sheet, QUARANTINE_FIELDS, lineterminator="\n")
        table.writeheader()
        for entry in entries:
            lines.write(json.dumps(entry, ensure_ascii=False) + "\n")
            table.writerow({field: _cell(value) for field, value in entry.items()})
            if len(first) < data_docs.LISTED_ENTRIES:
                first.append(entry)
    return first


def _cell(text: str) -> str:
    """A value of a sheet: what a spreadsheet would take for a formula is quoted, control characters are spelt out."""
    plain = plain_text(text)
    return "'" + plain if plain.startswith(("=", "+", "-", "@")) else plain


def _splits(judged: JudgedSet, published: Published) -> dict[str, dict[str, int]]:
    """Counts for each split: what is published, what is quarantined."""
    images, boxes = published.images, published.boxes
    image_splits, names = codes_of(images["split"])
    code = {name: position for position, name in enumerate(names.to_pylist())}
    owners = _image_rows(published)
    box_splits, crowd = image_splits[owners], boxes["iscrowd"].to_numpy()
    has_boxes = np.bincount(owners, minlength=len(images)) > 0
    bad_images = split_counts(judged.images.rows.filter(~judged.images.good))
    bad_boxes = split_counts(judged.boxes.rows.filter(~judged.boxes.good))
    return {
        split: {
            "images": int((image_splits == code.get(split, -1)).sum()),
            "boxes": int((box_splits == code.get(split, -1)).sum()),
            "crowd_boxes": int(crowd[box_splits == code.get(split, -1)].sum()),
            "images_without_boxes": _without(has_boxes, image_splits, code.get(split, -1), judged.raw.labelled),
            "quarantined_images": bad_images.get(split, 0),
            "quarantined_boxes": bad_boxes.get(split, 0),
        }
        for split in split_counts(judged.raw.images)
    }


def _without(has_boxes: NDArray[np.bool_], image_splits: NDArray[np.int64], split: int, labelled: bool) -> int:
    return int((~has_boxes[image_splits == split]).sum()) if labelled else 0


def _image_rows(published: Published) -> NDArray[np.int64]:
    """The row of each published box's image; ids are row numbers of the raw table."""
    ids = published.images["image_id"].to_numpy()
    rows = np.zeros(int(ids.max(initial=-1)) + 1, np.int64)
    rows[ids] = np.arange(len(ids))
    found: NDArray[np.int64] = rows[published.boxes["image_id"].to_numpy()]
    return found


def _class_balance(published: Published) -> dict[str, Any]:
    """Boxes by class and split without crowd regions; most frequent over least frequent class that occurs."""
    names = published.metadata.class_names
    image_splits, split_names = codes_of(published.images["split"])
    code = {name: position for position, name in enumerate(split_names.to_pylist())}
    single = ~published.boxes["iscrowd"].to_numpy()
    splits, categories = image_splits[_image_rows(published)[single]], published.boxes["category"].to_numpy()[single]
    counts = {
        split: np.bincount(categories[splits == code[split]], minlength=len(names))
        for split in split_counts(published.images)
    }
    return {
        "boxes": {name: {split: int(c[i]) for split, c in counts.items()} for i, name in enumerate(names)},
        "imbalance_ratio": {s: float(c.max() / c[c > 0].min()) if c.any() else None for s, c in counts.items()},
        "classes_without_boxes": {s: [names[i] for i in np.flatnonzero(c == 0)] for s, c in counts.items()},
    }


def _repeated_within_splits(judged: JudgedSet) -> int:
    """Images whose file content occurred before in the same split: no error, but they count twice."""
    rows = judged.images.rows.filter(pc.is_valid(judged.images.rows["sha256"]))
    keys = pc.binary_join_element_wise(rows["split"], rows["sha256"], " ")
    return len(keys) - len(pc.unique(keys))
