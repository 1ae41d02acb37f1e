"""A teacher's detections as labels, and what the mirrored image says about them.

Legend: B batch, S input size, A anchors, C classes, N detections, P pairs of a detection and a mirrored one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

from model.data.image_set import BoxColumns, ImageSet, OpenImage
from model.data.loader import evaluation_batches
from model.detections import Detections, detections_in_original_pixels
from model.evaluation import Predict
from model.head import STRIDES
from model.matching import Pairs, meet
from model.preprocessing import Preprocessing

FlipConsistency = Literal["none", "keep", "weight", "average"]
FLIP_MODES: tuple[FlipConsistency, ...] = get_args(FlipConsistency)

SAME_OBJECT_IOU = 0.5
CONFIRMING_SHARE = 0.5  # of a detection's score that the mirrored image must reach
LOWEST_MIRRORED_SCORE = 0.05  # fixed: a threshold chosen by one caller must mean the same to the next

Outputs = tuple[Float[NDArray[np.float32], "B A 4"], Float[NDArray[np.float32], "B A C"]]


def detect_for_labels(
    predict: Predict,
    image_set: ImageSet,
    open_image: OpenImage,
    preprocessing: Preprocessing,
    modes: Sequence[FlipConsistency],
    *,
    batch_size: int = 16,
    score_threshold: float = 0.01,
) -> dict[FlipConsistency, Detections]:
    """The set's detections as each mode of flip consistency judges them, boxes in original pixels.

    "none": the image as it is.  "keep": those that the mirrored image confirms (same class, IoU of at least 0.5 and
    half the score).  "weight": all; the score becomes the lower of both views' times the IoU of the two boxes, 0
    without a partner.  "average": the mean of both views' scores and boxes at every anchor, before suppression.  That
    detections in an image and in its mirror image should agree is from CSD (Jeong et al., NeurIPS 2019), where the
    disagreement is a loss.

    An image is read once, and ``predict`` sees it once more for all modes but "none".
    """
    rows: dict[str, list[NDArray[np.float32]]] = {"plain": [], "mirrored": [], "mean": []}
    for images, letterboxes, _ in evaluation_batches(image_set, open_image, preprocessing, batch_size):
        views = _views(predict, images, with_mirror=set(modes) != {"none"})
        for view, (boxes_xyxy, scores) in views.items():
            rows[view] += detections_in_original_pixels(
                boxes_xyxy,
                scores,
                letterboxes,
                score_threshold=LOWEST_MIRRORED_SCORE if view == "mirrored" else score_threshold,
                iou_threshold=0.7,
                max_detections=300,
            )
    plain, mirrored, mean = (Detections.from_rows(rows[view]) for view in ("plain", "mirrored", "mean"))
    judged: dict[FlipConsistency, Detections] = {}
    for mode in modes:
        judged[mode] = mean if mode == "average" else judged_by_mirror(plain, mirrored, mode)
    return judged


def _views(predict: Predict, images: NDArray[np.uint8], with_mirror: bool) -> dict[str, Outputs]:
    plain = predict(images)
    if not with_mirror:
        return {"plain": plain}
    boxes_xyxy, scores = mirror_outputs(*predict(np.ascontiguousarray(images[..., ::-1])), images.shape[-1])
    half = np.float32(0.5)
    mean = ((plain[0] + boxes_xyxy) * half, (plain[1] + scores) * half)
    return {"plain": plain, "mirrored": (boxes_xyxy, scores), "mean": mean}


def mirror_outputs(
    boxes_xyxy: Float[NDArray[np.float32], "B A 4"], scores: Float[NDArray[np.float32], "B A C"], input_size: int
) -> Outputs:
    """What a network says of mirrored square images, in the frame and the anchor order of the images themselves."""
    boxes_xyxy = boxes_xyxy[..., [2, 1, 0, 3]] * np.array([-1, 1, -1, 1], np.float32)
    boxes_xyxy[..., [0, 2]] += input_size
    anchors = _mirrored_anchors(input_size)
    return boxes_xyxy[:, anchors], scores[:, anchors]


def _mirrored_anchors(input_size: int) -> NDArray[np.int64]:
    """(A,) for each anchor the one at the mirrored place of its level."""
    parts, first = [], 0
    for side in (input_size // stride for stride in STRIDES):
        parts.append(first + np.arange(side * side).reshape(side, side)[:, ::-1].ravel())
        first += side * side
    return np.concatenate(parts)


def judged_by_mirror(plain: Detections, mirrored: Detections, mode: FlipConsistency) -> Detections:
    """The detections of ``plain`` that a mode keeps, with the scores it gives them ("average" is made before)."""
    if mode == "none":
        return plain
    pairs = _pairs(plain, mirrored)
    ours, theirs = plain.scores[pairs.detection], mirrored.scores[pairs.truth]
    if mode == "keep":
        confirmed = np.zeros(len(plain), np.bool_)
        confirmed[pairs.detection[theirs >= CONFIRMING_SHARE * ours]] = True
        return plain.select(confirmed)
    scores = np.zeros(len(plain), np.float32)
    np.maximum.at(scores, pairs.detection, np.minimum(ours, theirs) * pairs.iou.astype(np.float32))
    order = np.lexsort((-scores, plain.image_index))
    return Detections(plain.image_index, plain.boxes_xyxy, scores, plain.labels).select(order)


def _pairs(plain: Detections, mirrored: Detections) -> Pairs:
    """Detections of the same image and class in both views that overlap as one object does."""
    sides = mirrored.boxes_xyxy[:, 2:].astype(np.float64) - mirrored.boxes_xyxy[:, :2]
    columns = BoxColumns(
        image_index=mirrored.image_index,
        boxes_xywh=np.concatenate([mirrored.boxes_xyxy[:, :2].astype(np.float64), sides], axis=1),
        labels=mirrored.labels,
        scores=mirrored.scores,
        is_crowd=np.zeros(len(mirrored), np.bool_),
        area=sides.prod(axis=1),
    )
    every = len(plain) + 1
    return meet(plain, columns, minimum_iou=SAME_OBJECT_IOU, max_detections=every, within_class=True).pairs
