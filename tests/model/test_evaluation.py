"""COCO's numbers, and what hangs on the same matching: curves, confusion, thresholds, pseudo-label quality."""

from __future__ import annotations

import contextlib
import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from model import matching
from model.data.image_set import ImageSet
from model.detections import Detections
from model.evaluation import (
    above_thresholds,
    class_thresholds,
    confusion_matrix,
    detect,
    evaluate,
    pseudo_label_quality,
    torch_predictor,
)
from model.matching import match, precision_recall
from model.preprocessing import Preprocessing


def coco_set(folder: Path, split: str) -> ImageSet:
    """A COCO file as it stands; masks' areas are kept."""
    content = json.loads((folder / "annotations" / f"instances_{split}.json").read_text(encoding="utf-8"))
    images = {record["id"]: index for index, record in enumerate(content["images"])}
    classes = {record["id"]: index for index, record in enumerate(content["categories"])}
    boxes = sorted(content["annotations"], key=lambda record: images[record["image_id"]])
    made = ImageSet.from_arrays(
        [record["name"] for record in content["categories"]],
        [f"target/images/{record['file_name']}" for record in content["images"]],
        [(record["width"], record["height"]) for record in content["images"]],
        [images[record["image_id"]] for record in boxes],
        [record["bbox"] for record in boxes],
        [classes[record["category_id"]] for record in boxes],
        is_crowd=[bool(record["iscrowd"]) for record in boxes],
    )
    made._columns.area[:] = [record["area"] for record in boxes]
    return made


def disturbed(images: ImageSet, seed: int, ties: bool) -> Detections:
    """Ground truth with a tenth lost, half doubled, edges shaken, some classes swapped, and as many inventions."""
    random = np.random.default_rng(seed)
    truth = images.all_boxes()
    count = len(truth.labels)
    rows = np.concatenate([np.flatnonzero(random.random(count) < 0.9), random.integers(count, size=count // 2)])
    sides = np.tile(truth.boxes_xywh[rows, 2:], 2)
    boxes = truth.boxes_xyxy[rows] + random.normal(0, 0.08, (len(rows), 4)) * sides
    boxes[:, 2:] = np.maximum(boxes[:, 2:], boxes[:, :2] + 1)
    corners = random.uniform(0, 400, (count, 2))
    invented = np.concatenate([corners, corners + random.uniform(3, 200, (count, 2))], axis=1)
    swapped = random.random(len(rows)) < 0.1
    any_label = random.integers(len(images.class_names), size=len(rows) + count)
    labels = np.where(swapped, any_label[: len(rows)], truth.labels[rows])
    scores = random.random(len(rows) + count)
    return Detections(
        np.concatenate([truth.image_index[rows], random.integers(len(images), size=count)]),
        np.concatenate([boxes, invented]).astype(np.float32),
        (np.round(scores, 1) if ties else scores).astype(np.float32),
        np.concatenate([labels, any_label[len(rows) :]]),
    )


def pycocotools_evaluation(images: ImageSet, detections: Detections) -> Any:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    truth = images.all_boxes()
    columns = zip(truth.image_index, truth.labels, truth.boxes_xywh, truth.area, truth.is_crowd, strict=True)
    annotations = [
        {"id": row + 1, "image_id": int(i), "category_id": int(c), "bbox": b.tolist(), "area": a, "iscrowd": int(d)}
        for row, (i, c, b, a, d) in enumerate(columns)
    ]
    boxes = detections.boxes_xyxy.astype(np.float64)
    boxes[:, 2:] -= boxes[:, :2]
    found = zip(detections.image_index, detections.labels, boxes.tolist(), detections.scores, strict=True)
    results = [{"image_id": int(i), "category_id": int(c), "bbox": b, "score": float(s)} for i, c, b, s in found]
    with contextlib.redirect_stdout(io.StringIO()):
        reference = COCO()
        reference.dataset = {
            "info": {},
            "images": [{"id": index} for index in range(len(images))],
            "categories": [{"id": label} for label in range(len(images.class_names))],
            "annotations": annotations,
        }
        reference.createIndex()
        evaluation = COCOeval(reference, reference.loadRes(results), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize(
    ("name", "split", "most"),
    [
        ("bccd", "test", 47),
        ("aquarium", "test", 95),
        ("pretrain_general", "train", 120),
        ("pretrain_general", "val", 53),
    ],
)
def test_equals_pycocotools(shared: Path, name: str, split: str, most: int, ties: bool) -> None:
    """1e-9: both add the same float64 numbers, only the order of the final mean differs."""
    images = coco_set(shared / "data" / name, split)
    crowded = np.unique(images.all_boxes().image_index[images.all_boxes().is_crowd])
    images = images.subset(np.unique([*crowded, *range(most - len(crowded))]))
    found = disturbed(images, seed=1, ties=ties)
    ours, theirs = evaluate(found, images), pycocotools_evaluation(images, found)
    values = [ours.map50_95, ours.map50, ours.map75, ours.map_small, ours.map_medium, ours.map_large]
    np.testing.assert_allclose([*values, ours.recall50_95], theirs.stats[[0, 1, 2, 3, 4, 5, 8]], rtol=0, atol=1e-9)
    assert 0.1 < ours.map50_95 < 0.9
    precision = theirs.eval["precision"][:, :, :, 0, 2]  # (T, R, K) all areas, 100 detections
    for label, class_name in enumerate(images.class_names):
        if class_name not in ours.curves:
            assert (precision[:, :, label] == -1).all()
            continue
        assert ours.per_class_ap[class_name] == pytest.approx(precision[:, :, label].mean(), abs=1e-9)
        assert ours.per_class_ap50[class_name] == pytest.approx(precision[0, :, label].mean(), abs=1e-9)
        np.testing.assert_allclose(ours.curves[class_name].precision, precision[0, :, label], rtol=0, atol=1e-9)
        np.testing.assert_array_equal(ours.curves[class_name].score, theirs.eval["scores"][0, :, label, 0, 2])


def test_the_general_set_has_crowds(shared: Path) -> None:
    """Else the comparison above would not show that they are treated right."""
    assert coco_set(shared / "data" / "pretrain_general", "train").all_boxes().is_crowd.sum() >= 20


@pytest.mark.parametrize("seed", range(6))
def test_equals_pycocotools_on_crowded_little_scenes(seed: int) -> None:
    """Many overlaps, many ties, crowds, more than 100 detections of a class in an image."""
    random = np.random.default_rng(seed)
    truth_count, found_count = 60, 700
    truth_xywh = np.concatenate(
        [random.integers(0, 40, (truth_count, 2)), random.integers(8, 130, (truth_count, 2))], 1
    )
    images = ImageSet.from_arrays(
        ("a", "b", "never"),
        ["x"] * 4,
        [(200, 200)] * 4,
        random.integers(3, size=truth_count),
        truth_xywh,
        random.integers(2, size=truth_count),
        is_crowd=random.random(truth_count) < 0.2,
    )
    near = truth_xywh[random.integers(truth_count, size=found_count)] + random.integers(-3, 4, (found_count, 4))
    near[:, 2:] = np.maximum(near[:, 2:], 1)
    corners = np.concatenate([near[:, :2], near[:, :2] + near[:, 2:]], axis=1).astype(np.float32)
    scores = (random.integers(0, 20, found_count) / 20).astype(np.float32)
    found = Detections(random.integers(4, size=found_count), corners, scores, random.integers(3, size=found_count))
    ours, theirs = evaluate(found, images), pycocotools_evaluation(images, found)
    expected = np.where(theirs.stats[[0, 1, 2, 3, 4, 5, 8]] < 0, np.nan, theirs.stats[[0, 1, 2, 3, 4, 5, 8]])
    values = [ours.map50_95, ours.map50, ours.map75, ours.map_small, ours.map_medium, ours.map_large]
    np.testing.assert_allclose([*values, ours.recall50_95], expected, rtol=0, atol=1e-9)


def test_overlaps_in_pieces_are_the_same(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = coco_set(shared / "data" / "bccd", "test")
    found = disturbed(images, 2, ties=True)
    whole = match(found, images.all_boxes())
    monkeypatch.setattr(matching, "PAIRS_AT_ONCE", 37)
    pieces = match(found, images.all_boxes())
    np.testing.assert_array_equal(whole.truth, pieces.truth)
    np.testing.assert_array_equal(whole.ignored, pieces.ignored)


def test_image_counts_are_a_bootstrap_sample(shared: Path) -> None:
    """Counting an image twice equals having it twice, so a sample needs no new matching."""
    images = coco_set(shared / "data" / "bccd", "test")
    found = disturbed(images, 3, ties=False)
    rows = np.sort(np.random.default_rng(0).integers(len(images), size=len(images)))
    parts = [found.of_image(row) for row in rows]
    sample = Detections(
        np.repeat(np.arange(len(rows)), [len(part) for part in parts]),
        *(np.concatenate([getattr(part, name) for part in parts]) for name in ("boxes_xyxy", "scores", "labels")),
    )
    counts = np.bincount(rows, minlength=len(images))
    matches = match(found, images.all_boxes())
    counted = precision_recall(matches, len(images.class_names), counts).average_precision()
    drawn = evaluate(sample, images.subset(rows)).map50_95
    # copies of an image are ties that a curve passes one by one, while counts pass them at once
    assert counted.mean() == pytest.approx(drawn, abs=2e-3)
    once = precision_recall(matches, len(images.class_names), np.ones(len(images), np.int64)).average_precision()
    np.testing.assert_array_equal(once, precision_recall(matches, len(images.class_names)).average_precision())


SCENE = ImageSet.from_arrays(
    ("cat", "dog", "bird"),
    ["t/0.jpg", "t/1.jpg", "t/2.jpg"],
    [(100, 100)] * 3,
    [0, 0, 1, 1, 1],
    [(0, 0, 20, 20), (50, 50, 40, 40), (0, 0, 20, 20), (30, 30, 50, 50), (0, 60, 30, 30)],
    [0, 1, 0, 1, 0],
    is_crowd=[False, False, False, False, True],
)


def found(*rows: tuple[int, tuple[int, int, int, int], float, int]) -> Detections:
    """image, xyxy, score, label"""
    return Detections(
        np.array([row[0] for row in rows], np.int64),
        np.array([row[1] for row in rows], np.float32).reshape(-1, 4),
        np.array([row[2] for row in rows], np.float32),
        np.array([row[3] for row in rows], np.int64),
    )


CAT_0, DOG_0 = (0, 0, 20, 20), (50, 50, 90, 90)
CAT_1, DOG_1, CROWD_1 = (0, 0, 20, 20), (30, 30, 80, 80), (2, 62, 25, 85)


def test_perfect_detections_score_one() -> None:
    truth = SCENE.all_boxes().select(~SCENE.all_boxes().is_crowd)
    perfect = Detections(truth.image_index, truth.boxes_xyxy.astype(np.float32), np.ones(4, np.float32), truth.labels)
    metrics = evaluate(perfect, SCENE)
    assert (metrics.map50_95, metrics.map50, metrics.recall50_95) == (1.0, 1.0, 1.0)
    assert metrics.per_class_ap == {"cat": 1.0, "dog": 1.0}  # no bird in the set
    assert (metrics.image_count, metrics.box_count) == (3, 4)


def test_no_detection_scores_zero_and_json_has_no_nan() -> None:
    metrics = evaluate(found(), SCENE)
    assert metrics.map50_95 == 0.0
    assert math.isnan(metrics.map_large)
    assert json.loads(json.dumps(metrics.to_json(), allow_nan=False))["map_large"] is None
    assert "map_large" not in metrics.scalars()
    assert metrics.scalars()["ap/cat"] == 0.0
    assert np.array(metrics.confusion.counts).tolist() == [[0, 0, 0, 2], [0, 0, 0, 2], [0] * 4, [0] * 4]


def test_empty_image_set_has_no_numbers() -> None:
    metrics = evaluate(found(), SCENE.subset([]))
    assert metrics.scalars() == {}
    assert metrics.per_class_ap == {}


def test_confusion_matrix_of_a_worked_example() -> None:
    detections = found(
        (0, CAT_0, 0.9, 0),  # right
        (0, CAT_0, 0.8, 1),  # a second box on the cat: invented dog
        (0, DOG_0, 0.7, 2),  # dog taken for a bird
        (1, DOG_1, 0.4, 1),  # right
        (1, CROWD_1, 0.6, 0),  # on the crowd of cats: not counted
        (1, CAT_1, 0.2, 0),  # below the threshold: missed
        (2, CAT_0, 0.9, 0),  # invented
    )
    matrix = confusion_matrix(detections, SCENE, score_threshold=0.25)
    assert np.array(matrix.counts).tolist() == [[1, 0, 0, 1], [0, 1, 1, 0], [0, 0, 0, 0], [1, 1, 0, 0]]


def test_confusion_prefers_the_right_class() -> None:
    """The better scored wrong class does not take the box from the right one."""
    matrix = confusion_matrix(found((0, DOG_0, 0.9, 0), (0, DOG_0, 0.5, 1)), SCENE.subset([0]), 0.25)
    assert np.array(matrix.counts).tolist() == [[0, 0, 0, 1], [0, 1, 0, 0], [0, 0, 0, 0], [1, 0, 0, 0]]


THRESHOLD_ROWS = (
    (0, CAT_0, 0.9, 0),  # right
    (2, CAT_0, 0.8, 0),  # wrong
    (1, CAT_1, 0.6, 0),  # right: F1 0.8
    (2, DOG_0, 0.3, 0),  # wrong
    (2, DOG_0, 0.9, 1),  # wrong
    (0, DOG_0, 0.5, 1),  # right
)


def test_threshold_has_the_best_f1() -> None:
    thresholds = class_thresholds(found(*THRESHOLD_ROWS), SCENE)
    assert thresholds["cat"] == pytest.approx((0.6 + 0.3) / 2)
    assert thresholds["dog"] == pytest.approx((0.5 + 0.05) / 2)
    assert thresholds["bird"] == 1.0


def test_threshold_obeys_the_precision_it_must_reach() -> None:
    thresholds = class_thresholds(found(*THRESHOLD_ROWS), SCENE, minimum_precision=0.7, without_truth=0.6)
    assert thresholds["cat"] == pytest.approx((0.9 + 0.8) / 2)
    assert thresholds["dog"] == 1.0  # never more than half right
    assert thresholds["bird"] == 0.6


def test_equal_scores_are_never_split() -> None:
    """A threshold between two detections of the same score cannot exist."""
    rows = ((0, CAT_0, 0.5, 0), (2, CAT_0, 0.5, 0), (2, DOG_0, 0.5, 0))
    assert class_thresholds(found(*rows), SCENE, minimum_precision=0.5)["cat"] == 1.0
    assert class_thresholds(found(*rows), SCENE)["cat"] < 0.5


def test_threshold_keeps_what_it_was_chosen_for(shared: Path) -> None:
    images = coco_set(shared / "data" / "bccd", "test")
    detections = disturbed(images, 4, ties=False)
    thresholds = class_thresholds(detections, images, minimum_precision=0.6)
    quality = pseudo_label_quality(detections, images, thresholds)
    reached = [values["precision"] for values in quality.per_class.values() if values["kept"]]
    assert reached
    assert min(reached) >= 0.6
    best = pseudo_label_quality(detections, images, class_thresholds(detections, images))
    for name, value in class_thresholds(detections, images).items():
        for shift in (-0.1, 0.1):
            moved = pseudo_label_quality(detections, images, {**thresholds, name: value + shift})
            assert f1(moved.per_class[name]) <= f1(best.per_class[name]) + 1e-12


def f1(values: dict[str, float]) -> float:
    if not values["kept"]:
        return 0.0
    return 2 * values["precision"] * values["kept"] / (values["kept"] + values["truth"])


def test_pseudo_label_quality_of_a_worked_example() -> None:
    quality = pseudo_label_quality(found(*THRESHOLD_ROWS), SCENE, {"cat": 0.5, "dog": 0.6, "bird": 1.0})
    assert (quality.kept, quality.correct, quality.truth) == (4, 2, 4)
    assert (quality.precision, quality.recall) == (0.5, 0.5)
    assert quality.per_class["cat"] == {"precision": 2 / 3, "recall": 1.0, "kept": 3.0, "truth": 2.0}
    assert quality.per_class["dog"]["recall"] == 0.0
    assert quality.to_json()["per_class"]["bird"] == {"precision": None, "recall": None, "kept": 0.0, "truth": 0.0}


def test_class_without_threshold_is_named() -> None:
    with pytest.raises(ValueError, match=r"no score threshold for the classes \['dog', 'bird'\]"):
        above_thresholds(found(*THRESHOLD_ROWS), SCENE.class_names, {"cat": 0.5})


def test_detections_of_another_set_are_refused() -> None:
    with pytest.raises(ValueError, match="detections name image 3, the set has 3 images"):
        evaluate(found((3, CAT_0, 0.9, 0)), SCENE)
    with pytest.raises(ValueError, match="detections name class 3, the set has only 3 classes"):
        evaluate(found((0, CAT_0, 0.9, 3)), SCENE)
    with pytest.raises(ValueError, match=r"minimum_precision must be between 0 and 1, got 1.5"):
        class_thresholds(found(), SCENE, minimum_precision=1.5)


def blank(path: str) -> NDArray[np.uint8]:
    return np.full((50, 100, 3), int(path.split("/")[1]), np.uint8)


def oracle(images: NDArray[np.uint8]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """One box over the picture's right half, reaching beyond it; the score tells the picture's grey level."""
    count = len(images)
    boxes = np.tile(np.array([[[32, 16, 80, 48], [0, 0, 5, 5]]], np.float32), (count, 1, 1))
    scores = np.zeros((count, 2, 2), np.float32)
    scores[:, 0, 1] = images[:, 0, 32, 32] / 255
    return boxes, scores


@pytest.mark.parametrize("batch_size", [1, 2, 7])
def test_detect_returns_original_pixels_in_image_order(batch_size: int) -> None:
    images = ImageSet.from_arrays(("a", "b"), ["t/50", "t/200", "t/0", "t/100", "t/250"], [(100, 50)] * 5)
    detections = detect(oracle, images, blank, Preprocessing(64), batch_size=batch_size)
    assert detections.image_index.tolist() == [0, 1, 3, 4]  # grey level 0 is below the threshold
    assert detections.labels.tolist() == [1, 1, 1, 1]
    np.testing.assert_allclose(detections.scores, np.array([50, 200, 100, 250]) / 255, rtol=1e-6)
    # 64 input pixels for 100: the box from the middle to beyond the right edge is cut there
    np.testing.assert_allclose(detections.boxes_xyxy, [[50, 0, 100, 50]] * 4, atol=1e-4)


def test_detect_on_no_image_finds_nothing() -> None:
    images = ImageSet.from_arrays(("a",), [], [])
    assert len(detect(oracle, images, blank, Preprocessing(64))) == 0


class Halves(torch.nn.Module):
    """Returns the mean brightness as score; notes its mode."""

    def forward(self, images: torch.Tensor) -> tuple[tuple[torch.Tensor, torch.Tensor], None]:
        assert not self.training
        assert images.dtype == torch.float32
        return (torch.zeros(len(images), 1, 4), images.mean(dim=(1, 2, 3)).reshape(-1, 1, 1)), None


def test_torch_predictor_scales_bytes_and_restores_the_mode() -> None:
    model = Halves().train()
    boxes, scores = torch_predictor(model)(np.full((2, 3, 8, 8), 51, np.uint8))
    assert model.training
    assert boxes.shape == (2, 1, 4)
    np.testing.assert_allclose(scores[:, 0, 0], 0.2, rtol=1e-6)
