"""Labels from detections: what the mirrored image confirms, weights and averages."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import model
from model.data.image_set import ImageSet
from model.detections import Detections
from model.evaluation import detect, torch_predictor
from model.head import make_anchor_grid
from model.preprocessing import Preprocessing
from model.pseudo_labels import FLIP_MODES, detect_for_labels, judged_by_mirror, mirror_outputs

SIZE = 64
ANCHORS = make_anchor_grid([(8, 8), (4, 4), (2, 2)], torch.device("cpu"), torch.float32).anchor_points.numpy()


def _found(*rows: tuple[int, float, float, float, float, float, int]) -> Detections:
    """Rows: image, x1, y1, x2, y2, score, label."""
    table = np.array(rows, np.float64).reshape(-1, 7)
    return Detections(
        table[:, 0].astype(np.int64),
        table[:, 1:5].astype(np.float32),
        table[:, 5].astype(np.float32),
        table[:, 6].astype(np.int64),
    )


PLAIN = _found(
    (0, 0, 0, 10, 10, 0.9, 0),  # found again, shifted by 2 of 10: IoU 2/3, score 0.6
    (0, 30, 30, 40, 40, 0.8, 0),  # found as another class
    (0, 50, 50, 60, 60, 0.7, 1),  # found again with less than half its score
    (1, 0, 0, 10, 10, 0.5, 0),  # found in the same place with a higher score
    (2, 0, 0, 10, 10, 0.4, 0),  # found in another image only
)
MIRRORED = _found(
    (0, 2, 0, 12, 10, 0.6, 0),
    (0, 30, 30, 40, 40, 0.8, 1),
    (0, 50, 50, 60, 60, 0.3, 1),
    (1, 0, 0, 10, 10, 0.95, 0),
    (1, 20, 20, 40, 40, 0.9, 0),
)


def test_keep_takes_what_the_mirror_confirms():
    kept = judged_by_mirror(PLAIN, MIRRORED, "keep")
    assert kept.image_index.tolist() == [0, 1]
    assert kept.scores.tolist() == pytest.approx([0.9, 0.5])
    assert kept.boxes_xyxy[0].tolist() == [0, 0, 10, 10]  # its own box, not the mirrored one


def test_weight_is_the_lower_score_times_the_overlap():
    judged = judged_by_mirror(PLAIN, MIRRORED, "weight")
    assert judged.scores.tolist() == pytest.approx([0.6 * 2 / 3, 0.3, 0.0, 0.5, 0.0])  # falling within an image
    assert judged.image_index.tolist() == [0, 0, 0, 1, 2]
    assert judged.labels.tolist() == [0, 1, 0, 0, 0]


def test_of_two_confirming_boxes_the_better_agreement_counts():
    plain = _found((0, 0, 0, 10, 10, 0.9, 0))
    mirrored = _found((0, 0, 0, 10, 10, 0.2, 0), (0, 0, 0, 10, 8, 0.8, 0))
    assert judged_by_mirror(plain, mirrored, "weight").scores.tolist() == pytest.approx([0.8 * 0.8])
    assert len(judged_by_mirror(plain, mirrored, "keep")) == 1


@pytest.mark.parametrize("mode", ["keep", "weight"])
def test_nothing_found_is_nothing_judged(mode):
    nothing = _found()
    assert len(judged_by_mirror(nothing, MIRRORED, mode)) == 0
    assert judged_by_mirror(PLAIN, nothing, mode).scores.tolist() == [0.0] * (5 if mode == "weight" else 0)


def test_outputs_come_back_from_the_mirror():
    """A box around its own anchor point, scored by the anchor's column: both are found at the mirrored anchor."""
    boxes = (np.tile(ANCHORS, 2) + np.array([-1, -2, 3, 4]))[None].astype(np.float32)
    scores = ANCHORS[None, :, :1].astype(np.float32)
    back_boxes, back_scores = mirror_outputs(boxes, scores, SIZE)
    np.testing.assert_allclose(back_scores[0, :, 0], SIZE - ANCHORS[:, 0])
    np.testing.assert_allclose(back_boxes[0], np.tile(ANCHORS, 2) + np.array([-3, -2, 1, 4]))
    twice = mirror_outputs(back_boxes, back_scores, SIZE)
    np.testing.assert_array_equal(twice[0], boxes)
    np.testing.assert_array_equal(twice[1], scores)


class BrightSpots:
    """A detector without weights: each anchor whose pixel is bright has a box of its colour's class around it."""

    def __init__(self, blind_columns: int = 0) -> None:
        self.calls = 0
        self.blind_columns = blind_columns  # nothing is seen left of this

    def __call__(self, images: NDArray[np.uint8]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        self.calls += 1
        x, y = ANCHORS.astype(int).T
        scores = images[:, :2, y, x].transpose(0, 2, 1).astype(np.float32) / 255  # red is class 0, green class 1
        scores[:, x < self.blind_columns] = 0
        boxes = np.concatenate([ANCHORS - 4, ANCHORS + 4], axis=1).astype(np.float32)
        return np.broadcast_to(boxes, (len(images), *boxes.shape)).copy(), scores


def _picture(path: str) -> NDArray[np.uint8]:
    """A red spot in the left half and a weaker green one in the right half; the second picture is empty."""
    picture = np.zeros((SIZE, SIZE, 3), np.uint8)
    if path.endswith("0"):
        picture[9:15, 9:15, 0] = 204  # one anchor of stride 8 sees it, here and in the mirror
        picture[41:47, 49:55, 1] = 102
    return picture


PICTURES = ImageSet.from_arrays(("red", "green"), ["0", "1"], [(SIZE, SIZE)] * 2)


def test_a_detector_that_treats_both_sides_alike_agrees_with_itself():
    predict = BrightSpots()
    found = detect_for_labels(predict, PICTURES, _picture, Preprocessing(SIZE), FLIP_MODES)
    assert list(found) == list(FLIP_MODES) and predict.calls == 2
    for mode in FLIP_MODES:
        assert found[mode].labels.tolist() == [0, 1], mode
        assert found[mode].image_index.tolist() == [0, 0], mode
        assert found[mode].scores.tolist() == pytest.approx([0.8, 0.4]), mode
        np.testing.assert_allclose(found[mode].boxes_xyxy, [[8, 8, 16, 16], [48, 40, 56, 48]])


def test_a_detector_that_is_blind_on_one_side_contradicts_itself():
    """Blind to the left 20 columns it misses the red spot, and in the mirrored image the green one."""
    found = detect_for_labels(BrightSpots(20), PICTURES, _picture, Preprocessing(SIZE), FLIP_MODES)
    assert found["none"].labels.tolist() == [1]
    assert len(found["keep"]) == 0
    assert found["weight"].scores.tolist() == [0.0]
    assert found["average"].scores.tolist() == pytest.approx([0.4, 0.2])  # each seen in one of both views


def test_without_the_mirror_it_is_plain_detection():
    torch.manual_seed(0)
    predict = torch_predictor(model.build("pico", 2).eval())
    calls = BrightSpots()
    detect_for_labels(calls, PICTURES, _picture, Preprocessing(SIZE), ["none"])
    assert calls.calls == 1
    expected = detect(predict, PICTURES, _picture, Preprocessing(SIZE), score_threshold=0.0001)
    found = detect_for_labels(predict, PICTURES, _picture, Preprocessing(SIZE), ["none"], score_threshold=0.0001)
    assert len(expected)
    np.testing.assert_array_equal(found["none"].boxes_xyxy, expected.boxes_xyxy)
    np.testing.assert_array_equal(found["none"].scores, expected.scores)
