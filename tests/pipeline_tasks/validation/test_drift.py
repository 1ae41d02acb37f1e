"""Drift against what the champion was trained on: what is told, when it stops the step, and what the keys know."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from model.data.tables import write_dataset
from pipeline_tasks import champion_data
from pipeline_tasks.data.readers import read_folder
from pipeline_tasks.dataset_statistics import DatasetStatistics, statistics_of
from pipeline_tasks.keys import key_content
from pipeline_tasks.params import Parameters, resolve
from pipeline_tasks.steps import definition
from pipeline_tasks.validation import ValidationLimits, validate
from pipeline_tasks.validation.datasets import judge_set
from pipeline_tasks.validation.drift import Reference, with_drift
from pipeline_tasks.validation.judgement import JudgedSet, violations
from pipeline_tasks.validation.published import Published, publishable

SPLITS = ("train", "val", "test")
Found = dict[str, list[str]]


def judge(folder: Path, limits: ValidationLimits) -> tuple[JudgedSet, Published]:
    judged = judge_set("target", read_folder(folder, "target", SPLITS), folder, limits)
    return judged, publishable(judged)


def statistics_in(folder: Path) -> DatasetStatistics:
    """What `register` would write down of the published set."""
    _, published = judge(folder, ValidationLimits())
    return statistics_of(published.images, published.boxes.to_batches(), published.metadata.class_names)


def drift_from(folder: Path, champion: DatasetStatistics, **limits: Any) -> tuple[Found, list[str]]:
    """Details of the warnings by rule, and what stops the step."""
    given = ValidationLimits(**limits)
    judged, _ = with_drift(*judge(folder, given), Reference("cells v3", champion), given)
    warned: Found = {}
    for entry in judged.entries("warning"):
        assert entry["file"] == "annotations/instances_train.json"
        warned.setdefault(entry["rule"], []).append(entry["detail"])
    return warned, violations(judged, given)


def test_the_report_has_the_distances_and_the_tables_know_nothing_of_it(coco_folder: Any, tmp_path: Path) -> None:
    _, published = judge(coco_folder.path, ValidationLimits())
    write_dataset(tmp_path / "alone", published.images, published.boxes, published.metadata)
    champion = replace(statistics_in(coco_folder.path), class_boxes={"square": 6, "circle": 6, "star": 3})
    raw, folders = {"target": read_folder(coco_folder.path, "target", SPLITS)}, {"target": coco_folder.path}
    reference = Reference("cells v3", champion)
    result = validate(raw, folders, ValidationLimits(), tmp_path / "compared", reference=reference)
    told = json.loads((tmp_path / "compared/validation.json").read_text())["sets"]["target"]
    assert (told["drift"]["champion"], told["drift"]["vanished_classes"]) == ("cells v3", ["star"])
    assert told["warnings"] == {"drift_vanished_class": 1}
    assert result.summary()["target"]["drift"]["classes"] == pytest.approx(0.2)
    for name in ("images.parquet", "boxes.parquet", "dataset.json"):
        assert (tmp_path / "alone" / name).read_bytes() == (tmp_path / "compared/target" / name).read_bytes()


def test_the_same_data_drift_nowhere(coco_folder: Any) -> None:
    statistics = statistics_in(coco_folder.path)
    assert drift_from(coco_folder.path, statistics) == ({}, [])
    assert drift_from(coco_folder.path, statistics, drift_class_distance=0, drift_size_index=0) == ({}, [])


def test_every_kind_of_drift_is_told(coco_folder: Any) -> None:
    before = statistics_in(coco_folder.path)
    champion = DatasetStatistics(
        1000,
        {"square": 900, "star": 100},
        {bin_ + 8: 1000 * count for bin_, count in before.box_sides.items()},
        {bin_ + 8: 1000 for bin_ in before.image_sides},
    )
    found, stopped = drift_from(coco_folder.path, champion)
    assert set(found) == {
        "drift_class_shares",
        "drift_new_class",
        "drift_vanished_class",
        "drift_box_sizes",
        "drift_image_sizes",
    }
    assert stopped == []
    assert found["drift_new_class"] == ["the class 'circle' (6 boxes) is new to cells v3"]
    assert found["drift_vanished_class"] == ["the class 'star' has no training box; cells v3 had 100"]
    (shares,) = found["drift_class_shares"]
    assert shares.startswith("50.0% of the training boxes would have to change class") and "'circle' 0.0%" in shares
    assert "pixels" in found["drift_image_sizes"][0] and "population stability index" in found["drift_box_sizes"][0]
    tolerated, _ = drift_from(coco_folder.path, champion, drift_class_distance=0.6, drift_size_index=99)
    assert set(tolerated) == {"drift_new_class", "drift_vanished_class"}


def test_severities_stop_the_step_or_silence_a_rule(coco_folder: Any) -> None:
    champion = replace(statistics_in(coco_folder.path), class_boxes={"square": 6, "circle": 6, "star": 3})
    warned, stopped = drift_from(coco_folder.path, champion, severities={"drift_vanished_class": "error"})
    assert warned == {}
    assert stopped == [
        "target: annotations/instances_train.json: the class 'star' has no training box; cells v3 had 3; look at both "
        "with `nasline data diff`; nothing, if the change is meant"
    ]
    assert drift_from(coco_folder.path, champion, severities={"drift_vanished_class": "ignore"}) == ({}, [])


def test_a_champion_of_an_older_release_is_told_not_judged(coco_folder: Any) -> None:
    limits = ValidationLimits()
    judged, published = judge(coco_folder.path, limits)
    compared, told = with_drift(judged, published, Reference("cells v3", None), limits)
    assert told is not None and "cells v3 was registered without statistics" in told["not_compared"]
    assert compared is judged


def bundle(folder: Path, target: str, statistics: DatasetStatistics | None) -> Path:
    folder.mkdir()
    recorded = {} if statistics is None else {champion_data.STATISTICS: statistics.to_json()}
    lineage = {"datasets": {"target": target}, **recorded}
    (folder / "lineage.json").write_text(json.dumps(lineage), encoding="utf-8")
    return folder


def key_of(pinned: dict[str, Any] | None, **options: Any) -> dict[str, Any]:
    champion = {"name": "cells", "version": "3", "digest": "d", "directory": "champions/x"}
    frozen = {
        "datasets": {"target": {"digest": "new"}},
        "champion": None if pinned is None else {**champion, champion_data.FIELD: pinned},
    }
    parameters = resolve(None, {f"validate_data.{name}": value for name, value in options.items()})
    return key_content(definition("validate_data"), parameters, "", {}, frozen)


def test_keys_follow_the_champions_statistics_where_its_data_are_others(tmp_path: Path) -> None:
    one = DatasetStatistics(9, {"cat": 3}, {0: 3}, {8: 9})
    alone = key_of(None)
    same = champion_data.pin(bundle(tmp_path / "same", "new", one))
    assert key_of(same) == alone == key_of(None, drift_class_distance=0.5)  # nothing is compared
    first = key_of(champion_data.pin(bundle(tmp_path / "first", "old", one)))
    equal = key_of(champion_data.pin(bundle(tmp_path / "equal", "older", one)))
    other = key_of(champion_data.pin(bundle(tmp_path / "other", "old", replace(one, images=10))))
    unknown = key_of(champion_data.pin(bundle(tmp_path / "unknown", "old", None)))
    assert first == equal and len({json.dumps(key) for key in (alone, first, other, unknown)}) == 4
    assert unknown["inputs"]["champion_statistics"] is None
    pinned = champion_data.pin(tmp_path / "first")
    assert key_of(pinned, drift_size_index=0.5) != first
    older_release = {"champion": {"name": "cells", "version": "3"}, "datasets": {"target": {"digest": "new"}}}
    assert key_content(definition("validate_data"), Parameters(), "", {}, older_release) == alone
    assert (
        champion_data.statistics(tmp_path / "first") == one and champion_data.statistics(tmp_path / "unknown") is None
    )
