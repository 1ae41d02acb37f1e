"""Reliability of scores: a worked example, what a perfectly sure detector gets, and bins of real sizes."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from evaluation_scenes import CAT_0, CAT_1, CROWD_1, DOG_0, DOG_1, SCENE, coco_set, found, plentiful

from model.calibration import calibration

NOTHING = (60, 0, 80, 10)  # where no scene has a box
HALF_CAT = (0, 0, 20, 12)  # IoU 0.6 with the cat


def test_errors_of_a_worked_example() -> None:
    detections = found(
        (0, CAT_0, 0.9, 0),  # right, IoU 1
        (1, HALF_CAT, 0.9, 0),  # right, IoU 0.6
        (2, NOTHING, 0.5, 0),
        (1, CROWD_1, 0.7, 0),  # on the crowd of cats: not counted
        (0, NOTHING, 0.1, 0),  # below the threshold
        (0, DOG_0, 0.8, 1),  # right
    )
    result = calibration(detections, SCENE, score_threshold=0.25, bins=10)
    assert result.overall.detections == (0, 1, 0, 0, 0, 1, 0, 0, 1, 2)
    np.testing.assert_allclose(result.overall.precision, [np.nan, 0, *[np.nan] * 3, 0, np.nan, np.nan, 1, 1])
    np.testing.assert_allclose(result.overall.localized_precision[-1], 0.8)
    assert result.d_ece == pytest.approx((2 * 0.1 + 0.5 + 0.2) / 4)
    assert result.per_class["cat"].d_ece == pytest.approx((2 * 0.1 + 0.5) / 3)
    assert result.per_class["dog"].d_ece == pytest.approx(0.2)
    cat = (2 * abs(0.9 - 0.8) + 0.5) / 3
    assert result.la_ece == pytest.approx((cat + 0.2) / 2)
    assert set(result.per_class) == {"cat", "dog"}
    assert result.score_threshold == 0.2  # the edge of its bin


def test_who_is_sure_and_right_has_no_error() -> None:
    truth = ((0, CAT_0, 1.0, 0), (0, DOG_0, 1.0, 1), (1, CAT_1, 1.0, 0), (1, DOG_1, 1.0, 1))
    result = calibration(found(*truth), SCENE)
    assert (result.d_ece, result.la_ece) == (0.0, 0.0)
    assert result.scalars() == {"d_ece": 0.0, "la_ece": 0.0}


def test_one_class_and_all_bins_are_the_mean_distance(shared: Path) -> None:
    """With a bin for every score the error is the mean over detections, which needs no bins to compute."""
    images = coco_set(shared / "data" / "bccd", "test")
    detections = plentiful(images, 40, seed=2)
    result = calibration(detections, images, score_threshold=0.0)
    counts = np.array(result.overall.detections)
    assert counts.sum() == len(detections)
    edges = np.linspace(0, 1, 21)
    places = np.minimum(np.searchsorted(edges, detections.scores.astype(float), side="right") - 1, 19)
    np.testing.assert_array_equal(counts, np.bincount(places, minlength=20))
    assert sum(sum(entry.detections) for entry in result.per_class.values()) == len(detections)
    assert 0 < result.d_ece < result.la_ece < 1  # scores too high, and higher still for what is imprecise


def test_nothing_detected_is_not_known() -> None:
    result = calibration(found(), SCENE)
    assert math.isnan(result.d_ece) and math.isnan(result.la_ece)
    assert result.scalars() == {}
    assert json.loads(json.dumps(result.to_json(), allow_nan=False))["d_ece"] is None


def test_impossible_settings_are_refused() -> None:
    with pytest.raises(ValueError, match=r"bins must be at least 1 and score_threshold from 0 to 1, got 0 and 0.25"):
        calibration(found(), SCENE, bins=0)
    with pytest.raises(ValueError, match=r"got 20 and 1.0"):
        calibration(found(), SCENE, score_threshold=1.0)
