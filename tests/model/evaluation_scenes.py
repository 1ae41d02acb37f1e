"""Image sets, detections and the reference evaluation that tests of the metrics share."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np

from model.data.image_set import ImageSet
from model.detections import Detections


def coco_set(folder: Path, split: str) -> ImageSet:
    """A COCO file as it stands; masks' areas are kept."""
    content = json.loads((folder / "annotations" / f"instances_{split}.json").read_text(encoding="utf-8"))
    images = {record["id"]: index for index, record in enumerate(content["images"])}
    classes = {record["id"]: index for index, record in enumerate(content["categories"])}
    boxes = sorted(content["annotations"], key=lambda record: images[record["image_id"]])
    made = ImageSet.from_arrays(
        [record["name"] for record in content["categories"]],
        [f"target/images/{record['file_name']}" for record in content["images"]],
        [(record["width"], record["height"]) for record in content["images"]],
        [images[record["image_id"]] for record in boxes],
        [record["bbox"] for record in boxes],
        [classes[record["category_id"]] for record in boxes],
        is_crowd=[bool(record["iscrowd"]) for record in boxes],
    )
    made._columns.area[:] = [record["area"] for record in boxes]
    return made


def disturbed(images: ImageSet, seed: int, ties: bool) -> Detections:
    """Ground truth with a tenth lost, half doubled, edges shaken, some classes swapped, and as many inventions."""
    random = np.random.default_rng(seed)
    truth = images.all_boxes()
    count = len(truth.labels)
    rows = np.concatenate([np.flatnonzero(random.random(count) < 0.9), random.integers(count, size=count // 2)])
    sides = np.tile(truth.boxes_xywh[rows, 2:], 2)
    boxes = truth.boxes_xyxy[rows] + random.normal(0, 0.08, (len(rows), 4)) * sides
    boxes[:, 2:] = np.maximum(boxes[:, 2:], boxes[:, :2] + 1)
    corners = random.uniform(0, 400, (count, 2))
    invented = np.concatenate([corners, corners + random.uniform(3, 200, (count, 2))], axis=1)
    swapped = random.random(len(rows)) < 0.1
    any_label = random.integers(len(images.class_names), size=len(rows) + count)
    labels = np.where(swapped, any_label[: len(rows)], truth.labels[rows])
    scores = random.random(len(rows) + count)
    return Detections(
        np.concatenate([truth.image_index[rows], random.integers(len(images), size=count)]),
        np.concatenate([boxes, invented]).astype(np.float32),
        (np.round(scores, 1) if ties else scores).astype(np.float32),
        np.concatenate([labels, any_label[len(rows) :]]),
    )


def plentiful(images: ImageSet, per_image: int, seed: int) -> Detections:
    """As many detections as a detector gives at a low score threshold, with the equal scores of an INT8 engine.

    About three around each box, better scored where they fit better, a tenth of them of another class; the rest
    invented, with low scores.
    """
    random = np.random.default_rng(seed)
    truth = images.all_boxes()
    rows = np.repeat(np.arange(len(truth.labels)), random.poisson(3.0, len(truth.labels)))
    spread = random.exponential(0.08, len(rows))
    shaken = truth.boxes_xyxy[rows] + random.normal(0, 1, (len(rows), 4)) * spread[:, None] * np.tile(
        truth.boxes_xywh[rows, 2:], 2
    )
    model = random.integers(len(truth.labels), size=max(0, per_image * len(images) - len(rows)))
    places = random.integers(len(images), size=len(model))
    corners = random.random((len(model), 2)) * images.sizes[places] * 0.8
    sides = truth.boxes_xywh[model, 2:] * np.exp(random.normal(0, 0.5, (len(model), 2)))
    boxes = np.concatenate([shaken, np.concatenate([corners, corners + sides], axis=1)])
    boxes[:, 2:] = np.maximum(boxes[:, 2:], boxes[:, :2] + 1)
    scores = np.concatenate([random.beta(2, 2, len(rows)) * np.exp(-6 * spread), random.beta(0.5, 8, len(model))]).clip(
        0.01
    )
    swapped = random.random(len(rows)) < 0.1
    labels = np.where(swapped, random.integers(len(images.class_names), size=len(rows)), truth.labels[rows])
    return Detections(
        np.concatenate([truth.image_index[rows], places]),
        boxes.astype(np.float32),
        (np.ceil(scores * 256) / 256).astype(np.float32),
        np.concatenate([labels, truth.labels[model]]),
    )


def pycocotools_evaluation(images: ImageSet, detections: Detections) -> Any:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    truth = images.all_boxes()
    columns = zip(truth.image_index, truth.labels, truth.boxes_xywh, truth.area, truth.is_crowd, strict=True)
    annotations = [
        {"id": row + 1, "image_id": int(i), "category_id": int(c), "bbox": b.tolist(), "area": a, "iscrowd": int(d)}
        for row, (i, c, b, a, d) in enumerate(columns)
    ]
    boxes = detections.boxes_xyxy.astype(np.float64)
    boxes[:, 2:] -= boxes[:, :2]
    found = zip(detections.image_index, detections.labels, boxes.tolist(), detections.scores, strict=True)
    results = [{"image_id": int(i), "category_id": int(c), "bbox": b, "score": float(s)} for i, c, b, s in found]
    with contextlib.redirect_stdout(io.StringIO()):
        reference = COCO()
        reference.dataset = {
            "info": {},
            "images": [{"id": index} for index in range(len(images))],
            "categories": [{"id": label} for label in range(len(images.class_names))],
            "annotations": annotations,
        }
        reference.createIndex()
        evaluation = COCOeval(reference, reference.loadRes(results), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation


SCENE = ImageSet.from_arrays(
    ("cat", "dog", "bird"),
    ["t/0.jpg", "t/1.jpg", "t/2.jpg"],
    [(100, 100)] * 3,
    [0, 0, 1, 1, 1],
    [(0, 0, 20, 20), (50, 50, 40, 40), (0, 0, 20, 20), (30, 30, 50, 50), (0, 60, 30, 30)],
    [0, 1, 0, 1, 0],
    is_crowd=[False, False, False, False, True],
)


def found(*rows: tuple[int, tuple[int, int, int, int], float, int]) -> Detections:
    """image, xyxy, score, label"""
    return Detections(
        np.array([row[0] for row in rows], np.int64),
        np.array([row[1] for row in rows], np.float32).reshape(-1, 4),
        np.array([row[2] for row in rows], np.float32),
        np.array([row[3] for row in rows], np.int64),
    )


CAT_0, DOG_0 = (0, 0, 20, 20), (50, 50, 90, 90)
CAT_1, DOG_1, CROWD_1 = (0, 0, 20, 20), (30, 30, 80, 80), (2, 62, 25, 85)
