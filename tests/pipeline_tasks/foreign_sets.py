"""Small sets in the formats of others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np

OBJECT = (
    "<object><name>{name}</name><bndbox>"
    "<xmin>{0}</xmin><ymin>{1}</ymin><xmax>{2}</xmax><ymax>{3}</ymax></bndbox></object>"
)


def write_picture(path: Path, seed: int, width: int = 48, height: int = 32) -> None:
    """A picture of noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), pixels)


def write_voc(folder: Path, stem: str, *boxes: tuple[str, int, int, int, int], filename: str | None = None) -> None:
    objects = "\n".join(OBJECT.format(*box, name=name) for name, *box in boxes)
    file = folder / f"Annotations/{stem}.xml"
    file.parent.mkdir(parents=True, exist_ok=True)
    size = "<size><width>48</width><height>32</height></size>"
    file.write_text(f"<annotation><filename>{filename or stem + '.jpg'}</filename>{size}\n{objects}\n</annotation>")


def write_yolo(folder: Path, name: str, lines: str | None) -> None:
    write_picture(folder / "images" / f"{name}.jpg", seed=len(name))
    if lines is not None:
        file = folder / "labels" / f"{name}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(lines)


def write_objects365(folder: Path, categories: list[dict[str, Any]], name: str = "zhiyuan_objv2_train.json") -> None:
    names = ("images/v1/patch8/objects365_v1_00000001.jpg", "images/v2/patch16/objects365_v2_00000002.jpg")
    write_picture(folder / "train/patch8/objects365_v1_00000001.jpg", 1)
    write_picture(folder / "train/patch16/objects365_v2_00000002.jpg", 2)
    images = [{"id": i, "file_name": n, "width": 48, "height": 32} for i, n in enumerate(names, 1)]
    boxes = [
        {"id": i, "image_id": i, "category_id": c["id"], "bbox": [1.5, 2, 3, 4], "area": 12, "iscrowd": 0, "isfake": 0}
        for i, c in enumerate(categories, 1)
    ]
    (folder / name).write_text(json.dumps({"images": images, "annotations": boxes, "categories": categories}))
