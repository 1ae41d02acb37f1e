"""Real photographs and real defects, as found in public data sets."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from model.data.near_duplicates import NEAR_BITS
from pipeline_tasks.data.coco import read_coco_folder, read_unlabeled_folder
from pipeline_tasks.errors import DataError
from pipeline_tasks.params import resolve
from pipeline_tasks.seen_images import exclusions, read_held_out, seen_by_run
from pipeline_tasks.validation import ValidationLimits, validate

NEAR_DUPLICATES = {"bccd": ("BloodImage_00038",), "aquarium": ("IMG_3154", "IMG_3156", "IMG_8436")}
"""Test images of which another split has a twin: the same second of a film, the same smear moved a little."""
NOTHING_BAD = ValidationLimits(maximum_bad_images_fraction=0, maximum_bad_boxes_fraction=0)


def test_real_photographs_pass_without_false_alarms(shared: Path, tmp_path: Path) -> None:
    folder = shared / "data/bccd"
    result = validate({"target": read_coco_folder(folder, "target")}, {"target": folder}, NOTHING_BAD, tmp_path / "out")
    assert (tmp_path / "out/quarantine.jsonl").read_text() == ""
    assert (result.roles["target"].images, result.roles["target"].boxes) == (364, 4886)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bccd", "aquarium"])
def test_three_real_sets_pass_together(shared: Path, tmp_path: Path, name: str) -> None:
    data = shared / "data"
    raw = {
        "target": read_coco_folder(data / name, "target"),
        "pretrain": read_coco_folder(data / "pretrain_general", "pretrain"),
        "unlabeled": read_unlabeled_folder(data / "unlabeled_general", "unlabeled"),
    }
    roots = {"target": data / name, "pretrain": data / "pretrain_general", "unlabeled": data / "unlabeled_general"}
    result = validate(raw, roots, NOTHING_BAD, tmp_path / "output")
    assert (tmp_path / "output/quarantine.jsonl").read_text() == ""
    sizes = {"bccd": (364, 4886), "aquarium": (638, 4814)}
    assert (result.roles["target"].images, result.roles["target"].boxes) == sizes[name]
    assert (result.roles["pretrain"].images, result.roles["pretrain"].boxes) == (462, 3812)
    assert result.roles["unlabeled"].images == 348
    assert all(described["clipped_boxes"] == 0 for described in result.report["sets"].values())
    held_out, seen = read_held_out(tmp_path / "output/target"), seen_by_run(context_of(tmp_path / "output"))
    near = exclusions(held_out, {"training": seen}, NEAR_BITS)
    assert {Path(one.image).stem: one.recognised_by for one in near.values()} == dict.fromkeys(
        NEAR_DUPLICATES[name], "perceptual hash"
    )


def context_of(output: Path) -> Any:
    """As much of a step's context as `seen_by_run` reads."""
    inputs = {role: output / role for role in ("target", "pretrain", "unlabeled")}
    return SimpleNamespace(inputs=inputs, parameters=resolve(None, {}), champion=None, run={})


def coco_layout(case: Path, folder: Path, split: str) -> Path:
    """A real COCO export as found, put where the reader looks."""
    (annotations,) = (case / "annotations").glob(f"instances_{split}2017.json")
    (folder / "annotations").mkdir(parents=True)
    shutil.copy(annotations, folder / "annotations/instances_train.json")
    shutil.copytree(case / f"{split}2017", folder / "images")
    return folder


def test_real_export_without_info_and_licences(shared: Path, tmp_path: Path) -> None:
    folder = coco_layout(shared / "data/dirty/06_coco_without_info", tmp_path / "set", "val")
    raw = read_coco_folder(folder, "pretrain", ("train",))
    assert raw.metadata.licences == {"images": {"unknown": 3}, "annotations": "unknown"}
    validate({"pretrain": raw}, {"pretrain": folder}, NOTHING_BAD, tmp_path / "output")
    assert (tmp_path / "output/quarantine.jsonl").read_text() == ""


def test_real_export_with_pictures_that_no_record_names(shared: Path, tmp_path: Path) -> None:
    folder = coco_layout(shared / "data/dirty/07_coco_orphan_images", tmp_path / "set", "val")
    raw = read_coco_folder(folder, "pretrain", ("train",))
    result = validate({"pretrain": raw}, {"pretrain": folder}, NOTHING_BAD, tmp_path / "output")
    manifest = json.loads((shared / "data/dirty/MANIFEST.json").read_text())
    (case,) = [case for case in manifest["cases"] if case["case"] == "07_coco_orphan_images"]
    orphans = [defect for defect in case["defects"] if defect["defect"] == "image_not_in_json"]
    assert result.report["sets"]["pretrain"]["pictures_without_record"] == len(orphans) > 0


def test_real_export_whose_file_names_do_not_match(shared: Path, tmp_path: Path) -> None:
    folder = coco_layout(shared / "data/dirty/08_coco_mismatched_export", tmp_path / "set", "train")
    raw = read_coco_folder(folder, "pretrain", ("train",))
    with pytest.raises(DataError, match="the rule image_file_present is broken by"):
        validate({"pretrain": raw}, {"pretrain": folder}, NOTHING_BAD, tmp_path / "output")
