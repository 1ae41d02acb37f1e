"""Real defects as found in public sets: each is named with its file; clean sets have no errors."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from pipeline_tasks.data.readers import open_reader
from pipeline_tasks.validation import ValidationLimits
from pipeline_tasks.validation.datasets import judge_set
from pipeline_tasks.validation.folder import validate_folder
from pipeline_tasks.validation.judgement import JudgedSet

RULES = {
    "zero_area_box": ("error", "box_positive_area"),
    "file_name_not_found": ("error", "image_file_present"),
    "category_names_differ_across_splits": ("error", "categories_agree"),
    "filename_without_extension": ("warning", "file_name_matches"),
    "image_without_annotation": ("warning", "picture_listed"),
    "image_not_in_json": ("warning", "picture_listed"),
    "misspelt_class": ("warning", "class_spelling"),
    "empty_label_file": ("warning", "label_file_filled"),
    "missing_label_file": ("warning", "label_file_present"),
    "tiny_box": ("warning", "box_not_tiny"),
    "greyscale_jpeg": ("warning", "image_colour"),
    "missing_top_level_keys": ("warning", "coco_keys"),
    "crowd_region": ("warning", "box_no_crowd"),
    "unused_placeholder_category": ("warning", "category_used"),
    "empty_segmentation": ("warning", "segmentation_filled"),
    "near_duplicate_image": ("warning", "image_not_repeated"),
    "class_size_outlier": ("warning", "box_size_of_class"),
    "near_identical_boxes": ("warning", "box_not_repeated"),
}
CASES = [
    "01_voc_zero_area", "02_voc_class_typos", "03_voc_incomplete", "04_yolo_degenerate",
    "05_yolo_missing_labels_greyscale", "06_coco_without_info", "07_coco_orphan_images", "08_coco_mismatched_export",
    "10_same_picture_two_sizes", "11_voc_class_outliers",
]  # fmt: skip
CLEAN = {
    "bccd": {"box_not_repeated": 7, "box_size_of_class": 3, "image_not_repeated": 1},
    "aquarium": {"image_not_repeated": 6, "box_not_tiny": 1},
    "playing_cards": {"image_not_repeated": 7},
    "pretrain_general": {"box_one_class": 13, "box_no_crowd": 28, "image_colour": 2},
    "unlabeled_general": {"image_colour": 1},
}
"""Warnings that the sets' own documentation explains: near-identical pairs, swapped classes, frames of one film, …"""


def judge(folder: Path) -> JudgedSet:
    reader = open_reader(folder)
    return judge_set("target", reader.read("target"), folder, ValidationLimits())


def defects(shared: Path, case: str) -> list[dict[str, Any]]:
    manifest = json.loads((shared / "data/dirty/MANIFEST.json").read_text())
    (entry,) = [entry for entry in manifest["cases"] if entry["case"] == case]
    return list(entry["defects"])


def test_every_case_of_the_manifest_is_tested(shared: Path) -> None:
    manifest = json.loads((shared / "data/dirty/MANIFEST.json").read_text())
    assert [entry["case"] for entry in manifest["cases"]] == CASES
    assert {defect["defect"] for entry in manifest["cases"] for defect in entry["defects"]} == RULES.keys()


@pytest.mark.parametrize("case", CASES)
def test_every_listed_defect_is_named_with_its_file(shared: Path, case: str) -> None:
    judged = judge(shared / "data/dirty" / case)
    found = [("error", entry) for entry in judged.entries("error")]
    found += [("warning", entry) for entry in judged.entries("warning")]
    for defect in defects(shared, case):
        severity, rule = RULES[defect["defect"]]
        told = [e for s, e in found if (s, e["rule"]) == (severity, rule) and names(e, defect)]
        assert told, f"{case}: {defect} is not told"
        assert all(entry["remedy"] and entry["detail"] for entry in told)
    expected = Counter(RULES[defect["defect"]][1] for defect in defects(shared, case))
    errors = Counter(entry["rule"] for severity, entry in found if severity == "error")
    assert errors == {rule: count for rule, count in expected.items() if ("error", rule) in RULES.values()}


def names(entry: dict[str, Any], defect: dict[str, Any]) -> bool:
    """Whether an entry is about the file of a defect; of two pictures that look alike either may be named."""
    if defect["defect"] == "file_name_not_found" and not entry["file"].endswith(defect["detail"]):
        return False
    return bool(defect["file"] in (entry["file"], entry["record"].split("#")[0]) or defect["file"] in entry["detail"])


def test_line_numbers_lead_to_the_defect(shared: Path) -> None:
    folder = shared / "data/dirty/04_yolo_degenerate"
    for entry in judge(folder).entries("error"):
        file, _, line = entry["record"].partition("#line=")
        fields = (folder / file).read_text().splitlines()[int(line) - 1].split()
        assert (fields[0] == "4" and fields[3:] == ["0", "0"]) or float(fields[3]) == float(fields[4]) == 0
    folder = shared / "data/dirty/02_voc_class_typos"
    for entry in judge(folder).entries("warning"):
        if entry["rule"] == "class_spelling":
            file, _, line = entry["record"].partition("#line=")
            following = (folder / file).read_text().splitlines()[int(line) - 1 :][:2]
            assert "<object>" in following[0] and entry["detail"].split("'")[1] in following[1]


def test_hint_at_the_picture_of_another_export(shared: Path) -> None:
    entries = list(judge(shared / "data/dirty/08_coco_mismatched_export").entries("error"))
    missing = [entry for entry in entries if entry["rule"] == "image_file_present"]
    assert len(missing) == 6
    for entry in missing:
        stem = Path(entry["file"]).name.split(".rf.")[0]
        assert f"; train2017/{stem}.rf." in entry["detail"] and "but for the export's suffix" in entry["detail"]


def test_great_expectations_sees_the_warnings_too(shared: Path, tmp_path: Path) -> None:
    folder = shared / "data/dirty/08_coco_mismatched_export"
    report = validate_folder(folder, tmp_path / "report", ValidationLimits())
    assert report.counts("error") == {"image_file_present": 6, "categories_agree": 1}
    suites = report.content["great_expectations"]["suites"]
    assert suites["target_files"]["unexpected_rows"] == {
        "picture_listed": 6, "category_used": 2, "segmentation_filled": 1, "categories_agree": 1, "class_count": 0,
    }  # fmt: skip
    assert suites["target_files"]["success"] is True  # of files no share is judged: any error stops by itself
    assert report.content["passed"] is False
    lines = [json.loads(line) for line in (tmp_path / "report/warnings.jsonl").read_text().splitlines()]
    assert Counter(line["rule"] for line in lines)["picture_listed"] == 6
    page = (tmp_path / "report/data_docs/index.html").read_text()
    assert "<h2>Warnings</h2>" in page and "is the parent of others" in page
    assert not (tmp_path / "report/target").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", list(CLEAN))
def test_clean_sets_have_no_errors(shared: Path, name: str) -> None:
    judged = judge(shared / "data" / name)
    assert list(judged.entries("error")) == []
    warnings = Counter(entry["rule"] for entry in judged.entries("warning"))
    assert {rule: warnings[rule] for rule in CLEAN[name]} == CLEAN[name]
    judged_rows = len(judged.images.rows) + len(judged.boxes.rows)
    assert sum(warnings.values()) < 0.02 * judged_rows + 1


def test_no_rule_is_keyed_to_a_file_name(repository: Path, shared: Path) -> None:
    code = "".join(path.read_text() for path in (repository / "pipeline_tasks/validation").glob("*.py"))
    manifest = json.loads((shared / "data/dirty/MANIFEST.json").read_text())
    for entry in manifest["cases"]:
        assert entry["case"] not in code
        for defect in entry["defects"]:
            assert Path(defect["file"]).stem not in code
