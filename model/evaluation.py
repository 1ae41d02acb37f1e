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

from model.data.image_set import ImageSet, OpenImage
from model.data.loader import evaluation_batches
from model.detections import Detections, detections_in_original_pixels
from model.matching import COCO_IOU_THRESHOLDS, RECALL_POINTS, Matches, match, precision_recall
from model.preprocessing import Preprocessing

Predict = Callable[[NDArray[np.uint8]], tuple[NDArray[np.float32], NDArray[np.float32]]]
"""Pictures uint8 (B, 3, S, S) to boxes_xyxy float32 (B, A, 4) in input pixels and scores float32 (B, A,
C).
"""

AREA_RANGES = {
    "small": (0.0, 32.0**2),
    "medium": (32.0**2, 96.0**2),
    "large": (96.0**2, 1e10),
}  # square pixels
IOU_HALF = np.array([0.5])


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
class DetectionMetrics:
    """Accuracy on one image set; fractions from 0 to 1, NaN where the set has no such boxes.

    ``map*`` are COCO's (arXiv:1405.0312): mean over classes with ground truth, 101 recall points, at most 100
    detections of a class in an image, IoU 0.50:0.95 unless named.  Sizes: below 32^2, to 96^2, above, by the
    annotated area.
    """

    map50_95: float
    map50: float
    map75: float
    map_small: float
    map_medium: float
    map_large: float
    recall50_95: float  # COCO's AR at 100 detections
    per_class_ap: dict[str, float]  # IoU 0.50:0.95; only classes with ground truth
    per_class_ap50: dict[str, float]
    curves: dict[str, Curve]
    confusion: ConfusionMatrix
    image_count: int
    box_count: int  # without crowd regions

    def scalars(self) -> dict[str, float]:
        """The numbers to log; those the set cannot show are left out."""
        names = ("map50_95", "map50", "map75", "map_small", "map_medium", "map_large", "recall50_95")
        values = {name: float(getattr(self, name)) for name in names}
        values |= {f"ap/{name}": value for name, value in self.per_class_ap.items()}
        return {name: value for name, value in values.items() if not math.isnan(value)}

    def to_json(self) -> dict[str, Any]:
        """Everything, ready for ``json.dumps``; NaN becomes None."""
        content: dict[str, Any] = _without_nan(asdict(self))
        return content


def evaluate(detections: Detections, image_set: ImageSet, *, confusion_score: float = 0.25) -> DetectionMetrics:
    """Compare detections with the set's ground truth. ``confusion_score`` is the confusion matrix'
    threshold.
    """
    _check(detections, image_set)
    truth, class_count = image_set.all_boxes(), len(image_set.class_names)
    matches = match(detections, truth)
    curves = precision_recall(matches, class_count)
    average = curves.average_precision()  # (T, C)
    present = [(label, name) for label, name in enumerate(image_set.class_names) if not np.isnan(average[0, label])]
    sizes = {
        name: precision_recall(match(detections, truth, area_range=limits), class_count).average_precision()
        for name, limits in AREA_RANGES.items()
    }
    return DetectionMetrics(
        map50_95=_mean(average),
        map50=_mean(average[0]),
        map75=_mean(average[5]),
        map_small=_mean(sizes["small"]),
        map_medium=_mean(sizes["medium"]),
        map_large=_mean(sizes["large"]),
        recall50_95=_mean(curves.recall),
        per_class_ap={name: float(average[:, label].mean()) for label, name in present},
        per_class_ap50={name: float(average[0, label]) for label, name in present},
        curves={
            name: Curve(tuple(curves.precision[0, :, label].tolist()), tuple(curves.score[0, :, label].tolist()))
            for label, name in present
        },
        confusion=confusion_matrix(detections, image_set, confusion_score),
        image_count=len(image_set),
        box_count=int((~truth.is_crowd).sum()),
    )


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


def class_thresholds(
    detections: Detections,
    image_set: ImageSet,
    minimum_precision: float = 0.0,
    *,
    iou_threshold: float = 0.5,
    lowest: float = 0.05,
    without_truth: float = 1.0,
) -> dict[str, float]:
    """For each class the score from which on detections have the best F1 with at least ``minimum_precision``.

    Precision counts detections that match a box with ``iou_threshold``. No threshold is below ``lowest``. A
    class that never reaches the precision gets 1.0, which lets nothing through; one without boxes in this set
    gets ``without_truth``. Choose them on a validation split: on training images the detector is too sure.
    """
    for name, value in (("minimum_precision", minimum_precision), ("lowest", lowest)):
        if not 0 <= value <= 1:
            raise ValueError(f"{name} must be between 0 and 1, got {value}")
    _check(detections, image_set)
    confident = detections.select(detections.scores >= lowest)
    matches = match(confident, image_set.all_boxes(), iou_thresholds=np.array([iou_threshold]))
    totals = np.bincount(matches.truth_labels[~matches.truth_ignored], minlength=len(image_set.class_names))
    return {
        name: _best_threshold(matches, label, int(totals[label]), minimum_precision, lowest)
        if totals[label]
        else without_truth
        for label, name in enumerate(image_set.class_names)
    }


def _best_threshold(matches: Matches, label: int, total: int, minimum_precision: float, lowest: float) -> float:
    """Between the last score that is worth keeping and the next lower one."""
    rows = np.flatnonzero((matches.labels == label) & ~matches.ignored[0])
    rows = rows[np.argsort(-matches.scores[rows], kind="stable")]
    scores = matches.scores[rows].astype(np.float64)
    correct = np.cumsum(matches.correct[0, rows])
    precision = correct / np.arange(1, len(rows) + 1)
    f1 = 2 * correct / (np.arange(1, len(rows) + 1) + total)
    last_of_score = np.append(scores[1:] < scores[:-1], True)[: len(rows)]
    allowed = last_of_score & (precision >= minimum_precision) & (correct > 0)
    if not allowed.any():
        return 1.0
    best = int(np.argmax(np.where(allowed, f1, -1.0)))
    below = scores[best + 1] if best + 1 < len(scores) else lowest
    return float((scores[best] + below) / 2)


@dataclass(frozen=True)
class PseudoLabelQuality:
    """Boxes above the thresholds compared with true boxes at IoU 0.5; NaN where nothing was kept or is
    there.
    """

    precision: float
    recall: float
    kept: int
    correct: int
    truth: int
    per_class: dict[str, dict[str, float]]  # class -> precision, recall, kept, truth

    def to_json(self) -> dict[str, Any]:
        content: dict[str, Any] = _without_nan(asdict(self))
        return content


def pseudo_label_quality(
    detections: Detections, image_set: ImageSet, thresholds: dict[str, float]
) -> PseudoLabelQuality:
    """What the detections above ``thresholds`` (one per class) are worth as labels of this set."""
    _check(detections, image_set)
    kept = detections.select(above_thresholds(detections, image_set.class_names, thresholds))
    matches = match(kept, image_set.all_boxes(), iou_thresholds=IOU_HALF, max_detections=len(kept) + 1)
    class_count = len(image_set.class_names)
    counted = np.bincount(matches.labels[~matches.ignored[0]], minlength=class_count)
    correct = np.bincount(matches.labels[matches.correct[0]], minlength=class_count)
    truth = np.bincount(matches.truth_labels[~matches.truth_ignored], minlength=class_count)
    per_class = {
        name: {
            "precision": _ratio(correct[label], counted[label]),
            "recall": _ratio(correct[label], truth[label]),
            "kept": float(counted[label]),
            "truth": float(truth[label]),
        }
        for label, name in enumerate(image_set.class_names)
    }
    return PseudoLabelQuality(
        precision=_ratio(correct.sum(), counted.sum()),
        recall=_ratio(correct.sum(), truth.sum()),
        kept=int(counted.sum()),
        correct=int(correct.sum()),
        truth=int(truth.sum()),
        per_class=per_class,
    )


def above_thresholds(
    detections: Detections, class_names: tuple[str, ...], thresholds: dict[str, float]
) -> NDArray[np.bool_]:
    """(N,) detections whose score is at least their class's threshold; ``ValueError`` for a class without
    one.
    """
    if missing := [name for name in class_names if name not in thresholds]:
        raise ValueError(f"no score threshold for the classes {missing}; thresholds exist for {sorted(thresholds)}")
    limits = np.array([thresholds[name] for name in class_names])
    above: NDArray[np.bool_] = detections.scores >= limits[detections.labels]
    return above


def _check(detections: Detections, image_set: ImageSet) -> None:
    if len(detections) and int(detections.image_index.max()) >= len(image_set):
        raise ValueError(f"detections name image {detections.image_index.max()}, the set has {len(image_set)} images")
    if len(detections) and int(detections.labels.max()) >= len(image_set.class_names):
        raise ValueError(
            f"detections name class {detections.labels.max()}, the set has only {len(image_set.class_names)} classes"
        )


def _mean(values: NDArray[np.float64]) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else math.nan


def _ratio(part: Any, whole: Any) -> float:
    return float(part / whole) if whole else math.nan


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value


__all__ = [
    "AREA_RANGES",
    "COCO_IOU_THRESHOLDS",
    "RECALL_POINTS",
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
