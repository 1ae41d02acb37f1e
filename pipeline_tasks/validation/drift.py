"""Drift: how far the target's training split is from what the champion was trained on, as rules on the set as a whole.

Warnings by default; `validate_data.severities` makes any of them an error, which stops the step, or ignores it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa

from pipeline_tasks.data.raw import Problem
from pipeline_tasks.dataset_statistics import (
    BOX_COLUMNS,
    DatasetStatistics,
    Distance,
    class_distance,
    median_side,
    size_distance,
    statistics_of,
)
from pipeline_tasks.validation.columns import ROWS_PER_PART
from pipeline_tasks.validation.judgement import JudgedSet, JudgedTable
from pipeline_tasks.validation.limits import ValidationLimits
from pipeline_tasks.validation.published import Published
from pipeline_tasks.validation.warning_rules import DRIFT_RULES, adjusted

NAMED_CLASSES = 4


@dataclass(frozen=True)
class Reference:
    """What the champion was trained on; None where it was registered without statistics."""

    champion: str
    statistics: DatasetStatistics | None


@dataclass(frozen=True)
class _Drift:
    reference: Reference
    before: DatasetStatistics
    after: DatasetStatistics
    classes: Distance
    box_sizes: Distance
    image_sizes: Distance
    new: tuple[str, ...]
    vanished: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """For validation.json and, its numbers, for MLflow."""
        distances = {"classes": self.classes, "box_sizes": self.box_sizes, "image_sizes": self.image_sizes}
        return {
            "champion": self.reference.champion,
            **{name: one.value for name, one in distances.items()},
            **{f"{name}_by_chance": one.by_chance for name, one in distances.items()},
            "new_classes": list(self.new),
            "vanished_classes": list(self.vanished),
        }


def with_drift(
    judged: JudgedSet, published: Published, reference: Reference | None, limits: ValidationLimits
) -> tuple[JudgedSet, dict[str, Any] | None]:
    """The set with the drift rules judged too, and what was measured; the set itself where nothing is compared."""
    if reference is None:
        return judged, None
    if reference.statistics is None:
        reason = f"{reference.champion} was registered without statistics of its data, by an older release"
        return judged, {"champion": reference.champion, "not_compared": reason}
    drift = _measure(published, reference, reference.statistics)
    table = _with_notes(judged.files, list(_notes(judged, drift, limits)), limits.severities)
    return replace(judged, files=table), drift.to_json()


def _measure(published: Published, reference: Reference, before: DatasetStatistics) -> _Drift:
    batches = published.boxes.select(BOX_COLUMNS).to_batches(max_chunksize=ROWS_PER_PART)
    after = statistics_of(published.images, batches, published.metadata.class_names)
    both = (before, after)
    return _Drift(
        reference, before, after,
        classes=class_distance(before, after),
        box_sizes=size_distance(before.box_sides, after.box_sides, both),
        image_sizes=size_distance(before.image_sides, after.image_sides, both),
        new=tuple(name for name, count in after.class_boxes.items() if count and not before.class_boxes.get(name)),
        vanished=tuple(name for name, count in before.class_boxes.items() if count and not after.class_boxes.get(name)),
    )  # fmt: skip


def _notes(judged: JudgedSet, drift: _Drift, limits: ValidationLimits) -> Iterator[Problem]:
    """What is beyond the limits, each at the set's first annotation file."""
    file, champion = next(iter(judged.raw.metadata.digests), ""), drift.reference.champion
    if drift.classes.beyond(limits.drift_class_distance):
        allowed = f"{limits.drift_class_distance:.3g} allowed, {drift.classes.by_chance:.2g} more by chance"
        yield Problem(
            "drift_class_shares", file, "",
            f"{drift.classes.value:.1%} of the training boxes would have to change class to have the shares of what "
            f"{champion} was trained on ({allowed}): {_most_changed(drift)}",
        )  # fmt: skip
    for name in drift.new:
        boxes = drift.after.class_boxes[name]
        yield Problem("drift_new_class", file, "", f"the class {name!r} ({boxes} boxes) is new to {champion}")
    for name in drift.vanished:
        boxes = drift.before.class_boxes[name]
        yield Problem(
            "drift_vanished_class", file, "", f"the class {name!r} has no training box; {champion} had {boxes}"
        )
    if drift.box_sizes.beyond(limits.drift_size_index):
        sides = [f"{median_side(one.box_sides):.1%}" for one in (drift.before, drift.after)]
        sentence = _sizes("boxes", champion, drift.box_sizes, limits)
        yield Problem("drift_box_sizes", file, "", f"{sentence}; median side {sides[0]} -> {sides[1]} of the picture's")
    if drift.image_sizes.beyond(limits.drift_size_index):
        sides = [f"{median_side(one.image_sides):.0f}" for one in (drift.before, drift.after)]
        sentence = _sizes("pictures", champion, drift.image_sizes, limits)
        yield Problem("drift_image_sizes", file, "", f"{sentence}; median side {sides[0]} -> {sides[1]} pixels")


def _sizes(what: str, champion: str, distance: Distance, limits: ValidationLimits) -> str:
    return (
        f"the sizes of the {what} are not those that {champion} was trained on: population stability index "
        f"{distance.value:.2f} ({limits.drift_size_index:.3g} allowed, {distance.by_chance:.2g} more by chance)"
    )


def _most_changed(drift: _Drift) -> str:
    names = dict.fromkeys([*drift.before.class_boxes, *drift.after.class_boxes])
    shares = {name: tuple(_share(one, name) for one in (drift.before, drift.after)) for name in names}
    changed = sorted(shares, key=lambda name: -abs(shares[name][1] - shares[name][0]))[:NAMED_CLASSES]
    return ", ".join(f"{name!r} {shares[name][0]:.1%} -> {shares[name][1]:.1%}" for name in changed)


def _share(statistics: DatasetStatistics, name: str) -> float:
    return statistics.class_boxes.get(name, 0) / max(sum(statistics.class_boxes.values()), 1)


def _with_notes(files: JudgedTable, notes: list[Problem], severities: Mapping[str, str]) -> JudgedTable:
    """The table of findings on files with a row for each note and a column for each drift rule."""
    rules = adjusted(DRIFT_RULES, severities)
    rows = files.rows
    for rule in DRIFT_RULES:
        rows = rows.append_column(rule.column, pa.nulls(len(rows), pa.string()))
    added = [
        {"path": note.file, "split": "train", "source_record": note.file, "note": note.detail, note.rule: note.detail}
        for note in notes
    ]
    more = pa.Table.from_pylist(added, schema=rows.schema)
    return JudgedTable(files.kind, pa.concat_tables([rows, more]), (*files.rules, *rules))
