"""A set to measure on: a COCO folder as it stands gives pycocotools' numbers of its very file."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from model.data.tables import ImageSet, read_dataset, write_dataset
from model.detections import Detections
from model.evaluation import SUMMARY, evaluate
from pipeline_tasks.data.readers import read_folder
from pipeline_tasks.data.writers import write_folder
from pipeline_tasks.errors import DataError, ParameterError
from pipeline_tasks.evaluation_set import read_evaluation_set


def shaken(images: ImageSet, seed: int) -> Detections:
    """Two detections for each box, shaken, with scores in steps of a tenth: many are equal."""
    random = np.random.default_rng(seed)
    truth = images.all_boxes()
    rows = np.tile(np.arange(len(truth.labels)), 2)
    boxes = truth.boxes_xyxy[rows] + random.normal(0, 0.07, (len(rows), 4)) * np.tile(truth.boxes_xywh[rows, 2:], 2)
    boxes[:, 2:] = np.maximum(boxes[:, 2:], boxes[:, :2] + 1)
    scores = (random.integers(1, 11, len(rows)) / 10).astype(np.float32)
    return Detections(truth.image_index[rows], boxes.astype(np.float32), scores, truth.labels[rows])


def pycocotools_summary(file: Path, images: ImageSet, found: Detections) -> list[float]:
    """The twelve numbers of the annotation file, its images known by the names of their pictures."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):
        reference = COCO(file)
        ids = {record["file_name"]: key for key, record in reference.imgs.items()}
        image_ids = [ids[images.path(index).split("/")[-1]] for index in range(len(images))]
        categories = sorted(reference.cats)
        rows = zip(found.image_index, found.labels, found.boxes_xywh.tolist(), found.scores.tolist(), strict=True)
        results = [
            {"image_id": image_ids[i], "category_id": categories[c], "bbox": b, "score": s} for i, c, b, s in rows
        ]
        evaluation = COCOeval(reference, reference.loadRes(results), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return list(evaluation.stats)


@pytest.mark.parametrize(("name", "split"), [("aquarium", "test"), ("pretrain_general", "val")])
def test_equals_pycocotools_on_the_file_itself(shared: Path, name: str, split: str) -> None:
    """Aquarium's images are not in the order of their ids; the general set has crowds and areas of masks."""
    folder = shared / "data" / name
    images = read_evaluation_set(folder, split).images
    found = shaken(images, seed=1)
    ours = evaluate(found, images)
    order = [*SUMMARY[:6], "recall50_95_at_1", "recall50_95_at_10", "recall50_95", *SUMMARY[9:]]
    theirs = pycocotools_summary(folder / "annotations" / f"instances_{split}.json", images, found)
    assert [getattr(ours, field) for field in order] == theirs


def test_pictures_open(coco_folder: Any) -> None:
    found = read_evaluation_set(coco_folder.path, "test")
    assert len(found.images) == 3
    assert all(found.open_image(found.images.path(index)).shape == (32, 48, 3) for index in range(3))
    assert found.images.all_boxes().area.tolist() == [60.0, 61.0] * 3


def test_records_that_cannot_be_understood_are_left_out(coco_folder: Any, caplog: pytest.LogCaptureFixture) -> None:
    with coco_folder.edit("test") as content:
        content["annotations"][0]["bbox"] = [1, 2, 3]
        content["annotations"][1]["category_id"] = 99
        content["annotations"][2]["image_id"] = 99
        content["annotations"][3]["bbox"][0] = float("nan")
        content["images"][2]["file_name"] = 5
    found = read_evaluation_set(coco_folder.path, "test")
    assert (len(found.images), len(found.images.all_boxes().labels)) == (2, 0)
    assert "1 images and 6 boxes of the split test cannot be understood and are left out" in caplog.text


def test_no_usable_image_is_an_error(coco_folder: Any) -> None:
    with coco_folder.edit("test") as content:
        for record in content["images"]:
            record["width"] = -1
    with pytest.raises(DataError, match="no image of the split test can be used"):
        read_evaluation_set(coco_folder.path, "test")


def test_a_published_set_needs_its_pictures(coco_folder: Any, tmp_path: Path, shared: Path) -> None:
    from pipeline_tasks.evaluation_set import _as_it_stands

    dataset, published = _as_it_stands(coco_folder.path, "test"), tmp_path / "published"
    write_dataset(published, dataset.images, dataset.boxes, dataset.metadata)
    assert read_dataset(published).split_names == ["test"]
    found = read_evaluation_set(published, "test", coco_folder.path)
    assert found.open_image(found.images.path(0)).shape == (32, 48, 3)
    with pytest.raises(ParameterError, match="is a published dataset, which does not hold its pictures; give --images"):
        read_evaluation_set(published, "test")
    with pytest.raises(ParameterError, match="has no split 'val'; it has test"):
        read_evaluation_set(published, "val", coco_folder.path)


def test_unknown_split_is_refused(coco_folder: Any) -> None:
    with pytest.raises(ParameterError, match="--split must be one of train, val, test, got 'tset'"):
        read_evaluation_set(coco_folder.path, "tset")


@pytest.mark.parametrize("form", ["yolo", "voc", "objects365"])
def test_other_formats_give_the_same_set(coco_folder: Any, tmp_path: Path, form: str) -> None:
    """Their boxes are those of the COCO file to 1e-3 pixels: YOLO writes shares of the picture."""
    wanted = read_evaluation_set(coco_folder.path, "test").images
    write_folder(read_folder(coco_folder.path), coco_folder.path, tmp_path / form, form)
    found = read_evaluation_set(tmp_path / form, "test")
    sets = [_by_picture(wanted), _by_picture(found.images)]
    assert sets[0].keys() == sets[1].keys() and len(sets[0]) == 3
    for picture, (size, rows) in sets[0].items():
        assert sets[1][picture][0] == size
        assert np.allclose(sets[1][picture][1], rows, atol=1e-3)
    height, width = found.open_image(found.images.path(0)).shape[:2]
    assert (width, height) == _by_picture(found.images)[found.images.path(0).split("/")[-1]][0]


def _by_picture(images: ImageSet) -> dict[str, tuple[tuple[int, int], list[list[float]]]]:
    """Size, and sorted boxes with the index of their class's name in alphabetical order."""
    names = sorted(images.class_names)
    boxes = images.all_boxes()
    found: dict[str, tuple[tuple[int, int], list[list[float]]]] = {}
    for index in range(len(images)):
        own = boxes.image_index == index
        labels = [names.index(images.class_names[label]) for label in boxes.labels[own]]
        rows = sorted([label, *box] for label, box in zip(labels, boxes.boxes_xywh[own].tolist(), strict=True))
        width, height = images.size(index)
        found[images.path(index).split("/")[-1]] = ((int(width), int(height)), rows)
    return found
