"""The real sets of the benchmarks as validated tables, and the figures that every trained detector is given."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from model.average_precision import mean_of_known, precision_recall
from model.data.image_set import ImageSet, OpenImage
from model.data.tables import read_dataset
from model.detections import Detections
from model.evaluation import evaluate
from model.matching import match

REPOSITORY = Path(__file__).resolve().parent.parent
RESAMPLES = 200
RESAMPLING_SEED = 20260301
CACHE = Path(tempfile.gettempdir()) / "nasline-benchmarks"


@dataclass(frozen=True)
class PhotoSet:
    """A labelled set: its splits, and how its pictures are opened."""

    name: str
    folder: Path
    train: ImageSet
    validation: ImageSet
    test: ImageSet
    open_image: OpenImage


def shared_data() -> Path:
    """Folder of the real sets: NASLINE_SHARED/data."""
    return Path(os.environ.get("NASLINE_SHARED", REPOSITORY.parent / "shared")).resolve() / "data"


def load(name: str) -> PhotoSet:
    """One of bccd, aquarium, playing_cards and pretrain_general, validated once and then read from a cache."""
    from pipeline_tasks.images import make_open_image

    folder, tables = shared_data() / name, CACHE / "tables" / name / "target"
    if not (tables / "dataset.json").exists():
        _validate(name, folder, tables.parent)
    dataset = read_dataset(tables)
    train, validation, test = (dataset.split(split) for split in ("train", "val", "test"))
    return PhotoSet(name, folder, train, validation, test, make_open_image({"target": folder}))


def _validate(name: str, folder: Path, output: Path) -> None:
    from pipeline_tasks.data.coco import read_coco_folder
    from pipeline_tasks.validation import ValidationLimits, validate

    raw = {"target": read_coco_folder(folder, "target")}
    validate(raw, {"target": folder}, ValidationLimits(), output, threads=1)


def figures(found: Detections, images: ImageSet) -> dict[str, Any]:
    """COCO figures, and mAP50-95 on resamples of the images that are the same for every detector on the set.

    The difference of two rows' resamples is a paired bootstrap (Efron & Tibshirani 1993, chapter 16).
    """
    metrics = evaluate(found, images)
    return {
        "map50_95": round(metrics.map50_95, 4),
        "map50": round(metrics.map50, 4),
        "map75": round(metrics.map75, 4),
        "images": len(images),
        "resampled_map50_95": resampled_map(found, images),
    }


def resampled_map(found: Detections, images: ImageSet) -> list[float]:
    """mAP50-95 of each resample, over the classes that it shows."""
    matches, classes = match(found, images.all_boxes()), len(images.class_names)
    random = np.random.default_rng(RESAMPLING_SEED)
    values = []
    for _ in range(RESAMPLES):
        rows = random.integers(0, len(images), len(images))
        curves = precision_recall(matches, classes, np.bincount(rows, minlength=len(images)))
        values.append(round(mean_of_known(curves.precision), 4))
    return values
