"""`nasline evaluate` on small sets: table, files, and what it refuses."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import model
from model.checkpoint import CheckpointMetadata, save_checkpoint
from model.data.image_set import ImageSet
from model.detections import Detections
from model.evaluation import evaluate
from model.preprocessing import Preprocessing
from pipeline_tasks.commands.evaluate import label_mapping, table, with_labels
from pipeline_tasks.errors import DataError

Nasline = Callable[..., str]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """An untrained network that knows circles, squares and a class the set lacks."""
    names = ("square", "star", "circle")
    folder = tmp_path / "checkpoint"
    save_checkpoint(folder, model.build("pico", 3), CheckpointMetadata("pico", names, Preprocessing(64), 0))
    return folder


def test_table_and_files(nasline: Nasline, checkpoint: Path, coco_folder: Any, tmp_path: Path) -> None:
    output = nasline("evaluate", checkpoint, "--dataset", coco_folder.path, "--out", tmp_path / "out", code=0)
    assert "3 images, 6 boxes" in output
    assert "the set lacks the classes star; detections of them are left out" in output
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert (metrics["image_count"], metrics["box_count"], metrics["split"]) == (3, 6, "test")
    plots = tmp_path / "out" / "plots"
    pictures = {path.stem for path in plots.glob("*.png")}
    assert pictures == {"precision_recall", "confusion_matrix", "calibration", "error_kinds", "predictions"}
    with (plots / "per_class.csv").open() as file:
        rows = {row["class"]: row for row in csv.DictReader(file)}
    assert {name: row["boxes"] for name, row in rows.items()} == {"circle": "3", "square": "3"}
    assert rows["circle"]["ap_large"] == ""
    assert json.loads((plots / "error_kinds.json").read_text())["box_count"] == 6
    assert json.loads((plots / "calibration.json").read_text())["score_threshold"] == 0.25


def test_without_out_nothing_is_written(nasline: Nasline, checkpoint: Path, coco_folder: Any, tmp_path: Path) -> None:
    before = set(tmp_path.rglob("*"))
    assert "AP50-95" in nasline("evaluate", checkpoint, "--dataset", coco_folder.path, "--split", "val", code=0)
    assert set(tmp_path.rglob("*")) - before <= {tmp_path / "workspace"}


def test_what_is_no_model_is_refused(nasline: Nasline, coco_folder: Any) -> None:
    sentence = nasline("evaluate", coco_folder.path, "--dataset", coco_folder.path, code=65)
    assert "is neither a checkpoint (checkpoint.json) nor an engine (engine.json)" in sentence


@pytest.mark.parametrize(
    ("out", "reason"),
    [
        ("taken/x", "taken is no folder; give another one"),
        ("taken", "--out taken is no folder; give a"),
        ("/proc/x", "--out /proc/x is no possible place: /proc does not take it (No such file or directory); give"),
        ("/proc", "--out /proc is no possible place: /proc does not take it (No such file or directory); give"),
    ],
)
def test_a_place_for_the_report_is_looked_at_before_the_work(
    nasline: Nasline, checkpoint: Path, coco_folder: Any, tmp_path: Path, out: str, reason: str
) -> None:
    (tmp_path / "taken").write_text("a file")
    output = nasline("evaluate", checkpoint, "--dataset", coco_folder.path, "--out", out, code=65)
    assert reason in output and "AP50-95" not in output
    assert reason in nasline("predict", tmp_path / "no engine", coco_folder.path, "--out", out, code=65)


def test_a_device_that_is_not_there_is_refused(nasline: Nasline, checkpoint: Path, coco_folder: Any) -> None:
    assert "use cpu" in nasline("evaluate", checkpoint, "--dataset", coco_folder.path, "--device", "cuda:77", code=78)
    assert "is no device" in nasline("evaluate", checkpoint, "--dataset", coco_folder.path, "--device", "gpu", code=65)


def test_classes_meet_by_name() -> None:
    mapping = label_mapping(("dog", "cat", "bird"), ("cat", "horse", "dog"))
    assert mapping.tolist() == [2, 0, -1]
    found = Detections(
        np.array([0, 0, 1]), np.zeros((3, 4), np.float32), np.array([0.9, 0.8, 0.7], np.float32), np.array([2, 1, 0])
    )
    mapped = with_labels(found, mapping)
    assert (mapped.labels.tolist(), mapped.image_index.tolist()) == ([0, 2], [0, 1])
    with pytest.raises(DataError, match=r"classes \(a\) and the set's \(b, c\) have no name in common"):
        label_mapping(("a",), ("b", "c"))


def test_table_of_a_worked_example() -> None:
    images = ImageSet.from_arrays(
        ("cat", "dog"), ["a"], [(100, 100)], [0, 0], [(0, 0, 20, 20), (30, 30, 50, 50)], [0, 1]
    )
    truth = images.all_boxes()
    found = Detections(truth.image_index, truth.boxes_xyxy.astype(np.float32), np.ones(2, np.float32), truth.labels)
    lines = [line.split() for line in table(evaluate(found.select([0]), images)) if line]
    assert lines == [
        ["1", "images,", "2", "boxes"],
        ["AP50-95", "AP50", "AP75", "AR50-95"],
        ["all", "0.500", "0.500", "0.500", "0.500"],
        ["small", "1.000", "1.000"],
        ["medium", "0.000", "0.000"],
        ["large", "-", "-"],
        ["class", "boxes", "AP50-95", "AP50", "AP75", "AR50-95", "small", "medium", "large"],
        ["cat", "1", "1.000", "1.000", "1.000", "1.000", "1.000", "-", "-"],
        ["dog", "1", "0.000", "0.000", "0.000", "0.000", "-", "0.000", "-"],
    ]
