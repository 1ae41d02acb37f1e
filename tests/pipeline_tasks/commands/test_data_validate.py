"""`nasline data validate`: exit codes, the report, and the repaired copy."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from pipeline_tasks.data.readers import read_folder
from pipeline_tasks.errors import DataError

Nasline = Callable[..., str]


def damage(folder: Any) -> None:
    """One defect of each kind that has one remedy, and some that have none."""
    with folder.edit("train") as content:
        boxes, images = content["annotations"], content["images"]
        boxes[0]["bbox"] = [4, 5, 0, 0]
        boxes[1]["bbox"] = [-0.5, 5, 10, 8]
        boxes[3]["id"] = boxes[2]["id"]
        boxes.append({**boxes[4], "id": 900})
        boxes[6]["bbox"] = [40, 5, 60, 8]  # far over the border: nobody knows where it ends
        boxes[7]["bbox"] = [1, 2]
        images[4]["width"] = 50
        images[5]["file_name"] = "gone.jpg"
        del content["info"]
    Image.new("RGB", (48, 32), "red").save(folder.image("train", 1), "PNG")


def test_repairs_only_what_is_unambiguous_and_records_it(nasline: Nasline, coco_folder: Any, tmp_path: Path) -> None:
    damage(coco_folder)
    before = {p: p.read_bytes() for p in coco_folder.path.rglob("*") if p.is_file()}
    fixed = tmp_path / "fixed"
    error = nasline("data", "validate", coco_folder.path, "--fix", "--to", fixed, "--out", tmp_path / "report", code=65)
    assert "errors: image_file_present (1), image_size (1), box_record (1), annotation_id_unique (2)" in error
    assert {p: p.read_bytes() for p in coco_folder.path.rglob("*") if p.is_file()} == before
    repairs = [json.loads(line) for line in (fixed / "repairs.jsonl").read_text().splitlines()]
    assert [(r["rule"], r["record"].rpartition("#")[2]) for r in repairs] == [
        ("image_size", "/images/4"),
        ("image_suffix", "/images/1"),
        ("image_file_present", "/images/5"),
        ("box_positive_area", "/annotations/0"),
        ("box_not_repeated", "/annotations/12"),
        ("box_record", "/annotations/7"),
        ("box_inside_image", "/annotations/1"),
        ("annotation_id_unique", "/annotations/3"),
        ("coco_keys", "annotations/instances_train.json"),
    ]
    raw = read_folder(fixed)
    assert len(raw.images) == 11 and "images/train_1.png" in raw.images["path"].to_pylist()
    assert raw.images["width"].to_pylist() == [48] * 11 and raw.notes == () and raw.problems == []
    identifiers = raw.boxes["annotation_id"].to_pylist()
    assert len(set(identifiers)) == len(identifiers) == 20
    assert raw.boxes["x"].to_pylist()[0] == 0 and raw.boxes["w"].to_pylist()[0] == 9.5
    error = nasline("data", "validate", fixed, code=65)
    assert "has 1 errors: box_inside_image (1)" in error  # left for a person to decide


def test_ids_of_more_digits_than_python_reads_are_repaired(nasline: Nasline, coco_folder: Any, tmp_path: Path) -> None:
    with coco_folder.edit("train") as content:
        content["annotations"][0]["id"] = "9" * 5000
        content["annotations"][2]["id"] = content["annotations"][1]["id"]
    nasline("data", "validate", coco_folder.path, "--fix", "--to", tmp_path / "fixed", code=65)
    assert len(read_folder(tmp_path / "fixed").boxes) == 24


def test_report_is_whole_or_absent(
    nasline: Nasline, coco_folder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise DataError("broken off")

    monkeypatch.setattr("pipeline_tasks.validation.report.write", broken)
    nasline("data", "validate", coco_folder.path, "--out", tmp_path / "report", code=65)
    assert not (tmp_path / "report").exists() and not (tmp_path / ".report.incoming").exists()
    (tmp_path / "file").touch()
    assert "which is a file" in nasline("data", "validate", coco_folder.path, "--out", tmp_path / "file/x", code=2)


def test_clean_folder_of_any_format(nasline: Nasline, shared: Path, tmp_path: Path) -> None:
    folder = shared / "data/dirty/10_same_picture_two_sizes"
    output = nasline("data", "validate", folder, "--out", tmp_path / "out", code=0)
    assert "10_same_picture_two_sizes is read as voc: Annotations/cam_image1.xml and 1 more are Pascal VOC" in output
    assert "warning image_not_repeated: 1" in output and "has no errors and 2 warnings; the report is in" in output
    assert (tmp_path / "out/data_docs/index.html").is_file()


def test_thresholds_and_severities_come_from_a_parameter_file(
    nasline: Nasline, coco_folder: Any, tmp_path: Path
) -> None:
    (tmp_path / "own.yaml").write_text("validate_data: {tiny_box_pixels: 9, severities: {box_not_tiny: error}}\n")
    error = nasline("data", "validate", coco_folder.path, "--params", tmp_path / "own.yaml", code=65)
    assert "has 24 errors: box_not_tiny (24); --out DIR writes the whole report" in error


def test_wrong_use_is_told(nasline: Nasline, coco_folder: Any, tmp_path: Path) -> None:
    path = coco_folder.path
    assert "--fix and --to DIR go together" in nasline("data", "validate", path, "--fix", code=2)
    assert "--fix and --to DIR go together" in nasline("data", "validate", path, "--to", tmp_path / "x", code=2)
    assert "leave out --no-decode" in nasline(
        "data", "validate", path, "--no-decode", "--fix", "--to", tmp_path / "x", code=2
    )
    assert f"--out {path} exists" in nasline("data", "validate", path, "--out", path, code=2)
    assert "formats are objects365, coco, voc" in nasline("data", "validate", path, "--format", "word", code=2)
    assert "is not a folder" in nasline("data", "validate", tmp_path / "none", code=65)
    shutil.rmtree(path / "images")
    with coco_folder.edit("val") as content:
        content["annotations"][0]["bbox"][0] = math.nan
    assert "image_file_present (12), box_numbers_finite (1)" in nasline("data", "validate", path, code=65)
