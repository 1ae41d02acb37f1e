"""What an evaluation tells: numbers of worked examples, the confusion matrix, detections in original pixels."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from evaluation_scenes import CAT_0, CAT_1, CROWD_1, DOG_0, DOG_1, SCENE, found
from numpy.typing import NDArray

from model.data.image_set import ImageSet
from model.detections import Detections
from model.evaluation import confusion_matrix, detect, evaluate, torch_predictor
from model.preprocessing import Preprocessing


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


def test_detections_of_another_set_are_refused() -> None:
    with pytest.raises(ValueError, match="detections name image 3, the set has 3 images"):
        evaluate(found((3, CAT_0, 0.9, 0)), SCENE)
    with pytest.raises(ValueError, match="detections name class 3, the set has only 3 classes"):
        evaluate(found((0, CAT_0, 0.9, 3)), SCENE)


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
