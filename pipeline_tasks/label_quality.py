"""What published pseudo-labels are worth: they are compared with true boxes that nothing has learned from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline_tasks.errors import DataError

if TYPE_CHECKING:
    from model.data.image_set import BoxColumns, ImageSet
    from model.detections import Detections
    from model.score_thresholds import PseudoLabelQuality


def label_quality(tables: Path, true_boxes: Path) -> PseudoLabelQuality:
    """Precision and recall of a folder of pseudo-label tables against a COCO annotation file, at IoU 0.5.

    Pictures are told by their file names below `images/`, classes by their names; pictures that the file does not list
    are left out, and so are true boxes of classes that the tables do not have.

    Raises:
        DataError: the file is no COCO annotation file, or lists none of the labelled pictures.
    """
    from model.data.tables import read_dataset
    from model.evaluation import pseudo_label_quality

    labels, truth = _compared(true_boxes, read_dataset(tables).image_set())
    if not len(labels):
        raise DataError(f"{true_boxes} lists none of the pictures that were labelled; compare the file names")
    every = dict.fromkeys(labels.class_names, 0.0)  # the tables hold only what was above the thresholds
    return pseudo_label_quality(_as_detections(labels.all_boxes()), truth, every)


def require_true_boxes(true_boxes: Path) -> None:
    """Read the file as if all pictures and classes that it lists had been labelled: nothing in it is passed over.

    Raises:
        DataError: the file is no COCO annotation file, or lists no picture.
    """
    labels, _ = _compared(true_boxes, None)
    if not len(labels):
        raise DataError(f"{true_boxes} lists no pictures; give the COCO annotation file of the pictures to be labelled")


def _compared(true_boxes: Path, labels: ImageSet | None) -> tuple[ImageSet, ImageSet]:
    """What `_on_common_images` gives; None stands for labels on everything in the file."""
    coco = _read(true_boxes)
    try:
        return _on_common_images(_all_listed(coco) if labels is None else labels, coco)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise DataError(f"{true_boxes} is no COCO annotation file: {error!r} in its records; give one") from None


def _all_listed(coco: dict[str, Any]) -> ImageSet:
    """Its pictures without a box; nobody asks for their sizes."""
    from model.data.image_set import ImageSet

    names = dict.fromkeys(category["name"] for category in coco["categories"])
    paths = [f"all/{image['file_name']}" for image in coco["images"]]
    return ImageSet.from_arrays(tuple(names), paths, [(1, 1)] * len(paths))


def _read(true_boxes: Path) -> dict[str, Any]:
    try:
        content = json.loads(true_boxes.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{true_boxes} cannot be read ({error}); give a COCO annotation file") from None
    if not isinstance(content, dict):
        raise DataError(f"{true_boxes} is no COCO annotation file: it holds a {type(content).__name__}; give one")
    return content


def _on_common_images(labels: ImageSet, coco: dict[str, Any]) -> tuple[ImageSet, ImageSet]:
    """The images that both know, in the tables' order: once with the labels, once with the true boxes."""
    from model.data.image_set import ImageSet

    listed = {image["file_name"].removeprefix("images/"): image["id"] for image in coco["images"]}
    names = [labels.path(row).partition("/")[2].removeprefix("images/") for row in range(len(labels))]
    labels = labels.subset([row for row, name in enumerate(names) if name in listed])
    places = {listed[name]: place for place, name in enumerate(name for name in names if name in listed)}
    classes = {name: label for label, name in enumerate(labels.class_names)}
    known = {entry["id"]: classes[entry["name"]] for entry in coco["categories"] if entry["name"] in classes}
    boxes = [box for box in coco["annotations"] if box["image_id"] in places and box["category_id"] in known]
    return labels, ImageSet.from_arrays(
        labels.class_names,
        [labels.path(row) for row in range(len(labels))],
        labels.sizes,
        [places[box["image_id"]] for box in boxes],
        [box["bbox"] for box in boxes],
        [known[box["category_id"]] for box in boxes],
        is_crowd=[bool(box.get("iscrowd", 0)) for box in boxes],
    )


def _as_detections(boxes: BoxColumns) -> Detections:
    import numpy as np

    from model.detections import Detections

    return Detections(boxes.image_index, boxes.boxes_xyxy.astype(np.float32), boxes.scores, boxes.labels)
