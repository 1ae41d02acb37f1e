"""What a user gets wrong: one sentence that names it, the right exit code, no traceback, nothing published."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import pytest


class Nasline(Protocol):
    """The fixture `nasline` of conftest.py."""

    def __call__(self, *arguments: object, code: int) -> str: ...


def assert_nothing_published(folder: Path) -> None:
    assert not list((folder / "workspace" / "steps").glob("*/*/manifest.json"))


def start(nasline: Nasline, dataset: Path, *options: object, code: int = 0) -> str:
    return nasline("start", "--run", "r", "--start.dataset", dataset, *options, code=code)


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (["--distill.epochs", "-3"], 65, ["distill.epochs", "-3"]),
        (["--gate.maximum_latency_ms", "-1"], 65, ["gate.maximum_latency_ms", "greater than 0", "-1"]),
        (["--pretrain.budget_minutes", "-5"], 65, ["pretrain.budget_minutes", "-5"]),
        (["--options-json", '{"distill.epoch": 3}'], 65, ["distill.epoch", "did you mean distill.epochs"]),
        (["--options-json", "{"], 2, ["--options-json is not valid JSON"]),
        (["--params", "nowhere.yaml"], 65, ["nowhere.yaml does not exist"]),
        (["--distill.epoch", "3"], 2, ["unrecognized arguments: --distill.epoch"]),
        (["--from-champion"], 2, ["has no champion to start from"]),
    ],
)
def test_wrong_parameters(
    options: list[str], code: int, words: list[str], nasline: Nasline, tmp_path: Path, coco_folder: Any
) -> None:
    sentence = start(nasline, coco_folder.path, *options, code=code)
    assert all(word in sentence for word in words), sentence
    assert not (tmp_path / "workspace" / "runs" / "r" / "run.json").exists()


def test_missing_dataset_folder(nasline: Nasline, tmp_path: Path) -> None:
    assert "start.dataset: folder" in (sentence := start(nasline, tmp_path / "nowhere", code=65))
    assert "nowhere does not exist" in sentence
    assert "start.dataset is empty" in nasline("start", "--run", "r", code=65)


def break_json(folder: Any) -> list[str]:
    folder.annotation_file("val").write_text('{"images": [\n  {"id": 1,\n}')
    return ["instances_val.json", "3"]


def remove_annotations(folder: Any) -> list[str]:
    folder.annotation_file("test").unlink()
    return ["instances_test.json"]


def remove_picture(folder: Any) -> list[str]:
    folder.image("train").unlink()
    return ["train_0.jpg", "1"]


def truncate_picture(folder: Any) -> list[str]:
    path = folder.image("train")
    path.write_bytes(path.read_bytes()[:-40])
    return ["train_0.jpg"]


def move_box_outside(folder: Any) -> list[str]:
    with folder.edit("train") as content:
        content["annotations"][0]["bbox"] = [40, 5, 30, 8]
    return ["train_0.jpg"]


def negative_box(folder: Any) -> list[str]:
    with folder.edit("train") as content:
        content["annotations"][0]["bbox"] = [4, 5, -3, 8]
    return ["train_0.jpg"]


def empty_split(folder: Any) -> list[str]:
    with folder.edit("val") as content:
        content["images"], content["annotations"] = [], []
    return ["instances_val.json"]


def picture_in_two_splits(folder: Any) -> list[str]:
    folder.image("test").write_bytes(folder.image("train").read_bytes())
    return ["train_0.jpg", "split test"]


DAMAGES = [
    break_json, remove_annotations, remove_picture, truncate_picture, move_box_outside, negative_box, empty_split,
    picture_in_two_splits,
]  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_damaged_dataset(damage: Any, nasline: Nasline, tmp_path: Path, coco_folder: Any) -> None:
    words = damage(coco_folder)
    start(nasline, coco_folder.path)
    sentence = nasline("validate_data", "--run", "r", code=65)
    assert all(word in sentence for word in words), sentence
    assert_nothing_published(tmp_path)


def test_wrong_commands(nasline: Nasline, tmp_path: Path, coco_folder: Any) -> None:
    assert "does not exist in workspace" in nasline("teach", "--run", "r", code=2)
    start(nasline, coco_folder.path)
    assert "needs validate_data of run 'r'" in nasline("pretrain", "--role", "student", "--run", "r", code=2)
    assert "must be `all` or I/N" in nasline("pseudo_label", "--shard", "4/4", "--run", "r", code=2)
    assert "is no run id" in nasline("teach", "--run", "../r", code=2)


def test_run_started_again_with_other_facts_is_refused(nasline: Nasline, tmp_path: Path, coco_folder: Any) -> None:
    start(nasline, coco_folder.path)
    start(nasline, coco_folder.path)
    sentence = start(nasline, coco_folder.path, "--start.seed", 7, code=2)
    assert "exists with other parameters" in sentence and "--replace" in sentence
    start(nasline, coco_folder.path, "--start.seed", 7, "--replace")


def test_missing_cuda_device(nasline: Nasline, tmp_path: Path, coco_folder: Any) -> None:
    import torch

    assert not torch.cuda.is_available(), "this test describes a machine without CUDA"
    start(nasline, coco_folder.path, "--start.device", "cuda", "--start.student_variant", "pico")
    nasline("validate_data", "--run", "r", code=0)
    sentence = nasline("pretrain", "--role", "student", "--run", "r", code=78)
    assert "start.device is 'cuda', but torch finds no CUDA device" in sentence


@pytest.mark.parametrize("words", [("show", "--out"), ("export", "--format", "yolo", "--to")])
def test_a_place_for_a_set_that_cannot_be_made(
    words: tuple[str, ...], nasline: Nasline, tmp_path: Path, coco_folder: Any
) -> None:
    (tmp_path / "link").symlink_to("/nonexistent/disk")
    sentence = nasline("data", words[0], coco_folder.path, *words[1:], "link/x", code=65)
    assert f"{words[-1]} link/x is no possible place: " in sentence
    assert sentence.endswith("cannot be written (File exists); give another one")


def test_predict_names_what_is_missing(nasline: Nasline, tmp_path: Path, coco_folder: Any) -> None:
    picture = coco_folder.image("train")
    sentence = nasline("predict", tmp_path / "engine", picture, "--out", tmp_path / "out", code=65)
    assert "is no engine directory" in sentence
    sentence = nasline("predict", "models:/none@champion", picture, "--out", tmp_path / "out", code=65)
    assert "models:/none@champion is not in the registry" in sentence
    assert not (tmp_path / "out").exists()
