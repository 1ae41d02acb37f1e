"""`nasline data diff`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from pipeline_tasks.data.comparison import Boxes, Comparison, compare, text
from pipeline_tasks.data.sets import open_set


@pytest.fixture
def versions(coco_folder: Any, tmp_path: Path) -> tuple[Any, Any]:
    """Two equal folders."""
    shutil.copytree(coco_folder.path, tmp_path / "after")
    return coco_folder, type(coco_folder)(tmp_path / "after")


def compared(before: Any, after: Any) -> Comparison:
    with open_set(str(before.path)) as first, open_set(str(after.path)) as second:
        return compare(first, second)


def test_equal_versions_are_equal(versions: tuple[Any, Any]) -> None:
    found = compared(*versions)
    assert found.equal and found.boxes == Boxes(same=24) and found.class_distance == 0
    assert text(found) == "equal: 12 images, 24 boxes"


def test_every_kind_of_change_is_counted(versions: tuple[Any, Any]) -> None:
    before, after = versions
    with after.edit("train") as content:
        first, second, third, fourth, *_ = content["annotations"]
        first["bbox"][0] += 1  # moved
        second["category_id"] = 3  # renamed
        third["bbox"] = [30, 20, 5, 5]  # overlaps nothing: one removed, one added
        fourth["bbox"][0] += 0.001  # rounding
        content["images"][5]["file_name"] = "renamed.jpg"
        gone = content["images"].pop(4)
        content["annotations"] = [one for one in content["annotations"] if one["image_id"] != gone["id"]]
        moved = content["images"].pop(3)
        own = [one for one in content["annotations"] if one["image_id"] == moved["id"]]
        content["annotations"] = [one for one in content["annotations"] if one["image_id"] != moved["id"]]
    with after.edit("val") as content:
        content["images"].append(moved)
        content["annotations"] += own
    after.image("train", 5).rename(after.path / "images/renamed.jpg")
    after.image("train", 4).unlink()
    shutil.copy(after.image("test", 1), after.image("test", 0))
    found = compared(before, after)
    assert found.renamed == [("images/train_5.jpg", "images/renamed.jpg")]
    assert (found.added, found.removed) == ([], ["images/train_4.jpg"])
    assert found.changed_splits == [("images/train_3.jpg", "train", "val")]
    assert found.changed_pictures == ["images/test_0.jpg"]
    assert found.changed_boxes == ["images/train_0.jpg", "images/train_1.jpg"]
    assert found.boxes == Boxes(same=24 - 2 - 3, moved=1, renamed=1, added=1, removed=1 + 2)
    shown = text(found)
    assert "images 12 -> 11: 0 added, 1 removed, 1 renamed, 1 with other pixels, 1 in another split" in shown


def test_class_drift_is_measured_by_name(versions: tuple[Any, Any]) -> None:
    before, after = versions
    for split in ("train", "val", "test"):
        with after.edit(split) as content:
            content["categories"] = [{"id": 1, "name": "circle"}, {"id": 2, "name": "star"}]
            for one in content["annotations"]:
                one["category_id"] = 1 if one["category_id"] == 3 else 2
    found = compared(before, after)
    assert {one.name: (one.before, one.after) for one in found.classes} == {
        "circle": (12, 12), "square": (12, None), "star": (None, 12)
    }  # fmt: skip
    assert found.class_distance == 0.5
    assert found.boxes == Boxes(same=12, renamed=12)
    assert not found.equal and "square: 12 -> no such class boxes, -50.00 points of all" in text(found)


def test_json_that_is_a_folder_is_refused(versions: tuple[Any, Any], nasline: Any, tmp_path: Path) -> None:
    options = (versions[0].path, versions[1].path, "--json", tmp_path)
    assert "is no place for a file" in nasline("data", "diff", *options, code=2)


def test_command_writes_the_whole_comparison(versions: tuple[Any, Any], nasline: Any, tmp_path: Path) -> None:
    before, after = versions
    with after.edit("val") as content:
        content["annotations"].pop()
    output = nasline("data", "diff", before.path, after.path, "--json", tmp_path / "diff.json", code=0)
    assert "1 removed" in output
    found = json.loads((tmp_path / "diff.json").read_text())
    assert found["boxes"]["removed"] == 1 and found["changed_boxes"] == ["images/val_2.jpg"] and not found["equal"]
