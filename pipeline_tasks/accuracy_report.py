"""Pictures and tables of a detector's accuracy: what the gate and `nasline evaluate` show beside the numbers."""

from __future__ import annotations

import csv
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline_tasks.workspace import write_json

if TYPE_CHECKING:
    from model.data.image_set import ImageSet, OpenImage
    from model.detections import Detections
    from model.evaluation import DetectionMetrics

PICTURES = 8


def write_accuracy_report(
    folder: Path,
    metrics: DetectionMetrics,
    found: Detections,
    images: ImageSet,
    open_image: OpenImage,
    pictures: int = PICTURES,
) -> None:
    """Write plots, `per_class.csv`, `calibration.json` and `error_kinds.json` into a folder.

    `pictures` images are drawn with labels and detections side by side.
    """
    from model import plots
    from model.calibration import calibration
    from model.error_kinds import error_kinds

    folder.mkdir(parents=True, exist_ok=True)
    scores = calibration(found, images, score_threshold=metrics.confusion.score_threshold)
    errors = error_kinds(found, images, score_threshold=metrics.confusion.score_threshold)
    plots.precision_recall(metrics, folder / "precision_recall.png")
    plots.confusion_matrix(metrics, folder / "confusion_matrix.png")
    plots.calibration(scores, folder / "calibration.png")
    plots.error_kinds(errors, folder / "error_kinds.png")
    plots.predictions_beside_ground_truth(images, found, open_image, folder / "predictions.png", pictures)
    write_json(folder / "calibration.json", scores.to_json())
    write_json(folder / "error_kinds.json", errors.to_json())
    write_class_table(folder / "per_class.csv", metrics)


def write_class_table(path: Path, metrics: DetectionMetrics) -> None:
    """A row for each class with ground truth; an empty field where the set has no such boxes."""
    from model.evaluation import ClassAccuracy
    from model.json_values import without_nan

    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["class", *(field.name for field in fields(ClassAccuracy))])
        writer.writeheader()
        writer.writerows(without_nan({"class": name, **asdict(row)}) for name, row in metrics.per_class.items())
