"""COCO's twelve numbers and the curves behind them, compared with pycocotools digit by digit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from evaluation_scenes import coco_set, disturbed, plentiful, pycocotools_evaluation

from model.average_precision import precision_recall
from model.data.image_set import ImageSet
from model.detections import Detections
from model.evaluation import SUMMARY, DetectionMetrics, evaluate
from model.matching import match

STATS = (
    *("map50_95", "map50", "map75", "map_small", "map_medium", "map_large"),
    *("recall50_95_at_1", "recall50_95_at_10", "recall50_95", "recall_small", "recall_medium", "recall_large"),
)
"""Our names in the order of pycocotools' `stats`."""


def assert_equal(ours: DetectionMetrics, theirs: Any, images: ImageSet) -> None:
    """Every number to the last digit; pycocotools says -1 where the set has no such boxes."""
    assert set(STATS) == set(SUMMARY)
    expected = {name: value if value >= 0 else np.nan for name, value in zip(STATS, theirs.stats, strict=True)}
    np.testing.assert_array_equal([getattr(ours, name) for name in STATS], list(expected.values()))
    precision, recall = theirs.eval["precision"], theirs.eval["recall"]  # (T, R, K, areas, maxima), (T, K, ...)
    for label, name in enumerate(images.class_names):
        if name not in ours.per_class:
            assert (precision[:, :, label, 0, 2] == -1).all()
            continue
        accuracy = ours.per_class[name]
        areas = (accuracy.ap50_95, accuracy.ap_small, accuracy.ap_medium, accuracy.ap_large)
        np.testing.assert_array_equal(areas, [mean(precision[:, :, label, area, 2]) for area in range(4)])
        assert (accuracy.ap50, accuracy.ap75) == tuple(precision[row, :, label, 0, 2].mean() for row in (0, 5))
        assert accuracy.recall50_95 == recall[:, label, 0, 2].mean()
        np.testing.assert_array_equal(ours.curves[name].precision, precision[0, :, label, 0, 2])
        np.testing.assert_array_equal(ours.curves[name].score, theirs.eval["scores"][0, :, label, 0, 2])


def mean(values: np.ndarray) -> float:
    return float(values[values > -1].mean()) if (values > -1).any() else np.nan


@pytest.mark.parametrize(
    ("name", "split", "most"),
    [
        ("bccd", "test", 47),
        ("aquarium", "test", 95),
        ("playing_cards", "test", 39),
        ("pretrain_general", "train", 80),
        ("pretrain_general", "val", 53),
        ("pretrain_general", "test", 39),
    ],
)
def test_equals_pycocotools_on_real_sets(shared: Path, name: str, split: str, most: int) -> None:
    """Real boxes, crowds and areas of masks; detections as many as at a low threshold, with many equal scores."""
    images = coco_set(shared / "data" / name, split)
    crowded = np.unique(images.all_boxes().image_index[images.all_boxes().is_crowd])
    images = images.subset(np.unique([*crowded, *range(most - len(crowded))]))
    found = plentiful(images, per_image=60, seed=1)
    ours = evaluate(found, images)
    assert 0.1 < ours.map50_95 < 0.9
    assert_equal(ours, pycocotools_evaluation(images, found), images)


def test_equals_pycocotools_without_equal_scores(shared: Path) -> None:
    images = coco_set(shared / "data" / "aquarium", "test")
    found = disturbed(images, seed=1, ties=False)
    assert_equal(evaluate(found, images), pycocotools_evaluation(images, found), images)


def test_the_general_set_has_crowds(shared: Path) -> None:
    """Else the comparison above would not show that they are treated right."""
    assert coco_set(shared / "data" / "pretrain_general", "train").all_boxes().is_crowd.sum() >= 20


@pytest.mark.parametrize("seed", range(6))
def test_equals_pycocotools_on_crowded_little_scenes(seed: int) -> None:
    """Many overlaps, many ties, crowds, more than 100 detections of a class in an image."""
    random = np.random.default_rng(seed)
    truth_count, found_count = 60, 900
    truth_xywh = np.concatenate(
        [random.integers(0, 40, (truth_count, 2)), random.integers(8, 130, (truth_count, 2))], 1
    )
    images = ImageSet.from_arrays(
        ("a", "b", "never"),
        ["x"] * 3,
        [(200, 200)] * 3,
        random.integers(2, size=truth_count),
        truth_xywh,
        random.integers(2, size=truth_count),
        is_crowd=random.random(truth_count) < 0.2,
    )
    near = truth_xywh[random.integers(truth_count, size=found_count)] + random.integers(-3, 4, (found_count, 4))
    near[:, 2:] = np.maximum(near[:, 2:], 1)
    corners = np.concatenate([near[:, :2], near[:, :2] + near[:, 2:]], axis=1).astype(np.float32)
    scores = (random.integers(0, 20, found_count) / 20).astype(np.float32)
    labels = random.choice(3, found_count, p=(0.5, 0.4, 0.1))
    found = Detections(random.integers(3, size=found_count), corners, scores, labels)
    assert np.unique(found.image_index * 3 + labels, return_counts=True)[1].max() > 100
    assert_equal(evaluate(found, images), pycocotools_evaluation(images, found), images)


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
