"""Every format ends in the same tables, recognised by what lies in the folder."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from foreign_sets import OBJECT, write_objects365, write_picture, write_voc, write_yolo

from pipeline_tasks.data.coco import read_coco_folder
from pipeline_tasks.data.readers import FORMATS, open_reader, read_folder, recognise, recognition
from pipeline_tasks.data.readers.objects365_classes import OBJECTS365_CLASSES
from pipeline_tasks.errors import DataError, UsageError


def boxes_of(raw: Any) -> list[tuple[Any, ...]]:
    names = raw.metadata.class_names
    return [
        (names[b["category"]], *(round(b[k], 6) for k in "xywh"), b["source_record"]) for b in raw.boxes.to_pylist()
    ]


def test_standard_coco_is_read_as_before(coco_folder: Any) -> None:
    reader = open_reader(coco_folder.path)
    assert reader.recognised.format == "coco" and "instances_test.json and 2 more hold" in reader.recognised.reason
    splits = ("train", "val", "test")
    ours, before = reader.read("target", splits), read_coco_folder(coco_folder.path, "target")
    assert ours.images.equals(before.images) and ours.boxes.equals(before.boxes) and ours.metadata == before.metadata
    lenient = reader.read("target")
    assert lenient.images.equals(before.images) and lenient.boxes.equals(before.boxes)


def test_roboflow_coco_export(coco_folder: Any, tmp_path: Path) -> None:
    folder = tmp_path / "export"
    for split, name in (("train", "train"), ("val", "valid"), ("test", "test")):
        (folder / name).mkdir(parents=True)
        shutil.copy(coco_folder.annotation_file(split), folder / name / "_annotations.coco.json")
        for picture in coco_folder.path.glob(f"images/{split}_*.jpg"):
            shutil.copy(picture, folder / name)
    assert "it is a Roboflow export" in recognise(folder).reason
    raw = read_folder(folder, "target", ("train", "val", "test"))
    assert raw.images["path"].to_pylist()[5:7] == ["train/train_5.jpg", "valid/val_0.jpg"]
    assert raw.images["split"].to_pylist() == ["train"] * 6 + ["val"] * 3 + ["test"] * 3
    assert raw.boxes["source_record"][0].as_py() == "train/_annotations.coco.json#/annotations/0"
    assert raw.unlisted_files == () and raw.problems == []


def test_categories_that_differ_are_joined_by_name_or_refused(coco_folder: Any) -> None:
    with coco_folder.edit("val") as content:
        content["categories"] = [{"id": 3, "name": "square"}, {"id": 7, "name": "star"}]
    raw = read_folder(coco_folder.path)
    assert raw.metadata.class_names == ("circle", "square", "star") and raw.metadata.category_ids == (3, 7, 8)
    assert raw.boxes["category"].to_pylist()[12:14] == [1, 2]  # what val calls 3 is a square
    assert {note.rule for note in raw.notes} == {"categories_agree"}
    with pytest.raises(DataError, match="all splits need the same categories"):
        read_folder(coco_folder.path, "target", ("train", "val", "test"))


def test_two_files_of_one_split_are_refused(coco_folder: Any) -> None:
    shutil.copy(coco_folder.annotation_file("val"), coco_folder.path / "annotations/more_val.json")
    (coco_folder.path / "annotations/instances_val.json").rename(coco_folder.path / "annotations/my_val.json")
    for split in ("train", "test"):
        (coco_folder.path / f"annotations/instances_{split}.json").rename(
            coco_folder.path / f"annotations/{split}.json"
        )
    with pytest.raises(DataError, match=r"more_val.json and annotations/my_val.json are both of the split val"):
        read_folder(coco_folder.path)


def test_voc(tmp_path: Path) -> None:
    for stem in ("a", "b", "c"):
        write_picture(tmp_path / f"JPEGImages/{stem}.jpg", seed=ord(stem))
    write_voc(tmp_path, "a", ("dog", 1, 2, 11, 22), ("cat", 5, 5, 6, 6))
    write_voc(tmp_path, "b", ("cat", 0, 0, 48, 32), filename="b")
    (tmp_path / "ImageSets/Main").mkdir(parents=True)
    (tmp_path / "ImageSets/Main/train.txt").write_text("a\n")
    (tmp_path / "ImageSets/Main/val.txt").write_text("b 1\n")
    raw = read_folder(tmp_path)
    assert raw.metadata.class_names == ("cat", "dog") and raw.metadata.category_ids == (1, 2)
    assert boxes_of(raw) == [
        ("dog", 1, 2, 10, 20, "Annotations/a.xml#line=2"),
        ("cat", 5, 5, 1, 1, "Annotations/a.xml#line=3"),
        ("cat", 0, 0, 48, 32, "Annotations/b.xml#line=2"),
    ]
    assert raw.images["path"].to_pylist() == ["JPEGImages/a.jpg", "JPEGImages/b.jpg"]
    assert raw.images["split"].to_pylist() == ["train", "val"]
    assert raw.images["width"].to_pylist() == [48, 48]
    assert raw.unlisted_files == ("JPEGImages/c.jpg",)
    (note,) = raw.notes
    assert note.rule == "file_name_matches" and "<filename>b</filename> does not exist" in note.detail


def test_voc_split_lists_with_blanks_in_names_and_a_byte_order_mark(tmp_path: Path) -> None:
    for stem in ("pic 1", "pic 2", "pic"):
        write_picture(tmp_path / f"JPEGImages/{stem}.jpg", seed=ord(stem[-1]))
        write_voc(tmp_path, stem, ("dog", 1, 2, 11, 22))
    (tmp_path / "ImageSets/Main").mkdir(parents=True)
    (tmp_path / "ImageSets/Main/train.txt").write_text("pic 1\n", encoding="utf-8-sig")
    (tmp_path / "ImageSets/Main/val.txt").write_text("pic 2\n")
    (tmp_path / "ImageSets/Main/test.txt").write_text("pic -1\n")
    images = read_folder(tmp_path).images
    splits = dict(zip(images["path"].to_pylist(), images["split"].to_pylist(), strict=True))
    assert splits == {"JPEGImages/pic 1.jpg": "train", "JPEGImages/pic 2.jpg": "val", "JPEGImages/pic.jpg": "test"}


VOC_FAULTS = [
    ("<object><bndbox/></object>", "has no <name>"),
    ("<object><name>x</name><bndbox><xmin>1</xmin></bndbox></object>", "has no <ymin>"),
    (OBJECT.format(1, "1_0", 3, 4, name="x"), "<ymin> is '1_0', not a number"),
]


@pytest.mark.parametrize(("text", "fault"), VOC_FAULTS)
def test_malformed_voc_object_is_a_row_with_a_fault(tmp_path: Path, text: str, fault: str) -> None:
    write_picture(tmp_path / "JPEGImages/a.jpg", 0)
    write_voc(tmp_path, "a", ("x", 1, 2, 3, 4))
    file = tmp_path / "Annotations/a.xml"
    file.write_text(file.read_text().replace("</annotation>", text + "\n</annotation>"))
    (problem,) = read_folder(tmp_path).problems
    assert (problem.rule, problem.file, problem.record, problem.detail) == (
        "box_record", "Annotations/a.xml", "line=3", fault,
    )  # fmt: skip


def test_damaged_voc_file_takes_only_its_picture_with_it(tmp_path: Path) -> None:
    for stem in ("a", "b"):
        write_picture(tmp_path / f"JPEGImages/{stem}.jpg", ord(stem))
        write_voc(tmp_path, stem, ("x", 1, 2, 3, 4))
    file = tmp_path / "Annotations/b.xml"
    file.write_text(file.read_text()[:-20])
    raw = read_folder(tmp_path)
    (problem,) = raw.problems
    assert problem.rule == "image_record" and problem.detail.startswith("is broken XML at line 2, column 96: unclosed")
    assert len(raw.boxes) == 1 and str(tmp_path) not in problem.detail


def test_yolo(tmp_path: Path) -> None:
    write_yolo(tmp_path, "train/a", "1 0.5 0.5 0.25 0.5\n\n0 0.25 0.25 0.5 0.5 0.75 0.25\n")
    write_yolo(tmp_path, "val/b", "")
    write_yolo(tmp_path, "val/c", None)
    (tmp_path / "data.yaml").write_text("train: ../images/train\nval: /else/where/images/val\nnc: 2\nnames: [x, y]\n")
    raw = read_folder(tmp_path)
    assert recognise(tmp_path).format == "yolo"
    assert raw.metadata.class_names == ("x", "y") and raw.metadata.category_ids == (0, 1)
    assert boxes_of(raw) == [
        ("y", 18, 8, 12, 16, "labels/train/a.txt#line=1"),
        ("x", 12, 8, 24, 8, "labels/train/a.txt#line=3"),  # the box around a triangle
    ]
    assert raw.images["split"].to_pylist() == ["train", "val", "val"]
    assert sorted((note.rule, note.file) for note in raw.notes) == [
        ("label_file_filled", "labels/val/b.txt"),
        ("label_file_present", "images/val/c.jpg"),
    ]


@pytest.mark.parametrize("prefix", ["./images/", "/data/of/another/images/", "..\\images\\"])
def test_yolo_lists_tell_pictures_of_one_name_apart(tmp_path: Path, prefix: str) -> None:
    for part in ("a", "b"):
        for stem in ("1", "2"):
            write_yolo(tmp_path, f"{part}/{stem}", "0 0.5 0.5 0.25 0.5\n")
    (tmp_path / "train.txt").write_text(f"{prefix}a/1.jpg\n{prefix}a/2.jpg\n", encoding="utf-8-sig")
    (tmp_path / "val.txt").write_text(f"{prefix}b/1.jpg\n{prefix}b/2.jpg\n")
    (tmp_path / "data.yaml").write_text("names: [x]\ntrain: train.txt\nval: val.txt\n", encoding="utf-8-sig")
    raw = read_folder(tmp_path)
    assert raw.metadata.class_names == ("x",)
    assert raw.images["path"].to_pylist() == [f"images/{part}/{stem}.jpg" for part in "ab" for stem in "12"]
    assert raw.images["split"].to_pylist() == ["train", "train", "val", "val"]


YOLO_FAULTS = [
    ("dog 0.5 0.5 0.1 0.1", "line begins with 'dog', not with a class number"),
    ("-1 0.5 0.5 0.1 0.1", "line begins with '-1', not with a class number"),
    ("0 0.5 half 0.1 0.1", "line holds 'half', not a number"),
    ("0 0.5 0.5 0.1", "line has 4 numbers; a box has 5, a polygon an odd number from 7 on"),
    ("0 0.5 0.5 0.1 0.1 0.9", "line has 6 numbers"),
]


@pytest.mark.parametrize(("line", "fault"), YOLO_FAULTS)
def test_malformed_yolo_line_is_a_row_with_a_fault(tmp_path: Path, line: str, fault: str) -> None:
    write_yolo(tmp_path, "a", f"0 0.5 0.5 0.1 0.1\n{line}\n")
    (problem,) = read_folder(tmp_path).problems
    assert (problem.rule, problem.file, problem.record) == ("box_record", "labels/a.txt", "line=2")
    assert problem.detail.startswith(fault)


def test_yolo_without_names_labels_without_picture_and_shared_labels(tmp_path: Path) -> None:
    write_yolo(tmp_path, "a", "2 0.5 0.5 0.1 0.1\n")
    write_picture(tmp_path / "images/a.png", 5)
    (tmp_path / "labels/gone.txt").write_text("0 0.5 0.5 0.1 0.1\n")
    (tmp_path / "labels/notes.txt").write_text("a list of nothing\n")
    raw = read_folder(tmp_path)
    assert raw.metadata.class_names == ("class 0", "class 1", "class 2")
    assert "class_names_given" in {note.rule for note in raw.notes}
    assert [p.detail for p in raw.problems] == ["has no picture of its name"]
    assert raw.images["original_id"].to_pylist() == ["labels/a", "labels/a", "labels/gone"]  # two of one id: an error


def test_yolo_boxes_fit_the_upright_picture(tmp_path: Path) -> None:
    from PIL import Image

    exif = Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "images").mkdir()
    Image.new("RGB", (30, 20)).save(tmp_path / "images/a.jpg", exif=exif)
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels/a.txt").write_text("0 0.5 0.5 1 1\n")
    assert boxes_of(read_folder(tmp_path))[0][1:5] == (0, 0, 20, 30)


def test_objects365_with_patches_blanks_and_misspellings(tmp_path: Path) -> None:
    write_objects365(tmp_path, [{"id": 308, "name": "Campel"}, {"id": 79, "name": "Cigar/Cigarette "}])
    reader = open_reader(tmp_path)
    assert reader.recognised.format == "objects365"
    raw = reader.read("pretrain", ("train",))
    assert raw.images["path"].to_pylist() == [
        "train/patch8/objects365_v1_00000001.jpg", "train/patch16/objects365_v2_00000002.jpg",
    ]  # fmt: skip
    assert raw.metadata.class_names == ("Cigar/Cigarette", "Campel")
    assert raw.metadata.licences["annotations"] == "CC BY 4.0"
    assert raw.metadata.licences["images"] == {"Objects365: academic use, not to be distributed": 2}
    assert raw.unlisted_files == ()


@pytest.mark.parametrize("order", [("images", "annotations", "categories"), ("annotations", "images", "categories")])
def test_large_files_are_known_by_their_two_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, order: tuple[str, ...]
) -> None:
    monkeypatch.setattr(recognition, "GLANCE_BYTES", 300)
    write_objects365(tmp_path, [{"id": 1, "name": "Person"}])
    file = tmp_path / "zhiyuan_objv2_train.json"
    content = json.loads(file.read_text())
    for key in ("images", "annotations"):
        content[key] *= 50
    file.write_text(json.dumps({key: content[key] for key in order}))
    assert recognise(tmp_path).format == "objects365"
    file.rename(tmp_path / "train.json")
    assert "lists pictures named objects365_v" in recognise(tmp_path).reason


def test_objects365_releases_are_mapped_by_name(tmp_path: Path) -> None:
    write_objects365(tmp_path, [{"id": 49, "name": "tie"}, {"id": 3, "name": "camel"}], "objects365_v1_train.json")
    raw = read_folder(tmp_path)
    assert dict(zip(raw.metadata.class_names, raw.metadata.category_ids, strict=True)) == {"Campel": 3, "Tie": 49}
    notes = [note.detail for note in raw.notes if note.rule == "objects365_class"]
    assert notes == ["'Campel' has the id 3, 308 in v2; classes are matched by name"]


def test_objects365_class_list(shared: Path) -> None:
    official = json.loads((shared / "data/pretrain_general/objects365/categories.json").read_text())
    assert [one["name"].strip() for one in official] == list(OBJECTS365_CLASSES)


def test_plain_pictures_and_lists_of_images(coco_folder: Any, tmp_path: Path) -> None:
    shutil.copytree(coco_folder.path / "images", tmp_path / "plain/deep/er")
    assert recognise(tmp_path / "plain").reason == "there are 12 pictures and no annotations"
    raw = read_folder(tmp_path / "plain", "unlabeled")
    assert not raw.labelled and raw.images["path"][0].as_py() == "deep/er/test_0.jpg"
    with pytest.raises(DataError, match="plain has no annotations: there are 12 pictures"):
        read_folder(tmp_path / "plain", "target", ("train",))
    labelled = open_reader(coco_folder.path).read_unlabeled("unlabeled")
    assert set(labelled.images["split"].to_pylist()) == {"unlabeled"} and len(labelled.boxes) == 0


def test_set_without_splits_names_the_command_that_makes_them(tmp_path: Path) -> None:
    write_yolo(tmp_path, "a", "0 0.5 0.5 0.1 0.1\n")
    assert set(read_folder(tmp_path).images["split"].to_pylist()) == {"unsplit"}
    with pytest.raises(DataError, match=r"divide it with `nasline data split .* --to DIR`"):
        read_folder(tmp_path, "target", ("train", "val", "test"))


def test_format_may_be_named(tmp_path: Path) -> None:
    write_yolo(tmp_path, "a", "0 0.5 0.5 0.1 0.1\n")
    write_voc(tmp_path, "a", ("x", 1, 2, 3, 4))
    assert recognise(tmp_path).format == "voc" and "it could be read as yolo too" in recognise(tmp_path).reason
    assert open_reader(tmp_path, "yolo").read().metadata.class_names == ("class 0",)
    with pytest.raises(UsageError, match=f"formats are {', '.join(FORMATS)}"):
        open_reader(tmp_path, "yollo")


def test_what_is_no_dataset_is_refused_with_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("nothing")
    with pytest.raises(DataError, match="holds no dataset of a known format; looked for COCO"):
        recognise(tmp_path)
    for name in ("set.zip", "set.tar.gz"):
        (tmp_path / name).write_bytes(b"PK")
        with pytest.raises(DataError, match="is an archive, which is not read; unpack it"):
            recognise(tmp_path / name)


def test_names_that_are_no_text_are_refused(coco_folder: Any) -> None:
    file = os.fsencode(coco_folder.path) + b"/images/gr\xfcn.jpg"
    with open(file, "wb"):
        pass
    with pytest.raises(DataError, match=r"gr\\xfcn.jpg' is no UTF-8 text; rename the file"):
        recognise(coco_folder.path)


def test_links_out_of_the_folder_are_refused(coco_folder: Any, tmp_path: Path) -> None:
    outside = tmp_path / "secret.jpg"
    write_picture(outside, 3)
    link = coco_folder.path / "images/link.jpg"
    link.symlink_to(outside)
    with pytest.raises(DataError, match=r"images/link.jpg is a link to .*secret.jpg, outside of the dataset"):
        recognise(coco_folder.path)
    assert read_folder(coco_folder.path, allow_links=True).unlisted_files == ("images/link.jpg",)
    link.unlink()
    (coco_folder.path / "images/inside.jpg").symlink_to(coco_folder.image("train"))
    (coco_folder.path / "images/loop").symlink_to(coco_folder.path)
    (coco_folder.path / "images/broken.jpg").symlink_to(coco_folder.path / "gone.jpg")
    os.mkfifo(coco_folder.path / "images/pipe.jpg")
    assert read_folder(coco_folder.path).unlisted_files == ("images/inside.jpg",)
    cache = tmp_path / "cache/files/md5/ab" / ("c" * 30)
    write_picture(cache.with_suffix(".jpg"), 4)
    cache.with_suffix(".jpg").rename(cache)
    (coco_folder.path / "images/of_dvc.jpg").symlink_to(cache)  # as `dvc checkout` leaves it
    assert "images/of_dvc.jpg" in read_folder(coco_folder.path).unlisted_files
