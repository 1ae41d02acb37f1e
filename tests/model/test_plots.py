"""The pictures are written, fit on a screen, show something and are repeatable.  (People look at them as well.)"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from model.calibration import calibration as measure_calibration
from model.data.image_set import ImageSet
from model.data.images import read_image
from model.detections import Detections
from model.drawing import class_colour, draw_boxes
from model.error_kinds import error_kinds as sort_errors
from model.evaluation import DetectionMetrics, evaluate
from model.plots import (
    calibration,
    confusion_matrix,
    error_kinds,
    precision_recall,
    predictions_beside_ground_truth,
    training_curves,
)


def many_classes(count: int, images: int = 6) -> tuple[ImageSet, Detections]:
    """A box of each class in a row of each image; the detections miss every fifth and confuse every seventh."""
    names = [f"class {label}" for label in range(count)]
    labels = np.tile(np.arange(count), images)
    owners = np.repeat(np.arange(images), count)
    boxes = np.stack([labels * 6.0, labels * 0 + 20.0, labels * 0 + 5.0, labels * 0 + 40.0], axis=1)
    truth = ImageSet.from_arrays(
        names, [f"t/{index}.jpg" for index in range(images)], [(6 * count, 80)] * images, owners, boxes, labels
    )
    rows = np.flatnonzero(np.arange(len(labels)) % 5 > 0)
    corners = truth.all_boxes().boxes_xyxy[rows].astype(np.float32)
    detected = np.where(rows % 7 == 0, (labels[rows] + 1) % count, labels[rows])
    scores = np.linspace(0.99, 0.3, len(rows), dtype=np.float32)
    return truth, Detections(owners[rows], corners, scores, detected)


def grey(path: str) -> NDArray[np.uint8]:
    return np.full((80, 6 * 40, 3), 120, np.uint8)


def history(epochs: int, classes: int) -> list[dict[str, Any]]:
    """Evaluated in every second epoch, as training writes it."""
    rows: list[dict[str, Any]] = []
    for epoch in range(1, epochs + 1):
        row: dict[str, Any] = {"epoch": epoch, "step": 10 * epoch, "learning_rate": 0.01 / epoch}
        row |= {"classification": 2.0 / epoch, "iou": 1.0 / epoch, "distribution": 0.5}
        if epoch % 2 == 0:
            row |= {"map50_95": 0.1 * epoch, "map50": 0.12 * epoch, "map75": 0.09 * epoch}
            row |= {f"ap/class {label}": 0.01 * label for label in range(classes)}
        rows.append(row)
    return rows


def assert_fits_a_screen(path: Path) -> NDArray[np.uint8]:
    image = read_image(path)
    height, width = image.shape[:2]
    assert 400 <= width <= 1920
    assert 300 <= height <= 1080
    assert image.std() > 5  # not an empty canvas
    return image


def metrics(classes: int) -> DetectionMetrics:
    images, detections = many_classes(classes)
    return evaluate(detections, images)


@pytest.mark.parametrize("classes", [1, 3, 40])
def test_metrics_plots(tmp_path: Path, classes: int) -> None:
    for draw in (precision_recall, confusion_matrix):
        draw(metrics(classes), tmp_path / "new" / "plot.png")
        assert_fits_a_screen(tmp_path / "new" / "plot.png")


def test_error_plots(tmp_path: Path) -> None:
    images, detections = many_classes(40)
    calibration(measure_calibration(detections, images), tmp_path / "new" / "calibration.png")
    error_kinds(sort_errors(detections, images), tmp_path / "new" / "errors.png")
    for name in ("calibration", "errors"):
        assert_fits_a_screen(tmp_path / "new" / f"{name}.png")


def test_plots_of_a_set_without_boxes(tmp_path: Path) -> None:
    images, detections = many_classes(3)
    none, empty = detections.select([]), images.subset([])
    nothing = evaluate(none, empty)
    precision_recall(nothing, tmp_path / "curve.png")
    confusion_matrix(nothing, tmp_path / "matrix.png")
    calibration(measure_calibration(none, empty), tmp_path / "calibration.png")
    error_kinds(sort_errors(none, empty), tmp_path / "errors.png")


@pytest.mark.parametrize(("epochs", "classes"), [(1, 3), (6, 3), (40, 30), (4, 0)])
def test_training_curves(tmp_path: Path, epochs: int, classes: int) -> None:
    training_curves(history(epochs, classes), tmp_path / "curves.png")
    assert_fits_a_screen(tmp_path / "curves.png")


def test_equal_input_gives_equal_files(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        training_curves(history(4, 2), tmp_path / name)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_no_epoch_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no epoch has been recorded"):
        training_curves([], tmp_path / "curves.png")


@pytest.mark.parametrize("count", [1, 3, 12])
def test_predictions_beside_ground_truth(tmp_path: Path, count: int) -> None:
    images, detections = many_classes(40)
    path = tmp_path / "pictures.png"
    predictions_beside_ground_truth(images, detections, grey, path, count)
    image = read_image(path)
    assert image.shape[1] <= 1920
    assert (image == np.array(class_colour(1))).all(axis=2).any()


def test_weak_detections_are_not_drawn(tmp_path: Path) -> None:
    images, detections = many_classes(3)
    empty = images.subset([0])
    weak = detections.select(detections.image_index == 0)
    for threshold, name in ((0.25, "drawn.png"), (1.0, "empty.png")):
        predictions_beside_ground_truth(empty, weak, grey, tmp_path / name, score_threshold=threshold)
    drawn, without = read_image(tmp_path / "drawn.png"), read_image(tmp_path / "empty.png")
    half = drawn.shape[1] // 2
    assert (drawn[:, :half] == without[:, :half]).all()  # the labels
    assert (drawn[20:, half:] != without[20:, half:]).any()


def test_no_image_is_an_error(tmp_path: Path) -> None:
    images, detections = many_classes(3)
    with pytest.raises(ValueError, match="cannot draw 12 of 0 images"):
        predictions_beside_ground_truth(images.subset([]), detections.select([]), grey, tmp_path / "x.png")


def test_boxes_are_drawn_on_a_copy_at_their_place() -> None:
    image = np.zeros((100, 200, 3), np.uint8)
    box = np.array([[50.0, 40.0, 150.0, 90.0]])
    drawn = draw_boxes(image, box, [1], ("a", "b"), tags=False, thickness=1)
    assert not image.any()
    rows, columns = np.nonzero(drawn.any(axis=2))
    assert (columns.min(), rows.min(), columns.max(), rows.max()) == (50, 40, 150, 90)
    assert drawn[65, 50].tolist() == list(class_colour(1))


def test_tags_stay_inside_the_picture() -> None:
    image = np.zeros((60, 120, 3), np.uint8)
    corner = np.array([[110.0, 0.0, 119.0, 9.0], [0.0, 55.0, 5.0, 59.0]])
    with_tags = draw_boxes(image, corner, [0, 1], ("hippopotamus", "b"), np.array([0.5, 0.25]))
    without = draw_boxes(image, corner, [0, 1], ("hippopotamus", "b"), tags=False)
    colour = (with_tags == np.array(class_colour(0))).all(axis=2)
    assert colour.sum() > 500 > (without == np.array(class_colour(0))).all(axis=2).sum()


def test_colours_of_many_classes_differ() -> None:
    assert len({class_colour(label) for label in range(365)}) > 300
