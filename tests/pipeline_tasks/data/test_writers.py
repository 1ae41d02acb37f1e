"""A set is the same after it went through another format; what the format cannot hold is told."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from foreign_sets import write_picture

from pipeline_tasks.data.raw import RawDataset
from pipeline_tasks.data.readers import read_folder, recognise
from pipeline_tasks.data.writers import WRITABLE, write_folder
from pipeline_tasks.errors import DataError, UsageError

SPLITS = ("train", "val", "test")
TOLERANCE_PX = 1e-3


def by_name(raw: RawDataset) -> dict[str, tuple[str, list[str], np.ndarray[Any, Any]]]:
    """Split, class names and boxes (n, 4) of each picture by its file name."""
    found: dict[int, list[tuple[str, list[float]]]] = {}
    for box in raw.boxes.to_pylist():
        entry = raw.metadata.class_names[box["category"]], [box[side] for side in "xywh"]
        found.setdefault(box["image_id"], []).append(entry)
    return {
        Path(row["path"]).name: (
            row["split"],
            [name for name, _ in found.get(row["image_id"], [])],
            np.array([numbers for _, numbers in found.get(row["image_id"], [])]).reshape(-1, 4),
        )
        for row in raw.images.to_pylist()
    }


def assert_same(before: RawDataset, after: RawDataset) -> None:
    one, other = by_name(before), by_name(after)
    assert one.keys() == other.keys()
    for name in one:
        assert one[name][:2] == other[name][:2], name
        assert np.abs(one[name][2] - other[name][2]).max(initial=0) <= TOLERANCE_PX, name


@pytest.mark.parametrize("form", WRITABLE)
def test_bccd_there_and_back(shared: Path, tmp_path: Path, form: str) -> None:
    folder = shared / "data/bccd"
    before = read_folder(folder, "target", SPLITS)
    there = write_folder(before, folder, tmp_path / form, form)
    assert (there.images, there.boxes) == (364, 4886)
    assert recognise(there.folder).format == form
    between = read_folder(there.folder, "target", SPLITS)
    back = write_folder(between, there.folder, tmp_path / "back")
    after = read_folder(back.folder, "target", SPLITS)
    assert_same(before, after)
    assert after.metadata.class_names == before.metadata.class_names
    names = {path.name: path.read_bytes() for path in (folder / "images").iterdir()}
    assert {path.name: path.read_bytes() for path in (back.folder / "images").iterdir()} == names
    if form in ("coco", "objects365"):
        assert there.lost == () and after.metadata.licences == before.metadata.licences
        assert after.boxes["annotation_id"].to_pylist() == before.boxes["annotation_id"].to_pylist()
        assert after.metadata.category_ids == before.metadata.category_ids


@pytest.mark.parametrize("form", ["yolo", "voc"])
def test_what_plain_boxes_cannot_hold_is_told(coco_folder: Any, tmp_path: Path, form: str) -> None:
    with coco_folder.edit("train") as content:
        content["annotations"][0]["iscrowd"] = 1
        content["annotations"][1]["bbox"] = [1]
        content["categories"].append({"id": 9, "name": "never"})
    for split in ("val", "test"):
        with coco_folder.edit(split) as content:
            content["categories"].append({"id": 9, "name": "never"})
    written = write_folder(read_folder(coco_folder.path), coco_folder.path, tmp_path / "out", form)
    lost = {one.what: (one.count, one.example) for one in written.lost}
    assert lost["malformed annotations"] == (1, "annotations/instances_train.json#/annotations/1")
    assert lost["crowd regions (annotations left out)"] == (1, "2")
    assert lost["areas of annotations other than width times height"][0] == 23
    assert lost["licences of images"][0] == 12 and lost["annotation ids"][0] == 23 and lost["image ids"][0] == 12
    assert lost["category ids"][0] == 3 and lost["source"][0] == 1
    assert ("classes without boxes" in lost) == (form == "voc")
    assert len(read_folder(written.folder).boxes) == 22


def test_pictures_of_one_name_stay_apart(tmp_path: Path) -> None:
    names = ("images/a/x.jpg", "images/b/x.jpg", "images/a/x.png", "images/a__x.jpg", "images/a__x_2.jpg")
    images = [{"id": i, "file_name": n[7:], "width": 48, "height": 32} for i, n in enumerate(names)]
    boxes = [{"id": i, "image_id": i, "category_id": 1, "bbox": [i, i, 5, 5]} for i in range(5)]
    for row, name in enumerate(names):
        write_picture(tmp_path / "set" / name, row)
    content = {"images": images, "annotations": boxes, "categories": [{"id": 1, "name": "c"}]}
    (tmp_path / "set/train.json").write_text(json.dumps(content))
    before = read_folder(tmp_path / "set")
    for form in WRITABLE:
        written = write_folder(before, tmp_path / "set", tmp_path / form, form)
        after = read_folder(written.folder)
        assert len(set(after.images["path"].to_pylist())) == 5
        assert sorted(after.boxes["x"].to_pylist()) == pytest.approx([0, 1, 2, 3, 4], abs=TOLERANCE_PX)
        assert any("file names" in lost.what for lost in written.lost) == (form in ("yolo", "voc"))


def test_splits_and_several_sources_come_from_the_columns(
    coco_folder: Any, make_coco_folder: Any, tmp_path: Path
) -> None:
    other = make_coco_folder("other", 1)
    raw = read_folder(coco_folder.path)
    images = raw.images.set_column(5, "split", pa.array(["val"] * 12)).append_column(
        "root", pa.array([0] * 6 + [1] * 6, pa.int32())
    )
    mixed = RawDataset(images, raw.boxes, raw.metadata)
    written = write_folder(mixed, {0: coco_folder.path, 1: other.path}, tmp_path / "out")
    assert (written.folder / "images/val_0.jpg").read_bytes() == other.image("val").read_bytes()
    assert [file.name for file in (written.folder / "annotations").iterdir()] == ["instances_val.json"]


def test_unlabelled_sets_become_image_lists(shared: Path, tmp_path: Path) -> None:
    folder = shared / "data/unlabeled_general"
    before = read_folder(folder)
    written = write_folder(before, folder, tmp_path / "out")
    after = read_folder(written.folder)
    assert recognise(written.folder).format == "coco-images" and not after.labelled
    assert after.metadata.licences == before.metadata.licences
    with pytest.raises(DataError, match="no classes and no boxes, which yolo cannot tell from missing labels"):
        write_folder(before, folder, tmp_path / "yolo", "yolo")


def test_unlabelled_pictures_of_several_splits_are_in_one_list(tmp_path: Path) -> None:
    for row in range(3):
        write_picture(tmp_path / f"set/{row}.jpg", row)
    raw = read_folder(tmp_path / "set")
    place = raw.images.schema.get_field_index("split")
    split = replace(raw, images=raw.images.set_column(place, "split", pa.array(["train", "val", "test"])))
    written = write_folder(split, tmp_path / "set", tmp_path / "out")
    assert len(read_folder(written.folder).images) == 3


def test_yolo_cannot_hold_that_a_set_has_no_splits(tmp_path: Path) -> None:
    write_picture(tmp_path / "set/a.jpg", 0)
    (tmp_path / "set/a.txt").write_text("0 0.5 0.5 0.25 0.5\n")
    written = write_folder(read_folder(tmp_path / "set"), tmp_path / "set", tmp_path / "out", "yolo")
    assert [str(lost) for lost in written.lost] == [
        "lost: that the set has no splits (data.yaml calls all of it train) (1)"
    ]
    assert read_folder(tmp_path / "out").images["split"].to_pylist() == ["train"]


def test_nothing_half_written_is_left(coco_folder: Any, tmp_path: Path) -> None:
    raw = read_folder(coco_folder.path)
    coco_folder.image("test", 2).unlink()
    with pytest.raises(DataError, match=r"test_2.jpg does not exist, but annotations/instances_test.json#/images/2"):
        write_folder(raw, coco_folder.path, tmp_path / "out")
    with coco_folder.edit("train") as content:
        content["categories"][0]["name"] = "bell\x07"
    for split in ("val", "test"):
        with coco_folder.edit(split) as content:
            content["categories"][0]["name"] = "bell\x07"
    coco_folder.image("test", 2).write_bytes(coco_folder.image("test", 1).read_bytes())
    with pytest.raises(DataError, match=r"the class name 'bell\\x07' cannot be written to XML"):
        write_folder(read_folder(coco_folder.path), coco_folder.path, tmp_path / "out", "voc")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))
    with pytest.raises(UsageError, match="formats are coco, yolo, voc, objects365"):
        write_folder(raw, coco_folder.path, tmp_path / "out", "tfrecord")
    with pytest.raises(UsageError, match="exists; choose a folder that does not"):
        write_folder(raw, coco_folder.path, coco_folder.path)
