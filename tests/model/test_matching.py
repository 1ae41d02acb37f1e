"""The matching without a loop over detections against the one that COCO's rules describe."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from evaluation_scenes import coco_set, disturbed, plentiful

from model import matching
from model.boxes import box_iou
from model.data.image_set import ImageSet
from model.detections import Detections
from model.matching import match, match_by_area


def test_overlaps_in_pieces_are_the_same(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = coco_set(shared / "data" / "bccd", "test")
    found = disturbed(images, 2, ties=True)
    whole = match(found, images.all_boxes())
    monkeypatch.setattr(matching, "PAIRS_AT_ONCE", 37)
    pieces = match(found, images.all_boxes())
    np.testing.assert_array_equal(whole.truth, pieces.truth)
    np.testing.assert_array_equal(whole.ignored, pieces.ignored)


def plain_greedy(found: Detections, images: ImageSet, threshold: float) -> np.ndarray:
    """One detection after the other, best score first; no crowds."""
    truth = images.all_boxes()
    matched, taken = np.full(len(found), -1), np.zeros(len(truth.labels), bool)
    for row in np.argsort(-found.scores, kind="stable"):
        rivals = (truth.image_index == found.image_index[row]) & (truth.labels == found.labels[row]) & ~taken
        iou = box_iou(found.boxes_xyxy[[row]].astype(np.float64), truth.boxes_xyxy)[0] * rivals
        best = len(iou) - 1 - int(np.argmax(iou[::-1]))  # the last of equals
        if iou[best] >= threshold:
            matched[row], taken[best] = best, True
    return matched


@pytest.mark.parametrize("seed", range(4))
def test_equals_taking_turns(seed: int) -> None:
    """Boxes so close that who loses one takes the next, over many turns."""
    random = np.random.default_rng(seed)
    corners = np.arange(40)[:, None] * 2.0 + random.normal(0, 0.3, (40, 2))
    images = ImageSet.from_arrays(
        ("a", "b"), ["x"] * 2, [(200, 200)] * 2, np.arange(40) % 2, np.hstack([corners, np.full((40, 2), 30.0)]), 0
        * np.arange(40)
    )  # fmt: skip
    rows = random.integers(40, size=150)
    boxes = images.all_boxes().boxes_xyxy[rows] + random.normal(0, 2, (150, 4))
    found = Detections(
        images.all_boxes().image_index[rows],
        boxes.astype(np.float32),
        random.random(150).astype(np.float32),
        rows % 3 // 2,
    )
    matches = match(found, images.all_boxes())
    for row, threshold in enumerate(matches.iou_thresholds):
        np.testing.assert_array_equal(matches.truth[row], plain_greedy(found, images, threshold))
    assert (matches.truth[0] >= 0).sum() > 20


def test_areas_together_equal_areas_apart(shared: Path) -> None:
    images = coco_set(shared / "data" / "pretrain_general", "val")
    found, ranges = plentiful(images, 30, seed=3), [(0.0, 1e10), (0.0, 1024.0), (1024.0, 9216.0)]
    for together, limits in zip(match_by_area(found, images.all_boxes(), ranges), ranges, strict=True):
        apart = match(found, images.all_boxes(), area_range=limits)
        np.testing.assert_array_equal(together.truth, apart.truth)
        np.testing.assert_array_equal(together.ignored, apart.ignored)


def test_nothing_meets_nothing() -> None:
    images = ImageSet.from_arrays(("a",), [], [])
    nothing = Detections(
        *(
            np.empty(shape, kind)
            for shape, kind in ((0, np.int64), ((0, 4), np.float32), (0, np.float32), (0, np.int64))
        )
    )
    assert match(nothing, images.all_boxes()).truth.shape == (10, 0)
