"""Suppression as a network of fixed shapes: equal to ``boxes.postprocess``, row for row."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from exported_detector import INPUT_SIZE, ExportedDetector
from hypothesis import given, settings
from hypothesis import strategies as st

from model.boxes import postprocess
from model.engines.torch_engine import TorchEngine
from model.suppression import PADDING_LABEL, StaticSuppression, SuppressionConfig


@pytest.fixture(scope="module")
def predictions(detector: ExportedDetector) -> tuple[np.ndarray, np.ndarray]:
    """Boxes and scores of a network on photographs of blood cells, scores spread over 0 to 1."""
    return TorchEngine(detector.floating).run(detector.images)


def run(boxes_xyxy: np.ndarray, scores: np.ndarray, config: SuppressionConfig) -> list[np.ndarray]:
    """One array (n, 6) an image; the padding behind is checked."""
    with torch.inference_mode():
        outputs = StaticSuppression(config)(torch.from_numpy(boxes_xyxy), torch.from_numpy(scores))
    boxes, kept_scores, labels, counts = (output.numpy() for output in outputs)
    results = []
    for image, count in enumerate(counts):
        assert not boxes[image, count:].any() and not kept_scores[image, count:].any()
        assert (labels[image, count:] == PADDING_LABEL).all()
        columns = [boxes[image, :count], kept_scores[image, :count, None], labels[image, :count, None]]
        results.append(np.concatenate(columns, axis=1).astype(np.float32))
    return results


def expected(boxes_xyxy: np.ndarray, scores: np.ndarray, config: SuppressionConfig) -> np.ndarray:
    return postprocess(
        boxes_xyxy,
        scores,
        score_threshold=config.score_threshold,
        iou_threshold=config.iou_threshold,
        multi_label=config.multi_label,
        pre_nms_top_k=config.candidates,
        max_detections=config.max_detections,
    )


@pytest.mark.parametrize("multi_label", [True, False])
@pytest.mark.parametrize(("score_threshold", "iou_threshold"), [(0.25, 0.7), (0.01, 0.45)])
@pytest.mark.parametrize(("candidates", "most"), [(1000, 300), (100, 20)])
def test_equal_to_the_suppression_outside(
    predictions: tuple[np.ndarray, np.ndarray],
    score_threshold: float,
    iou_threshold: float,
    multi_label: bool,
    candidates: int,
    most: int,
) -> None:
    config = SuppressionConfig(score_threshold, iou_threshold, multi_label, candidates, most, sweeps=16)
    boxes_xyxy, scores = predictions
    found = run(boxes_xyxy, scores, config)
    assert sum(map(len, found)) > 50
    for image, rows in enumerate(found):
        assert np.array_equal(rows, expected(boxes_xyxy[image], scores[image], config))


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    clusters=st.integers(1, 6),
    scatter=st.floats(0.5, 12),
    multi_label=st.booleans(),
)
def test_equal_on_crowds_of_boxes(seed: int, clusters: int, scatter: float, multi_label: bool) -> None:
    """Many boxes around few objects overlap in long chains; as many sweeps as candidates are always enough."""
    random = np.random.default_rng(seed)
    centres = random.uniform(20, INPUT_SIZE - 20, (clusters, 2))
    places = centres[random.integers(0, clusters, 60)] + random.normal(0, scatter, (60, 2))
    sides = random.uniform(10, 30, (60, 2))
    boxes_xyxy = np.concatenate([places - sides / 2, places + sides / 2], axis=1).astype(np.float32)
    scores = random.permutation(np.linspace(0.01, 0.99, 180, dtype=np.float32)).reshape(60, 3)  # no two alike
    config = SuppressionConfig(0.1, 0.5, multi_label, candidates=60, sweeps=60)
    assert np.array_equal(run(boxes_xyxy[None], scores[None], config)[0], expected(boxes_xyxy, scores, config))


def chain(length: int) -> tuple[np.ndarray, np.ndarray]:
    """Boxes in a row, each overlapping only the next: the first is kept, the second falls, the third is kept, ..."""
    left = np.arange(length, dtype=np.float32) * 3
    boxes_xyxy = np.stack([left, np.zeros(length), left + 10, np.full(length, 10.0)], axis=1).astype(np.float32)
    return boxes_xyxy[None], np.linspace(0.9, 0.5, length, dtype=np.float32)[None, :, None]


def test_sweeps_must_reach_along_the_longest_chain() -> None:
    boxes_xyxy, scores = chain(8)  # neighbours: IoU 7 / 13, next but one 4 / 16
    enough = SuppressionConfig(iou_threshold=0.5, sweeps=7)
    assert run(boxes_xyxy, scores, enough)[0][:, 0].tolist() == [0, 6, 12, 18]
    assert np.array_equal(run(boxes_xyxy, scores, enough)[0], expected(boxes_xyxy[0], scores[0], enough))
    few = SuppressionConfig(iou_threshold=0.5, sweeps=3)
    assert not np.array_equal(run(boxes_xyxy, scores, few)[0][:, 0], [0, 6, 12, 18])


def test_classes_do_not_suppress_each_other() -> None:
    boxes_xyxy = np.array([[[0, 0, 10, 10], [1, 0, 11, 10]]], np.float32)
    scores = np.array([[[0.9, 0.3], [0.1, 0.8]]], np.float32)
    labels = {
        many: run(boxes_xyxy, scores, SuppressionConfig(multi_label=many))[0][:, 5].tolist() for many in (True, False)
    }
    assert labels == {True: [0, 1], False: [0, 1]}
    lower = SuppressionConfig(score_threshold=0.05)
    assert run(boxes_xyxy, scores, lower)[0][:, 4].tolist() == pytest.approx([0.9, 0.8])  # 0.3 and 0.1 fell to them


def test_nothing_found_and_empty_boxes() -> None:
    boxes_xyxy = np.array([[[5, 5, 5, 9], [5, 5, 5, 9]], [[0, 0, 4, 4], [0, 0, 4, 4]]], np.float32)
    found = run(boxes_xyxy, np.array([[[0.9], [0.8]], [[0.1], [0.2]]], np.float32), SuppressionConfig())
    assert [len(rows) for rows in found] == [2, 0]  # boxes without area overlap nothing


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("score_threshold", 1.5, "score_threshold must be between 0 and 1, got 1.5"),
        ("iou_threshold", -0.1, "iou_threshold must be between 0 and 1"),
        ("candidates", 4000, "candidates must be from 1 to 3840, got 4000"),
        ("max_detections", 0, "max_detections must be at least 1, got 0"),
        ("sweeps", 0, "sweeps must be at least 1, got 0"),
    ],
)
def test_wrong_settings_are_refused(field: str, value: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SuppressionConfig(**{field: value})  # type: ignore[arg-type]
