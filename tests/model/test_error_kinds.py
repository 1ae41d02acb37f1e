"""Kinds of errors: a scene with one of each, and equalities that hold on real sets.

Compared once with tidecv 1.0.1 on the real sets without crowds: counts are equal, and gains to 1e-9 when scores differ
and tidecv is given COCO's recall points (its own differ in the last digit).
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from evaluation_scenes import CAT_0, CAT_1, CROWD_1, DOG_0, DOG_1, SCENE, coco_set, found, plentiful

from model.error_kinds import KINDS, error_kinds
from model.evaluation import evaluate
from model.matching import match

NOTHING = (60, 0, 80, 10)
BAD_DOG = (50, 50, 64, 90)  # IoU 0.35 with the dog of image 0
ONE_OF_EACH = (
    (0, CAT_0, 0.9, 0),  # right
    (0, CAT_0, 0.8, 0),  # duplicate
    (0, BAD_DOG, 0.7, 1),  # localization
    (0, BAD_DOG, 0.6, 0),  # both
    (1, CAT_1, 0.5, 2),  # classification
    (1, CROWD_1, 0.4, 0),  # on the crowd: no error
    (2, NOTHING, 0.3, 1),  # background
    # DOG_1 is missed
)


def counts(**values: int) -> dict[str, int]:
    return dict.fromkeys(KINDS, 0) | values


def test_one_of_each() -> None:
    result = error_kinds(found(*ONE_OF_EACH), SCENE)
    assert result.counts == dict.fromkeys(KINDS, 1)
    assert result.counts_per_class["cat"] == counts(duplicate=1, both=1)
    assert result.counts_per_class["dog"] == counts(localization=1, background=1, missed=1)
    assert result.counts_per_class["bird"] == counts(classification=1)
    assert (result.box_count, set(result.gains_per_class)) == (4, {"cat", "dog"})


def test_gains_of_one_of_each() -> None:
    """Cats: precisions at the hits 1/1 and, once the bird is a cat, 2/4. Dogs: one hit of two once it fits better."""
    result = error_kinds(found(*ONE_OF_EACH), SCENE)
    half = 51 / 101  # recall points up to one half
    assert result.map50 == pytest.approx(half / 2)
    assert result.gains_per_class["cat"]["classification"] == pytest.approx(50 / 101 * 2 / 4)
    assert result.gains_per_class["dog"]["localization"] == pytest.approx(half)
    assert result.gains_per_class["dog"]["missed"] == 0
    assert result.gains["duplicate"] == result.gains["both"] == 0  # they come after the only hit
    assert result.gain_without_false_negatives == pytest.approx((1 - half) / 2)


def test_only_confident_detections_are_counted() -> None:
    result = error_kinds(found(*ONE_OF_EACH), SCENE, score_threshold=0.75)
    assert result.counts == counts(duplicate=1, missed=3)
    assert result.gains == error_kinds(found(*ONE_OF_EACH), SCENE).gains


def test_the_best_of_several_errors_repairs_a_box() -> None:
    """Two localization errors on one dog: one becomes a hit, the other goes."""
    result = error_kinds(found((0, BAD_DOG, 0.7, 1), (0, BAD_DOG, 0.9, 1)), SCENE.subset([0]))
    assert result.counts == counts(localization=2, missed=1)
    assert result.gains_per_class["dog"]["localization"] == pytest.approx(1.0)


def test_a_perfect_detector_makes_no_error() -> None:
    truth = ((0, CAT_0, 1.0, 0), (0, DOG_0, 1.0, 1), (1, CAT_1, 1.0, 0), (1, DOG_1, 1.0, 1))
    result = error_kinds(found(*truth), SCENE)
    assert result.counts == counts()
    assert set(result.gains.values()) == {0.0}


def test_without_detections_everything_is_missed() -> None:
    result = error_kinds(found(), SCENE)
    assert result.counts == counts(missed=4)
    assert json.loads(json.dumps(error_kinds(found(), SCENE.subset([])).to_json(), allow_nan=False))["map50"] is None


@pytest.mark.parametrize(("name", "split"), [("bccd", "test"), ("pretrain_general", "val")])
def test_every_error_has_one_kind(shared: Path, name: str, split: str) -> None:
    images = coco_set(shared / "data" / name, split)
    detections = plentiful(images, 40, seed=5)
    result = error_kinds(detections, images, score_threshold=0.0)
    matches = match(detections, images.all_boxes(), iou_thresholds=np.array([0.5]))
    wrong = {kind: count for kind, count in result.counts.items() if kind != "missed"}
    assert sum(wrong.values()) == matches.wrong[0].sum()
    assert sum(row[kind] for row in result.counts_per_class.values() for kind in wrong) == matches.wrong[0].sum()
    assert result.counts["missed"] <= (~matches.truth_ignored).sum() - matches.correct[0].sum()
    assert result.map50 == evaluate(detections, images).map50
    assert all(gain > 0 for gain in result.gains.values())
    assert result.gain_without_false_positives > max(result.gains[kind] for kind in ("background", "duplicate", "both"))
