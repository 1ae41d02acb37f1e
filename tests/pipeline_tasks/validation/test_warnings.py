"""What the warning rules find, on hand-made rows."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from model.data.near_duplicates import NEAR_BITS
from pipeline_tasks.data.readers import read_folder
from pipeline_tasks.errors import ParameterError
from pipeline_tasks.validate_data import limits_of
from pipeline_tasks.validation import ValidationLimits
from pipeline_tasks.validation.class_checks import edit_distance, likely_misspelt, sizes_of_other_classes
from pipeline_tasks.validation.datasets import judge_set
from pipeline_tasks.validation.images import SizeLimit, inspect_images
from pipeline_tasks.validation.twins import overlapping_boxes, similar_pictures
from pipeline_tasks.validation.warning_rules import ADJUSTABLE
from pipeline_tasks.validation_parameters import ValidateDataParameters


def warnings_of(folder: Path, limits: ValidationLimits | None = None) -> dict[str, list[str]]:
    """Records by rule."""
    judged = judge_set("target", read_folder(folder, "target"), folder, limits or ValidationLimits())
    found: dict[str, list[str]] = {}
    for entry in judged.entries("warning"):
        found.setdefault(entry["rule"], []).append(entry["record"].rpartition("#")[2])
    return found


def test_defaults_of_parameters_and_limits_are_equal() -> None:
    assert limits_of(ValidateDataParameters()) == ValidationLimits()
    assert ValidationLimits().near_duplicate_bits == NEAR_BITS


def test_clean_folder_warns_of_nothing(coco_folder: Any) -> None:
    assert warnings_of(coco_folder.path) == {}


BOXES = [
    ({"bbox": [4, 5, 2.9, 8], "area": 20}, {"box_not_tiny"}),
    ({"bbox": [0, 0, 48, 31.9], "area": 60}, {"box_not_whole_image"}),
    ({"bbox": [5, 5, 10.5, 8.5], "category_id": 7}, {"box_not_repeated"}),
    ({"bbox": [5, 5, 10.5, 8]}, {"box_one_class"}),
    ({"iscrowd": 1}, {"box_no_crowd"}),
    ({"area": 100}, {"box_area"}),
    ({"area": 0}, {"box_area"}),
    ({"area": 84}, set()),
]


@pytest.mark.parametrize(("change", "rules"), BOXES)
def test_odd_boxes(coco_folder: Any, change: dict[str, Any], rules: set[str]) -> None:
    with coco_folder.edit("val") as content:
        content["annotations"][2].update(change)  # a circle at 4, 5, 10.5 x 8; the square beside it begins at 5, 5
    assert set(warnings_of(coco_folder.path)) == rules


def test_overlapping_boxes_are_those_of_all_pairs() -> None:
    generator = np.random.default_rng(0)
    corners = generator.integers(0, 12, (300, 2)).astype(float)
    boxes = np.concatenate([corners, generator.integers(5, 9, (300, 2))], axis=1)
    images = generator.integers(0, 4, 300)
    table = pa.table(
        {"image_id": images, **{n: boxes[:, i] for i, n in enumerate("xywh")}, "iscrowd": generator.random(300) < 0.1}
    )
    wide = np.minimum.outer(boxes[:, 0] + boxes[:, 2], boxes[:, 0] + boxes[:, 2])
    wide -= np.maximum.outer(boxes[:, 0], boxes[:, 0])
    high = np.minimum.outer(boxes[:, 1] + boxes[:, 3], boxes[:, 1] + boxes[:, 3])
    high -= np.maximum.outer(boxes[:, 1], boxes[:, 1])
    common = wide.clip(0) * high.clip(0)
    area = boxes[:, 2] * boxes[:, 3]
    pairs = (common / (area[:, None] + area[None] - common) >= 0.8) & (images[:, None] == images[None])
    crowd = table["iscrowd"].to_numpy()
    pairs &= ~crowd[:, None] & ~crowd[None]
    expected = np.tril(pairs, -1)
    partner = overlapping_boxes(table, 0.8)
    assert ((partner >= 0) == expected.any(axis=1)).all() and expected.any()
    assert all(expected[row, other] for row, other in enumerate(partner) if other >= 0)


@pytest.mark.parametrize(
    ("one", "other", "distance"),
    [("platelets", "platlets", 1), ("abcd", "abdc", 1), ("", "abc", 3), ("kitten", "sitting", 3), ("same", "same", 0)],
)
def test_edit_distance(one: str, other: str, distance: int) -> None:
    assert edit_distance(one, other) == edit_distance(other, one) == distance


CLASSES = [
    (["Platelets", "Platlets", "Platetets", "RBC"], [2, 2, 1, 71], {1: 0, 2: 0}),
    (["traffic light", "Traffic_light"], [900, 3], {1: 0}),
    (["class 10", "class 11"], [900, 1], {}),  # numbered, not misspelt
    (["mouse", "moose"], [900, 800], {}),  # both are common
    (["cat", "car", "cap"], [900, 1, 1], {}),  # too short to tell
    (["starfish", "stafish"], [100, 0], {}),  # no box has it
    (["only"], [5], {}),
]


@pytest.mark.parametrize(("names", "counts", "expected"), CLASSES)
def test_misspelt_classes(names: list[str], counts: list[int], expected: dict[int, int]) -> None:
    assert likely_misspelt(names, counts) == expected


def sized(*sides: tuple[int, float], x: float = 100) -> pa.Table:
    """Square boxes of (category, side)."""
    categories, lengths = zip(*sides, strict=True)
    same = {"x": x, "y": 100.0, "iscrowd": False, "image_width": 1000, "image_height": 1000}
    columns = {name: [value] * len(sides) for name, value in same.items()}
    return pa.table({"category": pa.array(categories, pa.int32()), "w": list(lengths), "h": list(lengths), **columns})


def test_box_of_another_class_size() -> None:
    large, small = [(0, 188.0 + i) for i in range(5)], [(1, 39.0 + i) for i in range(5)]
    table = sized(*large, *small, (0, 40.0), (1, 190.0), (1, 110.0))
    other, usual = sizes_of_other_classes(table, 2.5)
    assert other.tolist() == [-1] * 10 + [1, 0, -1]
    assert usual[10] == pytest.approx(190) and usual[11] == pytest.approx(41.5, abs=1)
    cut_off = sizes_of_other_classes(sized(*large, *small, (0, 40.0), x=0), 2.5)[0]
    assert (cut_off == -1).all()  # at the border a large cell may be seen as a small one
    varied = [(0, float(side)) for side in (20, 50, 100, 200, 400)]
    assert (sizes_of_other_classes(sized(*varied, *small), 2.5)[0] == -1).all()


def test_similar_pictures_are_those_of_all_pairs() -> None:
    generator = np.random.default_rng(1)
    hashes = generator.integers(0, 2**63, 40).astype(np.uint64)
    hashes[20:30] = hashes[:10] ^ np.uint64(0b1011)
    table = pa.table({"perceptual_hash": pa.array(hashes.tolist(), pa.uint64())}).slice(0, 40)
    partner, bits = similar_pictures(table, 8, 100)
    assert partner.tolist() == [-1] * 20 + list(range(10)) + [-1] * 10
    assert bits[20:30].tolist() == [3] * 10
    assert (similar_pictures(table, 2, 100)[0] == -1).all() and (similar_pictures(table, 8, 39)[0] == -1).all()


def test_copies_with_other_boxes(coco_folder: Any) -> None:
    shutil.copy(coco_folder.image("train", 0), coco_folder.image("train", 3))
    assert warnings_of(coco_folder.path) == {"image_not_repeated": ["/images/3"]}
    with coco_folder.edit("train") as content:
        content["annotations"][6]["bbox"][0] += 1
    assert warnings_of(coco_folder.path)["image_boxes_agree"] == ["/images/3"]
    with coco_folder.edit("train") as content:
        content["images"][1]["file_name"] = "train_2.jpg"
    assert warnings_of(coco_folder.path)["image_listed_once"] == ["/images/2"]


def save(path: Path, mode: str, form: str, **options: Any) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (32, 48, 3), np.uint8)
    Image.fromarray(pixels).convert("L" if mode == "I;16" else mode).convert(mode).save(path, form, **options)


PICTURES = [
    ("L", "JPEG", "the picture is greyscale"),
    ("CMYK", "JPEG", "the picture is CMYK"),
    ("RGBA", "PNG", "the picture is RGB with transparency"),
    ("P", "PNG", "the picture is coloured by a palette"),
    ("I;16", "PNG", "the picture is of 16 bits a channel"),
]


@pytest.mark.parametrize(("mode", "form", "detail"), PICTURES)
def test_odd_pictures(coco_folder: Any, mode: str, form: str, detail: str) -> None:
    save(coco_folder.image("train"), mode, form)
    judged = judge_set("target", read_folder(coco_folder.path), coco_folder.path, ValidationLimits())
    found = {entry["rule"]: entry["detail"] for entry in judged.entries("warning")}
    assert found.pop("image_colour") == detail and list(judged.entries("error")) == []
    assert found == ({} if form == "JPEG" else {"image_suffix": "the file is PNG by its content"})


def test_sixteen_bits_that_pillow_cuts_down(tmp_path: Path) -> None:
    import cv2

    cv2.imwrite(str(tmp_path / "deep.png"), np.full((8, 8, 3), 40_000, np.uint16))
    assert inspect_images(tmp_path, ["deep.png"])["mode"].to_pylist() == ["RGB;16"]


def test_rotation_by_exif_is_told_in_the_size_error(coco_folder: Any) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    save(coco_folder.image("train"), "RGB", "JPEG", exif=exif)
    judged = judge_set("target", read_folder(coco_folder.path), coco_folder.path, ValidationLimits())
    details = {entry["rule"]: entry["detail"] for entry in judged.entries("error")}
    assert "before its EXIF orientation turns it" in details["image_size"]
    assert "image_upright" in {entry["rule"] for entry in judged.entries("warning")}


def test_severity_may_be_set(coco_folder: Any) -> None:
    with coco_folder.edit("val") as content:
        content["annotations"][2] |= {"bbox": [4, 5, 2.9, 8], "area": 20}
        content["annotations"][3]["iscrowd"] = 1
    limits = ValidationLimits(severities={"box_not_tiny": "error", "box_no_crowd": "ignore"})
    judged = judge_set("target", read_folder(coco_folder.path), coco_folder.path, limits)
    assert [entry["rule"] for entry in judged.entries("error")] == ["box_not_tiny"]
    assert list(judged.entries("warning")) == [] and (~judged.boxes.good).sum() == 1
    with pytest.raises(ParameterError, match="severities names 'image_decodable', whose severity is fixed"):
        ValidationLimits(severities={"image_decodable": "warning"})
    with pytest.raises(ParameterError, match="must be error, warning or ignore: 'loud'"):
        ValidationLimits(severities={ADJUSTABLE[0]: "loud"})


def test_class_names_that_cannot_be_shown(coco_folder: Any) -> None:
    for split in ("train", "val", "test"):
        with coco_folder.edit(split) as content:
            content["categories"][0]["name"] = "<b>square</b>"
            content["categories"][1]["name"] = "cir\x1bcle"
    assert warnings_of(coco_folder.path) == {"class_name_plain": ["/annotations/0", "/annotations/1"]}


def test_size_limits(tmp_path: Path) -> None:
    save(tmp_path / "a.png", "RGB", "PNG")
    (row,) = inspect_images(tmp_path, ["a.png"], limit=SizeLimit(megapixels=0.001)).to_pylist()
    assert (
        not row["decodable"]
        and "it has 0.0 megapixels, more than the 0.001 of validate_data.maximum_image_mega" in (row["decode_error"])
    )
    (row,) = inspect_images(tmp_path, ["a.png"], limit=SizeLimit(megabytes=0.001)).to_pylist()
    assert (
        not row["decodable"]
        and "MB, more than the 0.001 of validate_data.maximum_image_megabytes" in (row["decode_error"])
    )
