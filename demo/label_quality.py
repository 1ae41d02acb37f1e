"""How good the demo's pseudo-labels are: they are compared with the boxes the generator kept back.

The pipeline itself never reads `hidden_truth.json`; only this comparison, after the run, does.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SAME_BOX = 0.5
"""Intersection over union from which a pseudo-box counts as the true box."""


@dataclass(frozen=True)
class LabelQuality:
    """Counts of boxes: kept by the pipeline, right among them, and there in truth."""

    kept: int
    right: int
    truth: int

    def sentence(self) -> str:
        """Count, precision and recall in words."""
        precision, recall = self.right / max(self.kept, 1), self.right / max(self.truth, 1)
        return (
            f"{self.kept} boxes kept; against the hidden truth (IoU {SAME_BOX}) "
            f"precision {precision:.3f}, recall {recall:.3f} of {self.truth}"
        )


def label_quality(tables: Path, hidden_truth: Path) -> LabelQuality:
    """Compare published pseudo-label tables with the true boxes, picture by picture."""
    from model.data.tables import read_dataset

    truth = _true_boxes(json.loads(hidden_truth.read_text(encoding="utf-8")))
    images = read_dataset(tables).image_set()
    kept = right = 0
    for index in range(len(images)):
        found = images.boxes(index)
        names = [images.class_names[label] for label in found.labels]
        right += _count_right(found.boxes_xyxy, names, truth.get(Path(images.path(index)).name, []))
        kept += len(names)
    return LabelQuality(kept, right, sum(len(boxes) for boxes in truth.values()))


def _true_boxes(coco: dict[str, Any]) -> dict[str, list[tuple[str, list[float]]]]:
    """Class name and xywh box of each object, by file name."""
    files = {image["id"]: image["file_name"] for image in coco["images"]}
    names = {category["id"]: category["name"] for category in coco["categories"]}
    boxes: dict[str, list[tuple[str, list[float]]]] = {}
    for entry in coco["annotations"]:
        boxes.setdefault(files[entry["image_id"]], []).append((names[entry["category_id"]], entry["bbox"]))
    return boxes


def _count_right(found_xyxy: Any, names: list[str], truth: list[tuple[str, list[float]]]) -> int:
    """Each true box is found once at most, by the first pseudo-box (they come in falling score) that covers it."""
    import numpy as np

    from model.boxes import box_iou, xywh_to_xyxy

    if not truth or not names:
        return 0
    true_xyxy = xywh_to_xyxy(np.array([box for _, box in truth], dtype=np.float64))
    overlap = box_iou(np.asarray(found_xyxy, dtype=np.float64), true_xyxy)  # (found, truth)
    overlap[np.array(names)[:, None] != np.array([name for name, _ in truth])[None, :]] = 0
    right = 0
    for row in overlap:
        best = int(row.argmax())
        if row[best] >= SAME_BOX:
            right += 1
            overlap[:, best] = 0
    return right
