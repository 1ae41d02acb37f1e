"""Box helpers and post-processing against golden vectors, a plain greedy suppression and worked examples."""

from __future__ import annotations

import numpy as np
import pytest

import model.boxes
from model.boxes import box_area, box_iou, clip_boxes, non_maximum_suppression, postprocess, xywh_to_xyxy, xyxy_to_xywh


@pytest.mark.parametrize("variant", ["predict_default", "validation", "single_label", "agnostic", "tight", "nothing"])
@pytest.mark.parametrize("image", [0, 1])
def test_postprocessing_equals_golden(golden, variant, image):
    arrays = golden.arrays("postprocess")
    settings = golden.json("postprocess")["variants"][variant]
    detections = postprocess(
        arrays["boxes"][image],
        arrays["scores"][image],
        score_threshold=settings["score_threshold"],
        iou_threshold=settings["nms_threshold"],
        pre_nms_top_k=settings["nms_top_k"],
        max_detections=settings["max_predictions"],
        multi_label=settings["multi_label_per_box"],
        class_agnostic=settings["class_agnostic_nms"],
    )
    np.testing.assert_array_equal(detections, arrays[f"{variant}.image{image}"])  # exact set, order and values
    assert detections.dtype == np.float32


def _greedy(boxes_xyxy: np.ndarray, scores: np.ndarray, labels: np.ndarray, threshold: float) -> list[int]:
    """Suppression as the textbook says it: box by box."""
    kept: list[int] = []
    for candidate in np.argsort(-scores, kind="stable"):
        rivals = [k for k in kept if labels[k] == labels[candidate]]
        overlaps = box_iou(boxes_xyxy[[candidate]], boxes_xyxy[rivals]) if rivals else np.zeros((1, 0))
        if not (overlaps > threshold).any():
            kept.append(int(candidate))
    return kept


@pytest.mark.parametrize("seed", range(5))
def test_suppression_equals_the_plain_greedy_one(seed):
    """Crowded boxes make long chains in which a suppressed box must not suppress others."""
    generator = np.random.default_rng(seed)
    corners = generator.uniform(0, 30, (120, 2))
    boxes = np.concatenate([corners, corners + generator.uniform(15, 40, (120, 2))], axis=1).astype(np.float32)
    scores = generator.choice(np.linspace(0.1, 0.9, 40), 120).astype(np.float32)  # with ties
    labels = generator.integers(0, 3, 120)
    kept = non_maximum_suppression(boxes, scores, labels, 0.4)
    assert kept.tolist() == _greedy(boxes, scores, labels, 0.4)


def test_suppressed_boxes_do_not_suppress():
    """b falls to a; c overlaps only b and stays."""
    boxes = np.array([[0, 0, 10, 10], [4, 0, 14, 10], [8, 0, 18, 10]], dtype=np.float32)
    scores = np.array([0.9, 0.8, 0.7], dtype=np.float32)
    assert non_maximum_suppression(boxes, scores, np.zeros(3, dtype=np.int64), 0.3).tolist() == [0, 2]


def test_thresholds_are_exclusive_for_multi_label_and_inclusive_for_single_label():
    boxes = np.array([[0, 0, 4, 4], [10, 10, 14, 14]], dtype=np.float32)
    scores = np.array([[0.5, 0.25], [0.75, 0.1]], dtype=np.float32)
    multi = postprocess(boxes, scores, score_threshold=0.25, iou_threshold=0.5)
    assert multi[:, 4:].tolist() == [[0.75, 0.0], [0.5, 0.0]]
    single = postprocess(boxes, scores, score_threshold=0.5, iou_threshold=0.5, multi_label=False)
    assert single[:, 4:].tolist() == [[0.75, 0.0], [0.5, 0.0]]


def test_limits_before_and_after_suppression():
    boxes = np.repeat(np.arange(50, dtype=np.float32)[:, None] * 10, 4, axis=1) + np.array(
        [0, 0, 5, 5], dtype=np.float32
    )
    scores = np.linspace(0.9, 0.2, 50, dtype=np.float32)[:, None]
    detections = postprocess(boxes, scores, score_threshold=0.1, iou_threshold=0.5, pre_nms_top_k=20, max_detections=7)
    np.testing.assert_array_equal(detections[:, 4], scores[:7, 0])
    all_candidates = postprocess(boxes, scores, score_threshold=0.1, iou_threshold=0.5, pre_nms_top_k=20)
    assert len(all_candidates) == 20


def test_nothing_found_has_six_columns():
    assert postprocess(np.zeros((3, 4)), np.zeros((3, 2)), score_threshold=0.1, iou_threshold=0.5).shape == (0, 6)


def test_formats_round_trip():
    boxes_xywh = np.array([[1.0, 2.0, 3.0, 4.0]])
    assert xywh_to_xyxy(boxes_xywh).tolist() == [[1.0, 2.0, 4.0, 6.0]]
    assert xyxy_to_xywh(xywh_to_xyxy(boxes_xywh)).tolist() == boxes_xywh.tolist()


def test_overlap_worked_example():
    first = np.array([[0.0, 0.0, 2.0, 2.0], [5.0, 5.0, 5.0, 5.0]])
    second = np.array([[1.0, 1.0, 3.0, 3.0], [5.0, 5.0, 5.0, 5.0]])
    np.testing.assert_allclose(box_iou(first, second), [[1 / 7, 0.0], [0.0, 0.0]])


def test_area_of_an_inverted_box_is_zero():
    assert box_area(np.array([[0.0, 0.0, 2.0, 3.0], [4.0, 0.0, 2.0, 3.0]])).tolist() == [6.0, 0.0]


def test_clipping_at_the_image():
    boxes = np.array([[-5.0, 2.0, 300.0, 90.0], [-9.0, -9.0, -1.0, -1.0]])
    assert clip_boxes(boxes, width=200, height=80).tolist() == [[0.0, 2.0, 200.0, 80.0], [0.0, 0.0, 0.0, 0.0]]


@pytest.mark.parametrize("most", [None, 1, 40, 250])
def test_suppression_in_blocks_equals_the_plain_greedy_one(monkeypatch, most):
    """More boxes than a block, in long chains across blocks; what is kept does not depend on the blocks."""
    generator = np.random.default_rng(3)
    corners = generator.uniform(0, 120, (300, 2))
    boxes = np.concatenate([corners, corners + generator.uniform(15, 40, (300, 2))], axis=1).astype(np.float32)
    scores, labels = generator.choice(np.linspace(0.1, 0.9, 60), 300).astype(np.float32), generator.integers(0, 2, 300)
    expected = _greedy(boxes, scores, labels, 0.4)[:most]
    for block in (7, 64, 128, 1000):
        monkeypatch.setattr(model.boxes, "BLOCK", block)
        assert non_maximum_suppression(boxes, scores, labels, 0.4, most).tolist() == expected


def test_overlap_of_mixed_precision_and_shapes():
    """Boxes of annotations are float64, those of networks float32."""
    boxes = np.random.default_rng(0).uniform(0, 50, (5, 4))
    boxes[:, 2:] += 50
    overlap = box_iou(boxes, boxes[:3].astype(np.float32))
    assert overlap.shape == (5, 3) and overlap.dtype == np.float64
    np.testing.assert_allclose(np.diag(overlap), 1, rtol=1e-6)
    assert box_iou(boxes[:0], boxes).shape == (0, 5)
