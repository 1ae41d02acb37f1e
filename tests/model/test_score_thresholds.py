"""Score thresholds per class, and what boxes above them are worth as labels."""

from __future__ import annotations

from pathlib import Path

import pytest
from evaluation_scenes import CAT_0, CAT_1, DOG_0, SCENE, coco_set, disturbed, found

from model.score_thresholds import above_thresholds, class_thresholds, pseudo_label_quality

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


def test_precision_outside_0_to_1_is_refused() -> None:
    with pytest.raises(ValueError, match=r"minimum_precision must be between 0 and 1, got 1.5"):
        class_thresholds(found(), SCENE, minimum_precision=1.5)
