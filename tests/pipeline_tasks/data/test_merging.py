"""`nasline data merge` and `nasline data export`."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from foreign_sets import write_picture

from pipeline_tasks.data.comparison import compare
from pipeline_tasks.data.merging import merge, read_class_map, text
from pipeline_tasks.data.sets import open_set
from pipeline_tasks.data.writers import write_folder
from pipeline_tasks.errors import DataError
from pipeline_tasks.workspace import write_json


def rename(folder: Any, **names: str) -> None:
    for split in ("train", "val", "test"):
        with folder.edit(split) as content:
            for category in content["categories"]:
                category["name"] = names.get(category["name"], category["name"])


def box_counts(folder: Path) -> Counter[str]:
    with open_set(str(folder)) as opened:
        return Counter(opened.class_names[index] for index in opened.raw.boxes["category"].to_pylist())


def test_sets_of_equal_classes_are_joined(make_coco_folder: Any, tmp_path: Path, nasline: Any) -> None:
    one, two = make_coco_folder("one", seed=1), make_coco_folder("two", seed=2)
    shutil.copy(one.image("train", 0), two.image("test", 0))  # the strictest split keeps a picture
    output = nasline("data", "merge", one.path, two.path, "--to", tmp_path / "both", code=0)
    assert "23 images, 46 boxes, 2 classes of 2 sets" in output
    assert "1 pictures are in an earlier set too and were taken once: " in output
    with open_set(str(tmp_path / "both")) as opened:
        assert Counter(opened.raw.images["split"].to_pylist()) == {"train": 11, "val": 6, "test": 6}
        assert opened.raw.problems == []
        assert all((tmp_path / "both" / path).is_file() for path in opened.raw.images["path"].to_pylist())
    assert box_counts(tmp_path / "both") == {"circle": 23, "square": 23}


def test_classes_that_differ_need_a_word(make_coco_folder: Any, tmp_path: Path) -> None:
    one, two = make_coco_folder("one", seed=1), make_coco_folder("two", seed=2)
    rename(two, square="star", circle="Circle")
    with open_set(str(one.path)) as first, open_set(str(two.path)) as second:
        with pytest.raises(DataError, match="have different classes: 'circle', 'square', 'Circle', 'star'; say with"):
            merge([first, second])
        with pytest.raises(DataError, match="no class in common"):
            merge([first, second], "common")
        names = ("circle", "square", "Circle", "star")
        assert merge([first, second], "union").raw.metadata.class_names == names
        merged = merge([first, second], "first", {"Circle": "circle", "star": None})
    assert merged.dropped_boxes == {"star": 12} and merged.partly_labelled == ["square"]
    assert Counter(merged.raw.boxes["category"].to_pylist()) == {0: 24, 1: 12}
    assert merged.raw.boxes["image_id"].to_pylist()[-1] == merged.raw.images["image_id"].to_pylist()[-1] == 23


def test_boxes_of_later_copies_are_counted(coco_folder: Any, tmp_path: Path) -> None:
    later = type(coco_folder)(shutil.copytree(coco_folder.path, tmp_path / "later"))
    with later.edit("val") as content:
        content["annotations"][0]["bbox"][0] += 1
        content["annotations"][1]["category_id"] = 3 if content["annotations"][1]["category_id"] == 7 else 7
        content["annotations"].pop()
    with open_set(str(coco_folder.path)) as one, open_set(str(later.path)) as two:
        same, other = merge([one, one]), merge([one, two])
    assert (len(same.repeated), same.copied_boxes, same.unlike_boxes) == (12, 24, {})
    assert (len(other.repeated), other.copied_boxes) == (12, 23)
    assert other.unlike_boxes == {f"{later.path}/images/val_0.jpg": 2}
    told = text(other, Path("out"))
    assert "left out with them: 23 boxes of the later sets" in told
    assert "2 of them, in 1 pictures, have no equal among the boxes of the earlier set" in told


def test_equal_names_get_numbers_that_no_other_picture_has(tmp_path: Path) -> None:
    for place, names in (("one", ("a", "a_2")), ("two", ("a",))):
        for row, name in enumerate(names):
            write_picture(tmp_path / place / f"images/{name}.jpg", seed=10 * len(names) + row)
        images = [{"id": i, "file_name": f"{n}.jpg", "width": 48, "height": 32} for i, n in enumerate(names)]
        boxes = [{"id": i, "image_id": i, "category_id": 1, "bbox": [1, 1, 5, 5]} for i in range(len(names))]
        content = {"images": images, "annotations": boxes, "categories": [{"id": 1, "name": "c"}]}
        write_json(tmp_path / place / "annotations/instances_train.json", content)
    with open_set(str(tmp_path / "one")) as one, open_set(str(tmp_path / "two")) as two:
        pictures = {path.read_bytes() for path in tmp_path.rglob("*.jpg")}
        merged = merge([one, two])
        write_folder(merged.raw, merged.folders, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out/images").iterdir()) == ["a.jpg", "a_2.jpg", "a_3.jpg"]
    assert {path.read_bytes() for path in (tmp_path / "out/images").iterdir()} == pictures
    with open_set(str(tmp_path / "out")) as out:
        assert len(set(out.raw.images["path"].to_pylist())) == 3


@pytest.mark.parametrize("command", [("export", "--format", "yolo"), ("split",), ("merge",)])
def test_target_below_a_file_is_refused(coco_folder: Any, tmp_path: Path, nasline: Any, command: Any) -> None:
    (tmp_path / "file").touch()
    output = nasline("data", command[0], coco_folder.path, *command[1:], "--to", tmp_path / "file/out", code=2)
    assert f"lies below {tmp_path / 'file'}, which is a file" in output


def test_class_map_that_fits_nothing_is_refused(coco_folder: Any, tmp_path: Path) -> None:
    file = tmp_path / "map.yaml"
    file.write_text("circel: round\n")
    with open_set(str(coco_folder.path)) as opened, pytest.raises(DataError, match="did you mean 'circle'"):
        merge([opened, opened], class_map=read_class_map(file))
    file.write_text("[1, 2]")
    with pytest.raises(DataError, match="must hold lines"):
        read_class_map(file)


@pytest.mark.parametrize("form", ["yolo", "voc", "objects365", "coco"])
def test_export_keeps_pictures_boxes_and_splits(coco_folder: Any, tmp_path: Path, form: str) -> None:
    with open_set(str(coco_folder.path)) as before:
        write_folder(before.raw, before.folder, tmp_path / "out", form)
        with open_set(str(tmp_path / "out")) as after:
            found = compare(before, after)
    assert found.boxes.same == 24 and not (found.added or found.removed or found.changed_splits)


def test_export_tells_what_is_lost_and_refuses_the_rest(coco_folder: Any, tmp_path: Path, nasline: Any) -> None:
    options = ("data", "export", coco_folder.path, "--to", tmp_path / "out", "--format")
    assert "--format pdf cannot be written" in nasline(*options, "pdf", code=2)
    output = nasline(*options, "yolo", code=0)
    assert "12 images, 24 boxes as yolo" in output and "WARNING lost: licences of images (12)" in output
    assert "exists; choose a folder" in nasline(*options, "yolo", code=2)
