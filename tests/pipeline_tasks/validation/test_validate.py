"""`validate` as a whole: what is published, what is quarantined, and the sentence it stops with."""

from __future__ import annotations

import csv
import json
import logging
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from model.data.tables import read_dataset
from pipeline_tasks.data.coco import read_coco_folder, read_unlabeled_folder
from pipeline_tasks.errors import DataError, ParameterError
from pipeline_tasks.images import make_open_image
from pipeline_tasks.validation import ValidationLimits, ValidationResult, validate

LENIENT = ValidationLimits(maximum_bad_images_fraction=0.5, maximum_bad_boxes_fraction=0.5)
STRICT = ValidationLimits()


def run(
    output: Path, target: Any, pretrain: Any = None, unlabeled: Any = None, limits: ValidationLimits = LENIENT
) -> ValidationResult:
    raw = {"target": read_coco_folder(target.path, "target")}
    roots = {"target": target.path}
    if pretrain is not None:
        raw["pretrain"], roots["pretrain"] = read_coco_folder(pretrain.path, "pretrain", ("train",)), pretrain.path
    if unlabeled is not None:
        raw["unlabeled"], roots["unlabeled"] = read_unlabeled_folder(unlabeled.path, "unlabeled"), unlabeled.path
    return validate(raw, roots, limits, output)


def quarantine(output: Path) -> list[dict[str, str]]:
    lines = (output / "quarantine.jsonl").read_text().splitlines()
    entries = [json.loads(line) for line in lines]
    with (output / "quarantine.csv").open(newline="") as sheet:
        assert list(csv.DictReader(sheet)) == entries
    return entries


def files(output: Path) -> dict[str, bytes]:
    return {p.relative_to(output).as_posix(): p.read_bytes() for p in sorted(output.rglob("*")) if p.is_file()}


def test_clean_sets_are_published_whole(make_coco_folder: Callable[..., Any], tmp_path: Path) -> None:
    sets = [make_coco_folder(name, seed) for seed, name in enumerate(("target", "pretrain", "unlabeled"))]
    output = tmp_path / "output"
    result = run(output, *sets, limits=STRICT)
    assert quarantine(output) == []
    dataset = read_dataset(output / "target")
    train = dataset.split("train")
    assert len(train) == 6 and train.path(0) == "target/images/train_0.jpg" and train.sha256(0) is not None
    assert train.boxes(0).boxes_xyxy.tolist() == [[4, 5, 14.5, 13], [5, 5, 15.5, 13]]
    assert make_open_image({"target": sets[0].path})(train.path(0)).shape == (32, 48, 3)
    unlabeled = read_dataset(output / "unlabeled").split("unlabeled")
    assert len(unlabeled) == 12 and unlabeled.size(0) == (48, 32)
    assert result.summary()["target"]["images"] == 12
    assert result.summary()["pretrain"]["train"] == {
        "images": 6, "boxes": 12, "images_without_boxes": 0, "imbalance_ratio": 1.0,
    }  # fmt: skip


def test_report_has_balance_licences_statistics_and_digests(coco_folder: Any, tmp_path: Path) -> None:
    with coco_folder.edit("train") as content:
        for box in content["annotations"][2:]:
            box["category_id"] = 7
        content["annotations"][2]["iscrowd"] = 1
        content["annotations"] = [box for box in content["annotations"] if box["image_id"] != 6]
    shutil.copy(coco_folder.image("train", 1), coco_folder.image("train", 2))
    output = tmp_path / "output"
    run(output, coco_folder)
    report = json.loads((output / "validation.json").read_text())
    target = report["sets"]["target"]
    assert report["passed"] is True and report["violations"] == []
    assert target["splits"]["train"] == {
        "images": 6, "boxes": 10, "crowd_boxes": 1, "images_without_boxes": 1,
        "quarantined_images": 0, "quarantined_boxes": 0,
    }  # fmt: skip
    balance = target["class_balance"]
    assert balance["boxes"] == {
        "circle": {"test": 3, "train": 1, "val": 3},
        "square": {"test": 3, "train": 8, "val": 3},
    }
    assert balance["imbalance_ratio"] == {"test": 1, "train": 8, "val": 1}
    assert target["repeated_images_within_a_split"] == 1
    assert target["licences"] == {"images": {"CC BY 4.0": 6, "MIT": 6}, "annotations": "unknown"}
    assert set(target["tables"]) == {"images.parquet", "boxes.parquet", "dataset.json"}
    suites = report["great_expectations"]["suites"]
    assert set(suites) == {"target_images", "target_boxes"}
    assert suites["target_boxes"]["statistics"]["evaluated_expectations"] == 9  # the crowd region is a warning
    assert target["warnings"] == {"box_no_crowd": 1, "image_not_repeated": 1}
    assert report["great_expectations"]["version"].startswith("1.")


def test_equal_input_gives_equal_bytes(coco_folder: Any, tmp_path: Path) -> None:
    copy = tmp_path / "elsewhere" / "renamed"
    shutil.copytree(coco_folder.path, copy)
    run(tmp_path / "one", coco_folder)
    run(tmp_path / "two", type(coco_folder)(copy))
    one, two = files(tmp_path / "one"), files(tmp_path / "two")
    same = {name for name in one if not name.startswith("data_docs/")}  # only the docs tell when they were made
    assert {"target/images.parquet", "target/boxes.parquet", "target/dataset.json", "validation.json"} <= same
    assert {name: one[name] for name in same} == {name: two[name] for name in same}
    for name, content in one.items():
        assert str(tmp_path).encode() not in content, name


def test_bad_rows_are_quarantined_with_file_reason_and_remedy(coco_folder: Any, tmp_path: Path) -> None:
    coco_folder.image("train", 0).unlink()
    with coco_folder.edit("train") as content:
        content["annotations"][2]["bbox"] = [46.5, 5, 40, 3]
        content["annotations"][4]["bbox"] = [-0.5, 5, 10, 27.5]  # half a pixel over two borders: clipped, kept
    output = tmp_path / "output"
    result = run(output, coco_folder)
    image, box = quarantine(output)
    assert image == {
        "role": "target", "split": "train", "kind": "image", "file": "images/train_0.jpg",
        "record": "annotations/instances_train.json#/images/0", "rule": "image_file_present",
        "detail": "the file does not exist", "remedy": "add the file or remove its record",
    }  # fmt: skip
    assert box["rule"] == "box_inside_image" and box["file"] == "images/train_1.jpg"
    assert "reaches 38.5 pixels over the border of the 48x32 image" in box["detail"]
    dataset = read_dataset(output / "target")
    train = dataset.split("train")
    assert len(train) == 5 and dataset.metadata.quarantined == {"train": 1}
    assert len(train.boxes(0)) == 1
    assert train.boxes(1).boxes_xyxy[0].tolist() == [0, 5, 9.5, 32]
    assert train.boxes(1).area[0] == 60  # as annotated
    described = result.report["sets"]["target"]
    assert described["boxes_left_out_with_their_image"] == 2 and described["clipped_boxes"] == 1
    assert result.roles["target"].quarantined_boxes == 1
    assert described["licences"]["images"] == {"CC BY 4.0": 6, "MIT": 5}


def missing_file(folder: Any) -> None:
    folder.image("train", 2).unlink()


def truncated_jpeg(folder: Any) -> None:
    picture = folder.image("val", 1)
    picture.write_bytes(picture.read_bytes()[:-40])


def wrong_size(folder: Any) -> None:
    with folder.edit("val") as content:
        content["images"][0]["height"] = 31


def box_outside(folder: Any) -> None:
    with folder.edit("train") as content:
        content["annotations"][3]["bbox"] = [40, 2, 20, 4]


def box_without_area(folder: Any) -> None:
    with folder.edit("test") as content:
        content["annotations"][3]["bbox"][2] = 0


def unknown_category(folder: Any) -> None:
    with folder.edit("train") as content:
        content["annotations"][3]["category_id"] = 5


def unknown_image(folder: Any) -> None:
    with folder.edit("train") as content:
        content["annotations"][3]["image_id"] = 500


def no_file_name(folder: Any) -> None:
    with folder.edit("train") as content:
        del content["images"][1]["file_name"]


def two_splits(folder: Any) -> None:
    shutil.copy(folder.image("val", 0), folder.image("train", 4))


ONE_IMAGE, ONE_BOX = "1 of 12 images (8.33 %, 1 % allowed)", "1 of 24 boxes (4.17 %, 1 % allowed)"
BAD_INPUT = [
    (missing_file, "image_file_present", "images/train_2.jpg (the file does not exist, annotations/instances_train.json"
     "#/images/2); add the file or remove its record, or raise validate_data.maximum_bad_image_fraction"),
    (truncated_jpeg, "image_decodable", "images/val_1.jpg (the file cannot be decoded: image file is truncated"),
    (wrong_size, "image_size", "images/val_0.jpg (recorded as 48x31, the picture is 48x32"),
    (box_outside, "box_inside_image", "images/train_1.jpg (annotation 5 (x 40, y 2, width 20, height 4) reaches 12 "
     "pixels over the border of the 48x32 image"),
    (box_without_area, "box_positive_area", "images/test_1.jpg (annotation 23 has width 0 and height 8"),
    (unknown_category, "box_category_known", "images/train_1.jpg (annotation 5 has category id 5, which is not"),
    (unknown_image, "box_image_known", "annotations/instances_train.json (annotation 5 belongs to image id 500"),
    (no_file_name, "image_record", "annotations/instances_train.json (the record has no file_name"),
    (two_splits, "image_in_one_split", "images/train_4.jpg (the same picture is in the split val, which keeps it"),
]  # fmt: skip


@pytest.mark.parametrize(("damage", "rule", "found"), BAD_INPUT, ids=lambda value: getattr(value, "__name__", ""))
def test_bad_input_stops_with_one_sentence_and_publishes_nothing(
    coco_folder: Any, tmp_path: Path, damage: Callable[[Any], None], rule: str, found: str
) -> None:
    share = ONE_IMAGE if rule.startswith("image") else ONE_BOX
    sentence = f"target: the rule {rule} is broken by {share}: {found}"
    damage(coco_folder)
    output = tmp_path / "output"
    with pytest.raises(DataError) as refusal:
        run(output, coco_folder, limits=STRICT)
    assert str(refusal.value).startswith(sentence) and "\n" not in str(refusal.value)
    assert refusal.value.exit_code == 65
    assert not list(output.rglob("*.parquet")) and not list(output.rglob("dataset.json"))
    report = json.loads((output / "validation.json").read_text())
    assert report["passed"] is False and report["sets"]["target"]["tables"] == {}
    assert sentence in report["violations"][0]
    assert len(quarantine(output)) >= 1


def test_test_images_leaked_into_training_stop_even_lenient_limits(coco_folder: Any, tmp_path: Path) -> None:
    shutil.copy(coco_folder.image("test", 0), coco_folder.image("train", 0))
    with pytest.raises(DataError, match=r"measured accuracy too good \(1, 0 allowed\): images/train_0.jpg"):
        run(tmp_path / "output", coco_folder, limits=LENIENT)
    limits = ValidationLimits(maximum_bad_images_fraction=0.5, maximum_target_test_leaks=1)
    run(tmp_path / "output", coco_folder, limits=limits)
    dataset = read_dataset(tmp_path / "output/target")
    assert dataset.metadata.quarantined == {"train": 1}  # the test split keeps its picture
    assert len(dataset.split("test")) == 3


def test_target_test_images_are_left_out_of_the_other_sets(
    make_coco_folder: Callable[..., Any], tmp_path: Path
) -> None:
    target, pretrain, unlabeled = (make_coco_folder(n, s) for s, n in enumerate(("target", "pretrain", "unlabeled")))
    shutil.copy(target.image("test", 1), pretrain.image("train", 3))
    shutil.copy(target.image("test", 2), unlabeled.path / "images/other name.jpg")
    shutil.copy(target.image("val", 0), unlabeled.path / "images/validation.jpg")  # only test images must not be seen
    output = tmp_path / "output"
    run(output, target, pretrain, unlabeled, STRICT)  # no defect of these sets: their limits do not count it
    entries = quarantine(output)
    assert [(e["role"], e["file"], e["rule"]) for e in entries] == [
        ("pretrain", "images/train_3.jpg", "no_target_test_image"),
        ("unlabeled", "images/other name.jpg", "no_target_test_image"),
    ]
    assert "images/test_1.jpg" in entries[0]["detail"]
    assert read_dataset(output / "pretrain").metadata.quarantined == {"train": 1}
    assert len(read_dataset(output / "unlabeled").image_set()) == 13


def test_set_that_only_holds_target_test_images_is_refused(
    make_coco_folder: Callable[..., Any], tmp_path: Path
) -> None:
    target = make_coco_folder()
    unlabeled = make_coco_folder("unlabeled", 1, train=1, val=0, test=0)
    shutil.copy(target.image("test"), unlabeled.image("train"))
    with pytest.raises(DataError, match="unlabeled: the split unlabeled has no images left after the quarantine"):
        run(tmp_path / "output", target, unlabeled=unlabeled)


def test_split_that_loses_all_its_boxes_is_refused(coco_folder: Any, tmp_path: Path) -> None:
    with coco_folder.edit("test") as content:
        for box in content["annotations"]:
            box["bbox"][2] = -1
    with pytest.raises(DataError, match=r"target: the split test has no boxes left after the quarantine"):
        run(tmp_path / "output", coco_folder, limits=LENIENT)


def test_many_small_defects_add_up(coco_folder: Any, tmp_path: Path) -> None:
    missing_file(coco_folder)
    truncated_jpeg(coco_folder)
    limits = ValidationLimits(maximum_bad_images_fraction=0.1)  # each rule is broken by 8 %
    with pytest.raises(
        DataError, match=r"image_decodable \(1\) together are broken by 2 of 12 images \(16.7 %, 10 % a"
    ):
        run(tmp_path / "output", coco_folder, limits=limits)


def test_limit_of_a_single_rule(coco_folder: Any, tmp_path: Path) -> None:
    missing_file(coco_folder)
    limits = ValidationLimits(maximum_bad_images_fraction=0.5, rule_fractions={"image_file_present": 0})
    with pytest.raises(DataError, match=r"or raise validate_data\.rule_fractions\.image_file_present"):
        run(tmp_path / "output", coco_folder, limits=limits)


def test_several_limits_are_told_in_one_sentence(coco_folder: Any, tmp_path: Path) -> None:
    for index in range(6):
        coco_folder.image("train", index).unlink()
    box_without_area(coco_folder)
    with pytest.raises(DataError) as refusal:
        run(tmp_path / "output", coco_folder, limits=STRICT)
    assert "; and 3 more;" in str(refusal.value)
    assert str(refusal.value).endswith("(other limits exceeded: 1)")


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        (
            {"maximum_bad_images_fraction": 1.5},
            "validate_data.maximum_bad_image_fraction must lie between 0 and 1, got 1.5",
        ),
        ({"maximum_bad_boxes_fraction": float("nan")}, "maximum_bad_box_fraction must lie between 0 and 1, got nan"),
        ({"box_tolerance_pixels": -1}, "box_tolerance_pixels must not be negative, got -1"),
        ({"rule_fractions": {"image_missing": 0.1}}, "unknown rule 'image_missing'; rules are image_record, "),
    ],
)
def test_limits_are_checked(values: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ParameterError, match=sentence):
        ValidationLimits(**values)


def test_nothing_is_left_behind_and_nothing_is_printed(
    coco_folder: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    with caplog.at_level(logging.INFO):
        run(tmp_path / "output", coco_folder)
    assert list(scratch.iterdir()) == []
    assert capfd.readouterr() == ("", "")
    assert {record.name.split(".")[0] for record in caplog.records} == {"pipeline_tasks"}
    assert tempfile.tempdir == str(scratch)


def test_imports_wait_until_they_are_needed(tmp_path: Path) -> None:
    statement = "import sys, pipeline_tasks.validation, pipeline_tasks.data.versioning; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", statement], capture_output=True, text=True, check=True, cwd=tmp_path)
    loaded = {name.split(".")[0] for name in done.stdout.split()}
    assert not loaded & {"great_expectations", "dvc", "pandas", "torch", "mlflow"} and done.stderr == ""
    assert list(tmp_path.iterdir()) == []


def test_docs_need_no_network_and_show_the_findings(coco_folder: Any, tmp_path: Path) -> None:
    with coco_folder.edit("train") as content:
        content["info"]["description"] = "<script>alert(1)</script>"
    box_outside(coco_folder)
    run(tmp_path / "output", coco_folder)
    docs = tmp_path / "output/data_docs"
    pages = list(docs.rglob("*.html"))
    assert len(pages) == 5  # the first page; for images and boxes a result and a suite
    for page in pages:
        text = page.read_text()
        for foreign in ("<script", "<link", "<img", 'src="http', 'href="http'):
            assert foreign not in text, f"{page}: {foreign}"
    first = (docs / "index.html").read_text()
    assert "box_inside_image 1" in first and "images/train_1.jpg" in first and "quarantine.csv" in first
    for link in [part.split('"')[0] for part in first.split('href="')[1:]]:
        assert (docs / link).is_file(), link
    assert sum(file.stat().st_size for file in docs.rglob("*") if file.is_file()) < 500_000
