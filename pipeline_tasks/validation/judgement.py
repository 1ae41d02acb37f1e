"""What the rules found in one set, and whether it is too much."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline_tasks.data.raw import RawDataset
from pipeline_tasks.validation.limits import ValidationLimits
from pipeline_tasks.validation.plain_text import plain_text
from pipeline_tasks.validation.rules import IMAGE_IN_ONE_SPLIT, Rule, Severity, bad_rows, describe

NAMED_EXAMPLES = 3
ROWS_PER_BATCH = 1 << 16
_KIND = {"images": "image", "boxes": "box", "files": "file"}
_PARAMETERS = {"images": "maximum_bad_image_fraction", "boxes": "maximum_bad_box_fraction"}

Masks = dict[str, NDArray[np.bool_]]


@dataclass(frozen=True)
class JudgedTable:
    """The derived rows of one table, images or boxes, and the rules they were judged by."""

    kind: str  # "images", "boxes" or "files"
    rows: pa.Table
    rules: tuple[Rule, ...]

    @cached_property
    def bad(self) -> Masks:
        """Rows that break each rule, by rule name."""
        return {rule.name: bad_rows(rule, self.rows) for rule in self.rules}

    @cached_property
    def good(self) -> NDArray[np.bool_]:
        """Rows that break no rule but those that only warn."""
        return ~self._any(rule for rule in self.rules if rule.severity == "error")

    @cached_property
    def defective(self) -> NDArray[np.bool_]:
        """Rows that break a rule which counts against the limits."""
        return self._any(rule for rule in self.rules if rule.counts and rule.severity == "error")

    def _any(self, rules: Iterable[Rule]) -> NDArray[np.bool_]:
        """Rows that break one of the rules."""
        found = np.zeros(len(self.rows), np.bool_)
        for rule in rules:
            found |= self.bad[rule.name]
        return found

    def entries(self, rule: Rule, most: int | None = None) -> Iterator[dict[str, Any]]:
        """Entries of the rows that break the rule for the quarantine or the warnings, in the order of the table."""
        chosen = np.flatnonzero(self.bad[rule.name])[:most]
        for row in _rows_at(self.rows, chosen):
            picture = row["image_path"] if self.kind == "boxes" else row["path"]
            yield {
                "split": row["split"],
                "kind": _KIND[self.kind],
                "file": picture or row["source_record"].split("#")[0],
                "record": row["source_record"],
                "rule": rule.name,
                "detail": describe(rule, row),
                "remedy": rule.remedy,
            }


def _rows_at(table: pa.Table, places: NDArray[np.int64]) -> Iterator[dict[str, Any]]:
    """The rows at rising places: `Table.take` would first join every column of texts, gigabytes of a large set."""
    first = 0
    for batch in table.to_batches(max_chunksize=ROWS_PER_BATCH) if len(places) else ():
        begin, end = np.searchsorted(places, (first, first + len(batch)))
        if begin < end:
            yield from batch.take(pa.array(places[begin:end] - first)).to_pylist()
        first += len(batch)


@dataclass(frozen=True)
class JudgedSet:
    """One role's images and boxes after judgement."""

    role: str
    raw: RawDataset
    images: JudgedTable
    boxes: JudgedTable
    files: JudgedTable

    @property
    def tables(self) -> tuple[JudgedTable, ...]:
        """The tables that can hold rows: an unlabelled set has no boxes to judge, and files only where one is odd."""
        labelled = (self.boxes,) if self.raw.labelled else ()
        return (self.images, *labelled, *([self.files] if len(self.files.rows) else []))

    def entries(self, severity: Severity = "error", most: int | None = None) -> Iterator[dict[str, Any]]:
        """The entries of all rules of a severity, of each rule no more than `most`."""
        for table in self.tables:
            for rule in table.rules:
                if rule.severity == severity:
                    for entry in table.entries(rule, most):
                        yield {"role": self.role, **entry}


def violations(judged: JudgedSet, limits: ValidationLimits) -> list[str]:
    """One sentence for each limit that the set exceeds, the most telling first; empty when it may be used."""
    sentences = _test_leaks(judged, limits)
    for table in judged.tables:
        if table.kind == "files":
            sentences += _wrong_files(judged.role, table)
            continue
        over_rules = [
            sentence for rule in table.rules if (sentence := _over_limit(judged.role, table, rule, limits)) is not None
        ]
        sentences += over_rules or _over_total(judged.role, table, limits)
    return sentences or _empty_splits(judged)


def _test_leaks(judged: JudgedSet, limits: ValidationLimits) -> list[str]:
    if judged.role != "target":
        return []
    leaked = pc.equal(judged.images.rows["also_in_split"], "test")
    count = pc.sum(leaked).as_py() or 0
    if count <= limits.maximum_target_test_leaks:
        return []
    entries = [e for e in judged.images.entries(IMAGE_IN_ONE_SPLIT) if "split test" in e["detail"]]
    return [
        "target: pictures of the test split are in the training or validation split too, which would make the measured "
        f"accuracy too good ({count}, {limits.maximum_target_test_leaks} allowed): {_examples(entries, count)}; "
        f"{IMAGE_IN_ONE_SPLIT.remedy}"
    ]


def _wrong_files(role: str, table: JudgedTable) -> list[str]:
    """What is wrong with a file as a whole cannot be quarantined row by row: no share of it is allowed."""
    entries = [entry for rule in table.rules if rule.severity == "error" for entry in table.entries(rule)]
    return [plain_text(f"{role}: {entry['file']}: {entry['detail']}; {entry['remedy']}") for entry in entries]


def _over_limit(role: str, table: JudgedTable, rule: Rule, limits: ValidationLimits) -> str | None:
    count, total = int(table.bad[rule.name].sum()), len(table.rows)
    allowed = limits.allowed_fraction(rule, table.kind)
    if count <= allowed * total:
        return None
    own = rule.name in limits.rule_fractions
    limit = f"rule_fractions.{rule.name}" if own else _PARAMETERS[table.kind]
    return (
        f"{role}: the rule {rule.name} is broken by {_share(count, total, allowed, table.kind)}: "
        f"{_examples(list(table.entries(rule, NAMED_EXAMPLES)), count)}; {rule.remedy}, or raise validate_data.{limit}"
    )


def _over_total(role: str, table: JudgedTable, limits: ValidationLimits) -> list[str]:
    count, total, allowed = int(table.defective.sum()), len(table.rows), limits.total_fraction(table.kind)
    if count <= allowed * total:
        return []
    broken = {
        rule: int(table.bad[rule.name].sum()) for rule in table.rules if rule.counts and table.bad[rule.name].any()
    }
    rules = ", ".join(f"{rule.name} ({number})" for rule, number in broken.items())
    entries = [entry for rule in broken for entry in table.entries(rule, NAMED_EXAMPLES)]
    return [
        f"{role}: the rules {rules} together are broken by {_share(count, total, allowed, table.kind)}: "
        f"{_examples(entries, count)}; correct them or raise validate_data.{_PARAMETERS[table.kind]}"
    ]


def _empty_splits(judged: JudgedSet) -> list[str]:
    """Splits of which the quarantine leaves nothing to train on or to measure with: the required ones, and the
    validation split of a set that need not have one but is measured on it where it is there.
    """
    splits, required = judged.images.rows["split"].to_numpy(), judged.raw.required_splits
    optional = ("val",) if required and "val" not in required else ()
    sentences = []
    for split in (*required, *optional):
        images = judged.images.good & (splits == split)
        if split in required and not images.any():
            sentences.append(f"{judged.role}: the split {split} has no images left after the quarantine; add some")
        elif images.any() and judged.raw.labelled:
            sentences += _without_boxes(judged, split, images, "" if split in required else ", or leave the split out")
    return sentences


def _without_boxes(judged: JudgedSet, split: str, images: NDArray[np.bool_], alternative: str) -> list[str]:
    """A sentence where the images of a split have no box that is learned and measured: crowd regions are not."""
    owners = judged.boxes.rows["image_id"].fill_null(0).to_numpy()
    boxes = judged.boxes.good & images[owners]
    if not boxes.any():
        return [f"{judged.role}: the split {split} has no boxes left after the quarantine; add some{alternative}"]
    crowd = judged.boxes.rows["iscrowd"].fill_null(False).to_numpy()
    if (boxes & ~crowd).any():
        return []
    return [
        f"{judged.role}: the split {split} has no boxes but crowd regions (iscrowd 1), which are neither learned nor "
        f"measured; add boxes of single objects{alternative}"
    ]


def _share(count: int, total: int, allowed: float, kind: str) -> str:
    return f"{count} of {total} {kind} ({100 * count / total:.3g} %, {100 * allowed:.3g} % allowed)"


def _examples(entries: list[dict[str, Any]], count: int) -> str:
    named = [f"{entry['file']} ({entry['detail']}, {entry['record']})" for entry in entries[:NAMED_EXAMPLES]]
    return plain_text("; ".join(named)) + (f"; and {count - len(named)} more" if count > len(named) else "")
