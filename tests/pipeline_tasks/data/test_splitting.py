"""`nasline data split` and the leaks between splits."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from pipeline_tasks.data.leaks import Fingerprints, alike, near_pairs
from pipeline_tasks.data.sets import OpenSet, open_set
from pipeline_tasks.data.splitting import SplitRule, divide, leaks_of
from pipeline_tasks.errors import DataError, UsageError


def splits_of(opened: OpenSet) -> dict[str, str]:
    images = opened.raw.images
    return dict(zip(images["path"].to_pylist(), images["split"].to_pylist(), strict=True))


def divided(folder: Path, rule: SplitRule) -> dict[str, str]:
    with open_set(str(folder)) as opened:
        raw = divide(opened, rule).raw
    return dict(zip(raw.images["path"].to_pylist(), raw.images["split"].to_pylist(), strict=True))


def test_hash_rule_gives_the_published_split_of_bccd(shared: Path) -> None:
    """Its provenance tells the formula: sha1 of the file name, test below 0.15, val below 0.30."""
    rule = SplitRule(shares=(0.7, 0.15, 0.15), near_bits=None)
    with open_set(str(shared / "data/bccd")) as opened:
        division = divide(opened, rule)
        assert division.images == {"train": 250, "val": 67, "test": 47}
        assert splits_of(opened) == splits_of(OpenSet(opened.folder, opened.recognised, division.raw))


def test_more_images_do_not_move_those_that_are_there(make_coco_folder: Any) -> None:
    large, small = make_coco_folder("large", train=20), make_coco_folder("small", train=12)
    rule = SplitRule(shares=(0.6, 0.2, 0.2))
    before, after = divided(small.path, rule), divided(large.path, rule)
    assert {path: after[path] for path in before} == before
    assert divided(small.path, SplitRule(shares=(0.6, 0.2, 0.2), seed=1)) != before


def test_groups_stay_together(make_coco_folder: Any) -> None:
    folder = make_coco_folder(train=20)
    for key in ("sequence", "images/([a-z]+)_"):
        found = divided(folder.path, SplitRule("group", (0.4, 0.3, 0.3), key, seed=6))
        assert len({(path.split("_")[0], split) for path, split in found.items()}) == 3
        assert set(found.values()) == {"train", "val", "test"}
    found = divided(folder.path, SplitRule("stratified", (0.4, 0.3, 0.3), "([0-9])"))
    assert len({(path.split("_")[1][0], split) for path, split in found.items()}) == 10
    with pytest.raises(DataError, match="1 images or groups are too few for a train split"):
        divided(folder.path, SplitRule("group", (0.4, 0.3, 0.3), "folder"))


def test_stratified_shares_hold_for_every_class(make_coco_folder: Any) -> None:
    folder = make_coco_folder(train=60, val=20, test=20)
    with folder.edit("train") as content:  # one class is rare: in 10 of 100 images
        for split_images in (content["annotations"],):
            for one in split_images:
                one["category_id"] = 3 if one["image_id"] % 6 == 0 and one["id"] % 2 else 7
    for split in ("val", "test"):
        with folder.edit(split) as content:
            for one in content["annotations"]:
                one["category_id"] = 7
    with open_set(str(folder.path)) as opened:
        found = divide(opened, SplitRule("stratified", (0.6, 0.2, 0.2)))
    assert found.images == {"train": 60, "val": 20, "test": 20}
    assert found.class_shares["circle"] == pytest.approx({"train": 0.6, "val": 0.2, "test": 0.2})


def test_copies_and_lookalikes_are_found_and_end_in_one_split(coco_folder: Any, tmp_path: Path, nasline: Any) -> None:
    scene = cv2.resize(np.random.default_rng(5).integers(0, 256, (6, 8, 3), np.uint8), (480, 320))
    cv2.imwrite(str(coco_folder.image("train", 2)), scene)
    cv2.imwrite(str(coco_folder.image("val", 1)), scene, [cv2.IMWRITE_JPEG_QUALITY, 60])
    shutil.copy(coco_folder.image("train", 0), coco_folder.image("test", 0))
    with open_set(str(coco_folder.path)) as opened:
        leaks = leaks_of(opened, near_bits=8)
        assert [(leak.exact, leak.members) for leak in leaks] == [
            (True, (("train", "images/train_0.jpg"), ("test", "images/test_0.jpg"))),
            (False, (("train", "images/train_2.jpg"), ("val", "images/val_1.jpg"))),
        ]
        assert [leak.exact for leak in leaks_of(opened, near_bits=None)] == [True]
    output = nasline("data", "split", coco_folder.path, "--check", code=0)
    assert "pictures in more than one split: 2, 1 as equal files and 1 alike" in output
    assert "alike: train images/train_2.jpg, val images/val_1.jpg" in output
    options = ("--shares", "0.5,0.25,0.25", "--by", "stratified", "--to", tmp_path / "new")
    output = nasline("data", "split", coco_folder.path, *options, code=0)
    assert "before: 2, now none" in output
    with open_set(str(tmp_path / "new")) as opened:
        assert leaks_of(opened, near_bits=8) == []
        assert len(opened.raw.images) == 12 and set(splits_of(opened).values()) == {"train", "val", "test"}
        assert [len(opened.raw.boxes), opened.class_names] == [24, ("circle", "square")]


@pytest.mark.parametrize(
    ("rule", "sentence"),
    [
        ({"shares": (0.8, 0.1, 0.2)}, "must be three numbers that sum to 1"),
        ({"shares": (0.5, 0.5, float("nan"))}, "must be three numbers that sum to 1"),
        ({"near_bits": 64}, "--near-bits 64 must be below 64"),
        ({"method": "film"}, "--by film is unknown"),
        ({"method": "group"}, "--by group needs --group"),
        ({"method": "group", "group": "("}, "is no regular expression"),
    ],
)
def test_wrong_rules_are_refused(coco_folder: Any, rule: Any, sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        divided(coco_folder.path, SplitRule(**{"near_bits": None, **rule}))


def test_unlabelled_set_is_not_divided(coco_folder: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has no annotations: an unlabelled set is used whole"):
        divided(coco_folder.path / "images", SplitRule())


def test_wrong_options_are_refused(coco_folder: Any, nasline: Any) -> None:
    options = ("--to", "new", "--shares", "0.8,0.1")
    assert "--shares '0.8,0.1' must be" in nasline("data", "split", coco_folder.path, *options, code=2)


def test_all_near_pairs_are_found() -> None:
    generator = np.random.default_rng(0)
    hashes = generator.integers(0, 2**64, 3000, np.uint64)
    hashes[1000:1500] = hashes[:500] ^ (np.uint64(1) << generator.integers(0, 64, 500).astype(np.uint64))
    hashes[2999] = hashes[0]
    groups = alike(Fingerprints([None] * 3000, hashes.tolist()), near_bits=1)
    assert groups[1000:1500].tolist() == list(range(500)) and groups[2999] == 0
    assert len(set(groups.tolist())) == 3000 - 501
    assert sum(len(first) for first, _ in near_pairs(hashes[:1000], 1)) == 1000  # each with itself alone


def test_default_is_the_measured_one() -> None:
    from model.data import near_duplicates
    from pipeline_tasks.commands import data

    assert data.NEAR_BITS == near_duplicates.NEAR_BITS
