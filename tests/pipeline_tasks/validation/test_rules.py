"""Each rule on hand-made rows, and against Great Expectations' own count."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from pipeline_tasks.data.coco import read_coco_folder
from pipeline_tasks.validation import columns, judgement, published, twins, validate
from pipeline_tasks.validation.images import inspect_images
from pipeline_tasks.validation.limits import ValidationLimits
from pipeline_tasks.validation.rules import BOX_RULES, IMAGE_RULES, RULE_NAMES, Rule, bad_rows, box_rules, describe
from pipeline_tasks.validation.suites import Suite, run_suites
from pipeline_tasks.validation.tables import derive_boxes, derive_images


def derived(folder: Any, tolerance: float = 1.0) -> tuple[pa.Table, pa.Table]:
    raw = read_coco_folder(folder.path, "target")
    images = derive_images(raw, inspect_images(folder.path, raw.images["path"].to_pylist()), None)
    return images, derive_boxes(raw, images, tolerance)


def rule_named(name: str, tolerance: float = 1.0) -> Rule:
    return next(rule for rule in (*IMAGE_RULES, *box_rules(tolerance)) if rule.name == name)


BOXES = [  # the image is 48 x 32 pixels, the tolerance one pixel
    ([0, 0, 48, 32], None),
    ([-1, -1, 49, 33], None),
    ([-1.01, 0, 5, 5], "box_inside_image"),
    ([0, -1.5, 5, 5], "box_inside_image"),
    ([40, 0, 9.01, 5], "box_inside_image"),
    ([0, 30, 5, 3.5], "box_inside_image"),
    ([100, 100, 5, 5], "box_inside_image"),
    ([5, 5, 0, 3], "box_positive_area"),
    ([5, 5, 3, -1], "box_positive_area"),
    ([48.2, 5, 0.5, 3], "box_positive_area"),  # within the tolerance, but nothing of it is inside
    ([5, math.nan, 3, 3], "box_numbers_finite"),
    ([5, 5, math.inf, 3], "box_numbers_finite"),
]


@pytest.mark.parametrize(("bbox", "broken"), BOXES)
def test_box_rules(coco_folder: Any, bbox: list[float], broken: str | None) -> None:
    with coco_folder.edit("val") as content:
        content["annotations"][2]["bbox"] = bbox
    _, boxes = derived(coco_folder)
    found = {rule.name: np.flatnonzero(bad_rows(rule, boxes)).tolist() for rule in box_rules(1.0)}
    assert {name: rows for name, rows in found.items() if rows} == ({} if broken is None else {broken: [14]})


def test_not_a_number_as_area_is_found(coco_folder: Any) -> None:
    with coco_folder.edit("val") as content:
        content["annotations"][2]["area"] = math.nan
        del content["annotations"][3]["area"]  # a missing area is no defect: width times height takes its place
    _, boxes = derived(coco_folder)
    assert np.flatnonzero(bad_rows(rule_named("box_numbers_finite"), boxes)).tolist() == [14]


def test_repeated_ids_count_within_a_file_only(coco_folder: Any) -> None:
    with coco_folder.edit("train") as train, coco_folder.edit("val") as val:
        train["annotations"][5]["id"] = train["annotations"][0]["id"]
        val["annotations"][1]["id"] = train["annotations"][0]["id"]
        train["images"][2]["id"] = train["images"][1]["id"]
    images, boxes = derived(coco_folder)
    assert np.flatnonzero(bad_rows(rule_named("annotation_id_unique"), boxes)).tolist() == [0, 5]
    assert np.flatnonzero(bad_rows(rule_named("image_id_unique"), images)).tolist() == [1, 2]


def test_detail_names_numbers(coco_folder: Any) -> None:
    with coco_folder.edit("train") as content:
        content["annotations"][0]["bbox"] = [45, 0, 8.5, 4]
    _, boxes = derived(coco_folder)
    detail = describe(rule_named("box_inside_image"), boxes.slice(0, 1).to_pylist()[0])
    assert detail == (
        "annotation 2 (x 45, y 0, width 8.5, height 4) reaches 5.5 pixels over the border of the 48x32 image"
    )


def test_rule_names_differ() -> None:
    assert len(set(RULE_NAMES)) == len(RULE_NAMES) == 14


def damaged_everywhere(folder: Any) -> None:
    """At least one row breaks each rule of images and boxes."""
    folder.image("train", 0).unlink()
    picture = folder.image("train", 1)
    picture.write_bytes(picture.read_bytes()[:200])
    folder.image("train", 3).write_bytes(folder.image("test", 0).read_bytes())
    with folder.edit("train") as content:
        images, boxes = content["images"], content["annotations"]
        images[2]["width"] = 47
        images[4]["id"] = images[5]["id"]
        images.append({"id": 99, "width": 1, "height": 1})
        boxes[0]["bbox"] = [1]
        boxes[1]["id"] = boxes[2]["id"]
        boxes[3]["image_id"] = 1000
        boxes[4]["category_id"] = 1000
        boxes[5]["bbox"][2] = math.inf
        boxes[6]["bbox"][2] = 0
        boxes[7]["bbox"][0] = -30


def test_rows_are_judged_alike_in_parts_of_any_size(
    make_coco_folder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    coco_folder = make_coco_folder(train=12)
    damaged_everywhere(coco_folder)
    with coco_folder.edit("val") as content:
        content["annotations"].append({**content["annotations"][0], "id": 777})  # lies on the other, clipped below
        content["annotations"][1].update(bbox=[-0.5, 0, 5, 0.5], area=99, iscrowd=1)
    limits = ValidationLimits(1, 1, maximum_target_test_leaks=9)
    raw = {"target": read_coco_folder(coco_folder.path, "target")}
    found = []
    for rows in (1 << 20, 4):
        for module in (columns, twins, published):
            monkeypatch.setattr(module, "ROWS_PER_PART", rows)
        monkeypatch.setattr(columns, "_ROWS_PER_CHUNK", rows)
        output = tmp_path / str(rows)
        validate(raw, {"target": coco_folder.path}, limits, output, threads=1)
        lists = [(output / name).read_text() for name in ("quarantine.jsonl", "warnings.jsonl")]
        content = json.loads((output / "validation.json").read_text())
        found.append((lists, content))
    assert found[0] == found[1]
    warned = {json.loads(line)["rule"] for line in found[0][0][1].splitlines()}
    assert {"box_not_repeated", "box_no_crowd", "box_not_tiny", "box_area"} <= warned


def bad_counts(rules: Iterable[Rule], table: pa.Table) -> dict[str, int]:
    return {rule.name: int(bad_rows(rule, table).sum()) for rule in rules}


def test_great_expectations_finds_the_same_rows(coco_folder: Any, tmp_path: Path) -> None:
    damaged_everywhere(coco_folder)
    images, boxes = derived(coco_folder)
    allowed = {rule.name: 0.0 for rule in (*IMAGE_RULES, *BOX_RULES)}
    suites = [
        Suite("images", images, IMAGE_RULES, bad_counts(IMAGE_RULES, images), allowed),
        Suite("boxes", boxes, box_rules(1.0), bad_counts(box_rules(1.0), boxes), allowed),
    ]
    results = run_suites(suites, tmp_path / "docs")  # asserts equal counts itself
    unexpected = results["images"]["unexpected_rows"] | results["boxes"]["unexpected_rows"]
    twice = {"image_id_unique", "annotation_id_unique"}
    expected = {name: 2 if name in twice else 1 for name in allowed}
    expected["box_image_known"] += 2  # the two boxes of the image whose id was overwritten
    assert unexpected == expected
    assert results["images"]["statistics"]["unsuccessful_expectations"] == len(IMAGE_RULES)


def test_allowed_share_makes_an_expectation_succeed(coco_folder: Any, tmp_path: Path) -> None:
    coco_folder.image("train", 0).unlink()
    images, _ = derived(coco_folder)
    for share, success in ((1 / 12 + 1e-6, True), (1 / 12 - 1e-6, False)):
        allowed = {rule.name: share for rule in IMAGE_RULES}
        suite = Suite("images", images, IMAGE_RULES, bad_counts(IMAGE_RULES, images), allowed)
        results = run_suites([suite], tmp_path / str(share))
        assert results["images"]["success"] is success


def test_rows_of_a_table_in_many_chunks_are_found_by_their_places() -> None:
    table = pa.concat_tables([pa.table({"number": list(range(first, first + 7))}) for first in range(0, 70, 7)])
    places = np.array([0, 6, 7, 20, 21, 69])
    assert [row["number"] for row in judgement._rows_at(table, places)] == places.tolist()
    assert list(judgement._rows_at(table, places[:0])) == []
