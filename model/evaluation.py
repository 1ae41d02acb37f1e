"""COCO mean average precision, curves, confusion matrix and score thresholds of a detector on an image set.

Legend: B batch, A anchors, C classes, S input size, N detections.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from model.average_precision import PrecisionRecall, mean_of_known, precision_recall, recall_at
from model.data.image_set import BoxColumns, ImageSet, OpenImage
from model.data.loader import evaluation_batches
from model.detections import Detections, check_fits, detections_in_original_pixels
from model.json_values import without_nan
from model.matching import ALL_AREAS, Floats, match, match_by_area
from model.preprocessing import Preprocessing
from model.score_thresholds import (
    IOU_HALF,
    PseudoLabelQuality,
    above_thresholds,
    class_thresholds,
    pseudo_label_quality,
)

Predict = Callable[[NDArray[np.uint8]], tuple[NDArray[np.float32], NDArray[np.float32]]]
"""Pictures uint8 (B, 3, S, S) to boxes_xyxy float32 (B, A, 4) in input pixels and scores float32 (B, A,
C).
"""

AREA_RANGES = {
    "small": (0.0, 32.0**2),
    "medium": (32.0**2, 96.0**2),
    "large": (96.0**2, 1e10),
}  # square pixels
FEW_DETECTIONS = (1, 10)
SUMMARY = (
    *("map50_95", "map50", "map75", "map_small", "map_medium", "map_large"),
    *("recall50_95", "recall50_95_at_1", "recall50_95_at_10", "recall_small", "recall_medium", "recall_large"),
)
"""COCO's twelve numbers, as attributes of ``DetectionMetrics``."""


def torch_predictor(model: torch.nn.Module, device: str | torch.device = "cpu") -> Predict:
    """A ``Predict`` around a network; it sets eval mode for each call and puts the previous mode back."""
    target = torch.device(device)

    @torch.no_grad()
    def predict(images: NDArray[np.uint8]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        was_training = model.training
        model.eval()
        (boxes_xyxy, scores), _ = model(torch.from_numpy(images).to(target).float() / 255)
        model.train(was_training)
        return boxes_xyxy.float().cpu().numpy(), scores.float().cpu().numpy()

    return predict


def detect(
    predict: Predict,
    image_set: ImageSet,
    open_image: OpenImage,
    preprocessing: Preprocessing,
    *,
    batch_size: int = 16,
    score_threshold: float = 0.01,
    iou_threshold: float = 0.7,
    max_detections: int = 300,
    threads: int = 1,
) -> Detections:
    """Every image of the set through ``predict`` and non-maximum suppression, boxes in original pixels.

    ``threads`` read and fit pictures beside the prediction. ``ValueError`` names a picture that cannot be
    read.
    """
    rows: list[NDArray[np.float32]] = []
    for images, letterboxes, _ in evaluation_batches(image_set, open_image, preprocessing, batch_size, threads):
        boxes_xyxy, scores = predict(images)
        rows += detections_in_original_pixels(
            boxes_xyxy,
            scores,
            letterboxes,
            score_threshold=score_threshold,
            iou_threshold=iou_threshold,
            max_detections=max_detections,
        )
    return Detections.from_rows(rows)


@dataclass(frozen=True)
class Curve:
    """One class at IoU 0.5: interpolated precision, and the score that gives it, at 101 recalls from 0 to
    1.
    """

    precision: tuple[float, ...]
    score: tuple[float, ...]  # 0 where that recall is never reached


@dataclass(frozen=True)
class ConfusionMatrix:
    """``counts[true][detected]`` at IoU 0.5; the last row are detections of nothing, the last column missed
    boxes.
    """

    class_names: tuple[str, ...]
    counts: tuple[tuple[int, ...], ...]
    score_threshold: float


@dataclass(frozen=True)
class ClassAccuracy:
    """One class; fractions from 0 to 1, NaN where the set has no such boxes."""

    boxes: int  # without crowd regions
    ap50_95: float
    ap50: float
    ap75: float
    ap_small: float
    ap_medium: float
    ap_large: float
    recall50_95: float


@dataclass(frozen=True)
class DetectionMetrics:
    """Accuracy on one image set; fractions from 0 to 1, NaN where the set has no such boxes.

    ``map*`` are COCO's (arXiv:1405.0312): mean over classes with ground truth, 101 recall points, at most 100
    detections of a class in an image, IoU 0.50:0.95 unless named; ``recall*`` are its AR, the mean of the largest
    recalls.  Sizes: below 32^2, to 96^2, above, by the annotated area.  Equal to pycocotools to the last digit, on
    condition that images and boxes come in the order of their ids: that order decides between equal scores.
    """

    map50_95: float
    map50: float
    map75: float
    map_small: float
    map_medium: float
    map_large: float
    recall50_95: float  # at 100 detections of a class in an image
    recall50_95_at_1: float
    recall50_95_at_10: float
    recall_small: float
    recall_medium: float
    recall_large: float
    per_class: dict[str, ClassAccuracy]  # only classes with ground truth
    curves: dict[str, Curve]
    confusion: ConfusionMatrix
    image_count: int
    box_count: int  # without crowd regions

    @property
    def per_class_ap(self) -> dict[str, float]:
        """AP at IoU 0.50:0.95 of each class with ground truth."""
        return {name: accuracy.ap50_95 for name, accuracy in self.per_class.items()}

    @property
    def per_class_ap50(self) -> dict[str, float]:
        """AP at IoU 0.50 of each class with ground truth."""
        return {name: accuracy.ap50 for name, accuracy in self.per_class.items()}

    def scalars(self) -> dict[str, float]:
        """The numbers to log; those the set cannot show are left out."""
        values = {name: getattr(self, name) for name in SUMMARY}
        values |= {f"ap/{name}": value for name, value in self.per_class_ap.items()}
        return {name: value for name, value in values.items() if not math.isnan(value)}

    def to_json(self) -> dict[str, Any]:
        """Everything, ready for ``json.dumps``; NaN becomes None."""
        content: dict[str, Any] = without_nan(asdict(self))
        return content


def evaluate(detections: Detections, image_set: ImageSet, *, confusion_score: float = 0.25) -> DetectionMetrics:
    """Compare detections with the set's ground truth. ``confusion_score`` is the confusion matrix'
    threshold.
    """
    check_fits(detections, image_set)
    truth = image_set.all_boxes()
    curves, few = _curves_by_area(detections, truth, len(image_set.class_names))
    precision, recall = curves["all"].precision, curves["all"].recall  # (T, R, K), (T, K)
    counts = np.bincount(truth.labels[~truth.is_crowd], minlength=len(image_set.class_names))
    present = [(label, name) for label, name in enumerate(image_set.class_names) if counts[label]]
    return DetectionMetrics(
        map50_95=mean_of_known(precision),
        map50=mean_of_known(precision[0]),
        map75=mean_of_known(precision[5]),
        map_small=mean_of_known(curves["small"].precision),
        map_medium=mean_of_known(curves["medium"].precision),
        map_large=mean_of_known(curves["large"].precision),
        recall50_95=mean_of_known(recall),
        recall50_95_at_1=mean_of_known(few[1]),
        recall50_95_at_10=mean_of_known(few[10]),
        recall_small=mean_of_known(curves["small"].recall),
        recall_medium=mean_of_known(curves["medium"].recall),
        recall_large=mean_of_known(curves["large"].recall),
        per_class={name: _class_accuracy(curves, label, int(counts[label])) for label, name in present},
        curves={name: _curve(curves["all"], label) for label, name in present},
        confusion=confusion_matrix(detections, image_set, confusion_score),
        image_count=len(image_set),
        box_count=int(counts.sum()),
    )


def _curves_by_area(
    detections: Detections, truth: BoxColumns, class_count: int
) -> tuple[dict[str, PrecisionRecall], dict[int, Floats]]:
    """Curves of "all" and each size, and the recalls (T, K) of few detections of a class in an image."""
    areas = {"all": ALL_AREAS, **AREA_RANGES}
    curves, few = dict[str, PrecisionRecall](), dict[int, Floats]()
    for area, matches in zip(areas, match_by_area(detections, truth, list(areas.values())), strict=True):
        curves[area] = precision_recall(matches, class_count)
        if area == "all":
            few = {most: recall_at(matches, class_count, most) for most in FEW_DETECTIONS}
    return curves, few


def _class_accuracy(curves: dict[str, PrecisionRecall], label: int, boxes: int) -> ClassAccuracy:
    precision = {area: curve.precision[:, :, label] for area, curve in curves.items()}  # (T, R)
    return ClassAccuracy(
        boxes=boxes,
        ap50_95=mean_of_known(precision["all"]),
        ap50=mean_of_known(precision["all"][0]),
        ap75=mean_of_known(precision["all"][5]),
        ap_small=mean_of_known(precision["small"]),
        ap_medium=mean_of_known(precision["medium"]),
        ap_large=mean_of_known(precision["large"]),
        recall50_95=mean_of_known(curves["all"].recall[:, label]),
    )


def _curve(curves: PrecisionRecall, label: int) -> Curve:
    return Curve(tuple(curves.precision[0, :, label].tolist()), tuple(curves.score[0, :, label].tolist()))


def confusion_matrix(detections: Detections, image_set: ImageSet, score_threshold: float) -> ConfusionMatrix:
    """Detections of at least this score, matched at IoU 0.5: first within each class, and what is left over
    with the boxes of any class that are left over, which shows what is taken for what.
    """
    confident = detections.select(detections.scores >= score_threshold)
    truth, background = image_set.all_boxes(), len(image_set.class_names)
    same = match(confident, truth, iou_thresholds=IOU_HALF, max_detections=len(confident) + 1)
    matched = same.truth[0].copy()
    open_truth = ~truth.is_crowd
    open_truth[matched[matched >= 0]] = False
    left = np.flatnonzero(matched < 0)
    other = match(
        confident.select(left),
        truth.select(open_truth),
        iou_thresholds=IOU_HALF,
        max_detections=len(confident) + 1,
        within_class=False,
    )
    found = other.truth[0] >= 0
    matched[left[found]] = np.flatnonzero(open_truth)[other.truth[0][found]]
    counts = np.zeros((background + 1, background + 1), np.int64)
    counted = ~same.ignored[0]
    true_labels = np.where(matched >= 0, np.append(truth.labels, background)[matched], background)
    np.add.at(counts, (true_labels[counted], confident.labels[counted]), 1)
    missed = ~truth.is_crowd
    missed[matched[matched >= 0]] = False
    counts[:, background] += np.bincount(truth.labels[missed], minlength=background + 1)
    return ConfusionMatrix(image_set.class_names, tuple(map(tuple, counts.tolist())), score_threshold)


__all__ = [
    "AREA_RANGES",
    "SUMMARY",
    "ClassAccuracy",
    "ConfusionMatrix",
    "Curve",
    "DetectionMetrics",
    "Detections",
    "Predict",
    "PseudoLabelQuality",
    "above_thresholds",
    "class_thresholds",
    "confusion_matrix",
    "detect",
    "evaluate",
    "pseudo_label_quality",
    "torch_predictor",
]
