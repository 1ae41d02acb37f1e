"""Splits without a box that is learned or measured end the validation, before a training would end with them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline_tasks.data.coco import read_coco_folder
from pipeline_tasks.errors import DataError
from pipeline_tasks.validation import ValidationLimits, ValidationResult, validate


def run(output: Path, target: Any, pretrain: Any = None) -> ValidationResult:
    raw, roots = {"target": read_coco_folder(target.path, "target")}, {"target": target.path}
    if pretrain is not None:
        raw["pretrain"], roots["pretrain"] = read_coco_folder(pretrain.path, "pretrain", ("train",)), pretrain.path
    return validate(raw, roots, ValidationLimits(), output)


def all_crowd(content: dict[str, Any]) -> None:
    for box in content["annotations"]:
        box["iscrowd"] = 1


def no_annotations(content: dict[str, Any]) -> None:
    content["annotations"] = []


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_split_of_crowd_regions_alone_is_refused(coco_folder: Any, tmp_path: Path, split: str) -> None:
    with coco_folder.edit(split) as content:
        all_crowd(content)
    sentence = (
        rf"^target: the split {split} has no boxes but crowd regions \(iscrowd 1\), which are neither learned nor "
        "measured; add boxes of single objects$"
    )
    with pytest.raises(DataError, match=sentence):
        run(tmp_path / "output", coco_folder)


@pytest.mark.parametrize(
    ("split", "damage", "sentence"),
    [
        ("train", all_crowd, r"train has no boxes but crowd regions .*; add boxes of single objects$"),
        (
            "val",
            all_crowd,
            r"val has no boxes but crowd regions .*; add boxes of single objects, or leave the split out",
        ),
        ("val", no_annotations, "val has no boxes left after the quarantine; add some, or leave the split out"),
    ],
)
def test_pretraining_set_whose_images_have_nothing_to_measure_is_refused(
    make_coco_folder: Callable[..., Any], tmp_path: Path, split: str, damage: Any, sentence: str
) -> None:
    target, pretrain = make_coco_folder(), make_coco_folder("pretrain", 1)
    with pretrain.edit(split) as content:
        damage(content)
    with pytest.raises(DataError, match=f"^pretrain: the split {sentence}"):
        run(tmp_path / "output", target, pretrain)


def test_pretraining_set_needs_neither_validation_nor_test_split(
    make_coco_folder: Callable[..., Any], tmp_path: Path
) -> None:
    target, pretrain = make_coco_folder(), make_coco_folder("pretrain", 1)
    pretrain.annotation_file("val").unlink()
    with pretrain.edit("test") as content:
        no_annotations(content)
    assert run(tmp_path / "output", target, pretrain).roles["pretrain"].images == 9
