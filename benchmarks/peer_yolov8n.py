"""Trains Ultralytics' YOLOv8n from scratch on one of the real sets and stores what it finds on the test split.

A process of its own: it runs with the peer's packages on PYTHONPATH (see against_yolov8n.py). One thread, as the
peer itself chooses on two cores, and no loader processes, so that CPU time is all the time there is.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np

SPLITS = {"train": "train", "val": "val", "test": "test"}


def main() -> None:
    """Train, predict on validation and test images, write detections.npz and run.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("dataset", type=Path, help="set in COCO layout")
    parser.add_argument("output", type=Path)
    parser.add_argument("--epochs", type=int, required=True)
    parser.add_argument("--image-size", type=int, default=320)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--options", type=json.loads, default={}, help="the peer's own training options as JSON")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    os.environ["YOLO_CONFIG_DIR"] = str(arguments.output)
    os.environ["YOLO_OFFLINE"] = "true"
    weights, seconds = train(arguments)
    predict(arguments, weights)
    (arguments.output / "run.json").write_text(json.dumps({"cpu_seconds": seconds}))


def train(arguments: argparse.Namespace) -> tuple[Path, float]:
    """The peer's best weights and the CPU seconds its training took, validation included."""
    import torch
    from ultralytics import YOLO, settings

    torch.set_num_threads(1)
    settings.update({"sync": False, "mlflow": False})
    description = convert(arguments.dataset, arguments.output / "data")
    began = time.process_time()
    model = YOLO("yolov8n.yaml")
    model.train(
        data=str(description),
        epochs=arguments.epochs,
        imgsz=arguments.image_size,
        seed=arguments.seed,
        device="cpu",
        workers=0,
        pretrained=False,
        plots=False,
        project=str(arguments.output.resolve()),
        name="run",
        exist_ok=True,
        **arguments.options,
    )
    return arguments.output / "run" / "weights" / "best.pt", time.process_time() - began


def convert(dataset: Path, folder: Path) -> Path:
    """The set in the peer's layout: links to the pictures, and a text file of relative boxes for each."""
    names: list[str] = []
    for split in SPLITS:
        content = json.loads((dataset / "annotations" / f"instances_{split}.json").read_text(encoding="utf-8"))
        names = [category["name"] for category in sorted(content["categories"], key=lambda one: one["id"])]
        _convert_split(content, dataset, folder, split)
    description = folder / "data.yaml"
    lines = [f"path: {folder.resolve()}", *(f"{split}: images/{split}" for split in SPLITS), "names:"]
    description.write_text("\n".join([*lines, *(f"  {i}: {json.dumps(name)}" for i, name in enumerate(names))]) + "\n")
    return description


def _convert_split(content: dict[str, Any], dataset: Path, folder: Path, split: str) -> None:
    images, labels = folder / "images" / split, folder / "labels" / split
    images.mkdir(parents=True, exist_ok=True)
    labels.mkdir(parents=True, exist_ok=True)
    index = {category["id"]: i for i, category in enumerate(sorted(content["categories"], key=lambda one: one["id"]))}
    lines: dict[int, list[str]] = {image["id"]: [] for image in content["images"]}
    sizes = {image["id"]: (image["width"], image["height"]) for image in content["images"]}
    for box in content["annotations"]:
        (x, y, w, h), (width, height) = box["bbox"], sizes[box["image_id"]]
        values = ((x + w / 2) / width, (y + h / 2) / height, w / width, h / height)
        lines[box["image_id"]].append(" ".join([str(index[box["category_id"]]), *(f"{v:.6f}" for v in values)]))
    for image in content["images"]:
        link = images / Path(image["file_name"]).name
        if not link.exists():
            link.symlink_to((dataset / "images" / image["file_name"]).resolve())
        (labels / f"{link.stem}.txt").write_text("\n".join(lines[image["id"]]) + "\n")


def predict(arguments: argparse.Namespace, weights: Path) -> None:
    """Detections of the peer's own predictor, as it validates: score from 0.001, IoU 0.7, at most 300 an image."""
    from ultralytics import YOLO

    model = YOLO(str(weights))
    tables: dict[str, np.ndarray[Any, Any]] = {}
    for split in ("val", "test"):
        content = json.loads((arguments.dataset / "annotations" / f"instances_{split}.json").read_text("utf-8"))
        for image in content["images"]:
            path = str(arguments.dataset / "images" / image["file_name"])
            (found,) = model.predict(
                path, imgsz=arguments.image_size, conf=0.001, iou=0.7, max_det=300, device="cpu", verbose=False
            )
            boxes = found.boxes
            rows = np.concatenate([boxes.xyxy, boxes.conf[:, None], boxes.cls[:, None]], axis=1).astype(np.float32)
            tables[f"{split}/{image['file_name']}"] = rows
    np.savez_compressed(arguments.output / "detections.npz", **tables)


if __name__ == "__main__":
    main()
