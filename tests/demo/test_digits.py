"""The demo's pictures: exact boxes, disjoint sources, equal bytes for a seed, and folders the reader accepts."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from demo import digits
from demo.digits import GENERATED_LICENCE, SIDE, UCI_LICENCE, Sizes, Source, generate, make_picture

SIZES = Sizes(target_train=40, target_val=10, target_test=10, pretrain_train=30, pretrain_val=10, unlabeled=30)
DIGIT_FILES = (
    "target/annotations/instances_train.json",
    "target/annotations/instances_val.json",
    "target/annotations/instances_test.json",
    "unlabeled/hidden_truth.json",
)
SHAPE_FILES = ("pretrain/annotations/instances_train.json", "pretrain/annotations/instances_val.json")


@pytest.fixture(scope="module")
def generated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "data"
    generate(folder, seed=3, sizes=SIZES)
    return folder


def read(folder: Path, name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / name).read_text())
    return content


def digests(folder: Path) -> dict[str, str]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_a_seed_determines_every_byte(generated: Path, tmp_path: Path) -> None:
    generate(tmp_path / "again", seed=3, sizes=SIZES)
    generate(tmp_path / "other", seed=4, sizes=SIZES)
    assert digests(tmp_path / "again") == digests(generated)
    assert digests(tmp_path / "other").keys() == digests(generated).keys()
    pictures = [name for name in digests(generated) if name.endswith(".jpg")]
    assert len(pictures) == 130 and all(digests(tmp_path / "other")[n] != digests(generated)[n] for n in pictures)


def test_boxes_are_tight_around_the_ink() -> None:
    """Objects are painted twice, on two backgrounds: where both pictures agree there is only ink."""
    source = Source(np.arange(3), np.zeros(3, np.int64), digits.digit_drawer(), UCI_LICENCE)
    background = np.full((SIDE, SIDE, 3), 128.0, np.float32)
    for trial in range(20):
        random = np.random.default_rng(trial)
        alpha = digits._cropped_to_ink(source.draw(random, trial % 3))
        image = background.copy()
        x, y, width, height = digits._paint(image, alpha, (20, 30), random)
        changed = np.abs(image - 128.0).max(axis=2)
        inked = changed >= 0.5 * changed.max()  # the colour is uniform: half the change is half the ink
        rows, columns = np.flatnonzero(inked.any(axis=1)), np.flatnonzero(inked.any(axis=0))
        assert (x, y) == (columns[0], rows[0])
        assert (x + width, y + height) == (columns[-1] + 1, rows[-1] + 1)


@pytest.mark.parametrize("name", DIGIT_FILES + SHAPE_FILES)
def test_boxes_lie_inside_and_apart(generated: Path, name: str) -> None:
    content = read(generated, name)
    by_image: dict[int, list[list[float]]] = {}
    for annotation in content["annotations"]:
        x, y, width, height = annotation["bbox"]
        assert x >= 0 and y >= 0 and width >= 5 and height >= 5 and x + width <= SIDE and y + height <= SIDE
        assert annotation["area"] == width * height
        by_image.setdefault(annotation["image_id"], []).append([x, y, x + width, y + height])
    for boxes in by_image.values():
        for index, (x1, y1, x2, y2) in enumerate(boxes):
            others = boxes[index + 1 :]
            assert all(x2 <= o[0] or o[2] <= x1 or y2 <= o[1] or o[3] <= y1 for o in others)


def test_no_scan_is_in_two_splits_and_every_digit_is_in_each(generated: Path) -> None:
    used = [{a["source"] for a in read(generated, name)["annotations"]} for name in DIGIT_FILES]
    assert sum(map(len, used)) == len(set.union(*used))
    train = {annotation["category_id"] for annotation in read(generated, DIGIT_FILES[0])["annotations"]}
    assert train == set(range(1, 11))


def test_labels_are_those_of_the_scans(generated: Path) -> None:
    from sklearn.datasets import load_digits

    target = load_digits().target
    for name in DIGIT_FILES:
        content = read(generated, name)
        names = {category["id"]: category["name"] for category in content["categories"]}
        assert all(names[a["category_id"]] == str(target[a["source"]]) for a in content["annotations"])


def test_pretraining_has_other_classes(generated: Path) -> None:
    names = {category["name"] for category in read(generated, SHAPE_FILES[0])["categories"]}
    assert len(names) == 8 and not names & set("0123456789")


def test_counts_empty_pictures_and_licences(generated: Path) -> None:
    content = read(generated, DIGIT_FILES[0])
    counts = {image["id"]: 0 for image in content["images"]}
    for annotation in content["annotations"]:
        counts[annotation["image_id"]] += 1
    assert len(counts) == 40 and max(counts.values()) <= 6 and 0 in counts.values()
    licences = {licence["id"]: licence["name"] for licence in content["licenses"]}
    for image in content["images"]:
        expected = UCI_LICENCE if counts[image["id"]] else GENERATED_LICENCE
        assert licences[image["license"]] == expected["name"]
    shapes = read(generated, SHAPE_FILES[0])
    assert {image["license"] for image in shapes["images"]} == {GENERATED_LICENCE["id"]}


def test_the_unlabelled_list_hides_its_truth(generated: Path) -> None:
    listed, truth = read(generated, "unlabeled/images.json"), read(generated, "unlabeled/hidden_truth.json")
    assert "annotations" not in listed and "categories" not in listed
    assert listed["images"] == truth["images"] and len(truth["annotations"]) > 30


def test_every_listed_picture_is_there(generated: Path) -> None:
    for name in DIGIT_FILES + SHAPE_FILES:
        for image in read(generated, name)["images"]:
            pixels = cv2.imread(str(generated / name.split("/")[0] / "images" / image["file_name"]))
            assert pixels is not None and pixels.shape == (SIDE, SIDE, 3)


def test_ink_stands_out_from_its_background() -> None:
    source = Source(np.arange(5), np.zeros(5, np.int64), digits.digit_drawer(), UCI_LICENCE)
    spread = []
    for seed in range(20):
        pixels, placed = make_picture(source, np.random.default_rng(seed))
        grey = cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY).astype(float)
        for item in placed:
            x, y, width, height = (int(value) for value in item.box_xywh)
            spread.append(np.ptp(cv2.blur(grey, (3, 3))[y : y + height, x : x + width]))
    # blurring thin strokes and texture takes some of the contrast of 70 grey levels away
    assert len(spread) > 30 and min(spread) > 35


def test_the_reader_of_the_pipeline_finds_no_fault(generated: Path) -> None:
    from pipeline_tasks.data.coco import read_coco_folder, read_unlabeled_folder

    target = read_coco_folder(generated / "target", "target")
    assert target.metadata.class_names == digits.DIGIT_NAMES
    assert target.metadata.licences["annotations"] == "CC0-1.0"
    assert sum(target.metadata.licences["images"].values()) == 60
    pretrain = read_coco_folder(generated / "pretrain", "pretrain", ("train", "val"))
    assert pretrain.metadata.class_names == digits.SHAPE_NAMES
    assert len(read_unlabeled_folder(generated / "unlabeled", "unlabeled").images) == 30


def test_an_existing_folder_is_left_alone(tmp_path: Path, repository: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    command = [sys.executable, str(repository / "demo" / "digits.py"), str(tmp_path)]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    assert finished.returncode == 2 and "is not empty; remove it or choose another folder" in finished.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
