from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest

from pipeline_tasks.data.coco import read_coco_folder, read_unlabeled_folder
from pipeline_tasks.errors import DataError


def test_rows_ids_categories_and_licences(coco_folder: Any) -> None:
    raw = read_coco_folder(coco_folder.path, "target")
    images, boxes = raw.images.to_pydict(), raw.boxes.to_pydict()
    assert images["image_id"] == list(range(12))
    assert images["original_id"] == [str(i) for i in range(1, 13)]
    assert images["split"] == ["train"] * 6 + ["val"] * 3 + ["test"] * 3
    assert images["path"][0] == "images/train_0.jpg"
    assert images["licence"][:2] == ["MIT", "CC BY 4.0"]
    assert raw.metadata.class_names == ("circle", "square")  # in the order of the ids 3 and 7
    assert raw.metadata.category_ids == (3, 7)
    assert boxes["category"] == [0, 1] * 12
    assert boxes["image_id"] == [i for i in range(12) for _ in (0, 1)]
    assert [boxes[name][1] for name in "xywh"] == [5, 5, 10.5, 8]
    assert boxes["area"][:2] == [60, 61]
    assert boxes["annotation_id"][0] == "2"
    assert boxes["source_record"][13] == "annotations/instances_val.json#/annotations/1"
    assert raw.metadata.licences == {"images": {"CC BY 4.0": 6, "MIT": 6}, "annotations": "unknown"}
    assert raw.metadata.roots == ("target",)
    assert raw.problems == [] and raw.unlisted_files == ()


def test_ids_may_start_again_in_every_file(coco_folder: Any) -> None:
    for split in ("train", "val", "test"):
        with coco_folder.edit(split) as content:
            first = content["images"][0]["id"]
            for record in content["images"]:
                record["id"] -= first
            for record in content["annotations"]:
                record["image_id"] -= first
    raw = read_coco_folder(coco_folder.path, "target")
    assert raw.images["original_id"].to_pylist()[6] == "0"
    assert raw.boxes["image_id"].to_pylist() == [i for i in range(12) for _ in (0, 1)]


def test_single_licence_is_the_licence_of_the_annotations(coco_folder: Any) -> None:
    for split in ("train", "val", "test"):
        with coco_folder.edit(split) as content:
            content["licenses"] = content["licenses"][:1]
    metadata = read_coco_folder(coco_folder.path, "target").metadata
    assert metadata.licences == {"images": {"CC BY 4.0": 6, "unknown": 6}, "annotations": "CC BY 4.0"}


def test_pictures_in_a_folder_per_split_or_with_their_own_prefix(coco_folder: Any) -> None:
    inner = coco_folder.path / "images/val"
    inner.mkdir()
    coco_folder.image("val", 1).rename(inner / "val_1.jpg")
    with coco_folder.edit("val") as content:
        content["images"][2]["file_name"] = "images/val_2.jpg"
    raw = read_coco_folder(coco_folder.path, "target")
    assert raw.images["path"].to_pylist()[6:9] == ["images/val_0.jpg", "images/val/val_1.jpg", "images/val_2.jpg"]


def test_unlisted_pictures_are_counted(coco_folder: Any) -> None:
    shutil.copy(coco_folder.image("train"), coco_folder.path / "images/extra.jpg")
    (coco_folder.path / "images/notes.txt").write_text("no picture")
    assert read_coco_folder(coco_folder.path, "target").unlisted_files == ("images/extra.jpg",)


IMAGE_FAULTS = [
    ({"file_name": None}, "has no file_name"),
    ({"file_name": 5}, "file_name is a number"),
    ({"file_name": "../../secret.jpg"}, "file_name '../../secret.jpg' leads out of the folder images/"),
    ({"file_name": "/etc/passwd"}, "file_name '/etc/passwd' leads out of the folder images/"),
    ({"width": "48"}, "width '48' is not a whole number from 1 to 1000000"),
    ({"height": 0}, "height 0 is not a whole number from 1 to 1000000"),
    ({"id": [1]}, "id is a list"),
]


@pytest.mark.parametrize(("change", "fault"), IMAGE_FAULTS)
def test_malformed_image_record_is_a_row_with_a_fault(coco_folder: Any, change: dict[str, Any], fault: str) -> None:
    with coco_folder.edit("val") as content:
        content["images"][1].update(change)
    raw = read_coco_folder(coco_folder.path, "target")
    assert len(raw.images) == 12
    (problem,) = raw.problems
    assert problem.detail == fault
    assert (problem.rule, problem.file) == ("image_record", "annotations/instances_val.json")
    assert problem.record == "/images/1"


BOX_FAULTS = [
    ({"bbox": [1, 2, 3]}, "bbox [1, 2, 3] is not a list of four numbers x, y, width, height"),
    ({"bbox": [1, 2, "3", 4]}, "bbox [1, 2, '3', 4] is not a list of four numbers x, y, width, height"),
    ({"bbox": [1, 2, True, 4]}, "bbox [1, 2, True, 4] is not a list of four numbers x, y, width, height"),
    ({"bbox": None}, "has no bbox"),
    ({"category_id": None}, "category_id is null"),
    ({"image_id": 1.5}, "image_id is a number"),
    ({"area": "big"}, "area is text, not a number"),
    ({"iscrowd": 2}, "iscrowd 2 is neither 0 nor 1"),
]


@pytest.mark.parametrize(("change", "fault"), BOX_FAULTS)
def test_malformed_annotation_is_a_row_with_a_fault(coco_folder: Any, change: dict[str, Any], fault: str) -> None:
    with coco_folder.edit("train") as content:
        content["annotations"][3].update(change)
    raw = read_coco_folder(coco_folder.path, "target")
    assert len(raw.boxes) == 24
    (problem,) = raw.problems
    assert problem.detail == fault
    assert (problem.rule, problem.record) == ("box_record", "/annotations/3")


def test_record_that_is_no_object_is_a_row_with_a_fault(coco_folder: Any) -> None:
    with coco_folder.edit("train") as content:
        content["annotations"].append("text")
        content["images"].append(None)
    raw = read_coco_folder(coco_folder.path, "target")
    assert [p.detail for p in raw.problems] == ["is null, not an object", "is text, not an object"]


def test_unknown_image_and_category_and_odd_numbers_are_kept(coco_folder: Any) -> None:
    with coco_folder.edit("train") as content:
        content["annotations"][0]["image_id"] = 7  # an image of the validation file
        content["annotations"][1]["category_id"] = 4
        content["annotations"][2]["bbox"] = [math.nan, 1, math.inf, 10**400]
    boxes = read_coco_folder(coco_folder.path, "target").boxes.to_pylist()
    assert boxes[0]["image_id"] is None and boxes[0]["image_reference"] == "7"
    assert boxes[1]["category"] is None and boxes[1]["category_reference"] == "4"
    assert math.isnan(boxes[2]["x"]) and boxes[2]["w"] == boxes[2]["h"] == math.inf


def damage(folder: Any, how: str) -> None:
    """One thing that makes the whole folder unusable."""
    file = folder.annotation_file("train")
    if how == "missing file":
        file.unlink()
    elif how == "broken json":
        file.write_text(file.read_text()[:100])
    elif how == "no images folder":
        shutil.rmtree(folder.path / "images")
    else:
        with folder.edit("train") as content:
            if how == "missing key":
                del content["categories"]
            elif how == "empty split":
                content["images"] = content["annotations"] = []
            elif how == "no boxes":
                content["annotations"] = []
            elif how == "two names":
                content["categories"][0]["name"] = "circle"
            elif how == "same id":
                content["categories"][0]["id"] = 3
            elif how == "other classes":
                content["categories"][0]["name"] = "triangle"
            elif how == "no categories":
                content["categories"] = []
            elif how == "text id":
                content["categories"][0]["id"] = "7"


@pytest.mark.parametrize(
    ("how", "sentence"),
    [
        ("missing file", r"instances_train.json does not exist; a labelled set needs images/"),
        ("broken json", r"instances_train.json, line 1, column 101: broken JSON \(.*\); repair or export"),
        ("no images folder", r"target has no folder images/"),
        ("missing key", r"instances_train.json has no 'categories'"),
        ("empty split", r"instances_train.json lists no images; the split train must not be empty"),
        ("no boxes", r"instances_train.json lists 6 images but no boxes; training needs some"),
        ("two names", r"categories 7 and 3 are both named 'circle'"),
        ("same id", r"categories\[1\]: id 3 is given twice"),
        ("other classes", r"instances_val.json: category 7 is 'square', but 'triangle' in annotations/instances_train"),
        ("no categories", r"'categories' is empty"),
        ("text id", r"categories\[0\]: id '7' must be a whole number"),
    ],
)
def test_unusable_folder_is_refused_with_one_sentence(coco_folder: Any, how: str, sentence: str) -> None:
    damage(coco_folder, how)
    with pytest.raises(DataError, match=sentence) as refusal:
        read_coco_folder(coco_folder.path, "target")
    assert refusal.value.exit_code == 65
    assert "\n" not in str(refusal.value)


def test_missing_folder_tells_how_to_pull_it(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nothing is not a folder; give the folder of a dataset"):
        read_coco_folder(tmp_path / "nothing", "target")
    (tmp_path / "nothing.dvc").write_text("outs: []")
    with pytest.raises(DataError, match=r"run `dvc pull .*nothing.dvc`"):
        read_coco_folder(tmp_path / "nothing", "target")


def test_split_that_is_not_required_may_be_missing(coco_folder: Any) -> None:
    coco_folder.annotation_file("test").unlink()
    raw = read_coco_folder(coco_folder.path, "pretrain", ("train",))
    assert set(raw.images["split"].to_pylist()) == {"train", "val"}


def test_unlabelled_folder_with_and_without_records(coco_folder: Any) -> None:
    folder = coco_folder.path
    plain = read_unlabeled_folder(folder, "unlabeled")
    assert plain.images["path"].to_pylist()[:2] == ["images/test_0.jpg", "images/test_1.jpg"]
    assert plain.images["width"].null_count == 12 and len(plain.boxes) == 0 and not plain.labelled
    assert plain.metadata.licences == {"images": {"unknown": 12}, "annotations": "none"}
    content = json.loads(coco_folder.annotation_file("train").read_text())
    records = {key: content[key] for key in ("info", "licenses", "images")}
    (folder / "images.json").write_text(json.dumps(records))
    listed = read_unlabeled_folder(folder, "unlabeled")
    assert listed.metadata.licences["images"] == {"CC BY 4.0": 3, "MIT": 3}
    assert set(listed.images["split"].to_pylist()) == {"unlabeled"}
    assert len(listed.unlisted_files) == 6


def test_unlabelled_folder_without_pictures_is_refused(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    with pytest.raises(DataError, match="holds no images"):
        read_unlabeled_folder(tmp_path, "unlabeled")


@pytest.mark.parametrize(
    ("name", "images", "boxes", "classes"),
    [
        ("bccd", 364, 4886, 3),
        ("aquarium", 638, 4814, 7),
        ("playing_cards", 362, 667, 6),
        ("pretrain_general", 462, 3812, 80),
    ],
)
def test_real_sets(shared: Path, name: str, images: int, boxes: int, classes: int) -> None:
    raw = read_coco_folder(shared / "data" / name, name)
    assert (len(raw.images), len(raw.boxes), len(raw.metadata.class_names)) == (images, boxes, classes)
    assert raw.problems == [] and raw.unlisted_files == ()


def test_licences_of_coco_images_keep_their_names(shared: Path) -> None:
    licences = read_coco_folder(shared / "data/pretrain_general", "pretrain").metadata.licences
    assert licences["images"]["Attribution-NonCommercial-ShareAlike License"] == 155
    assert licences["annotations"] == "unknown"  # the file lists eight licences, all of images


@pytest.mark.parametrize("name", ["", None])
def test_licence_without_a_name_is_unknown(coco_folder: Any, name: str | None) -> None:
    """As CVAT and labelme write it."""
    for split in ("train", "val", "test"):
        with coco_folder.edit(split) as content:
            content["licenses"] = [{"id": 0, "name": name, "url": name}]
            for image in content["images"]:
                image["license"] = 0
    assert read_coco_folder(coco_folder.path, "target").metadata.licences["images"] == {"unknown": 12}


@pytest.mark.parametrize("where", ["images", "categories"])
def test_half_a_surrogate_pair_is_told_with_its_file(coco_folder: Any, where: str) -> None:
    with coco_folder.edit("val") as content:
        content[where][0]["file_name" if where == "images" else "name"] = "\ud800"
    with pytest.raises(DataError, match=r"instances_val.json: '\\ud800' is no Unicode text"):
        read_coco_folder(coco_folder.path, "target")
