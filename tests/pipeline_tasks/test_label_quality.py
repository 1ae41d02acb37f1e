"""Published pseudo-labels against a COCO file that people drew."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from model.data.tables import BOXES_SCHEMA, IMAGES_SCHEMA, DatasetMetadata, write_dataset
from pipeline_tasks.errors import DataError
from pipeline_tasks.label_quality import label_quality

NAMES = ("cat", "dog")


def _row(image_id: int, category: int, x: float, score: float) -> dict[str, Any]:
    return {
        "image_id": image_id, "category": category, "x": x, "y": 0.0, "w": 10.0, "h": 10.0, "area": 100.0,
        "iscrowd": False, "score": score, "source": "pseudo", "annotation_id": "", "source_record": "teacher",
    }  # fmt: skip


@pytest.fixture
def tables(tmp_path: Path) -> Path:
    """Three images, two of them with labels."""
    images = [
        {
            "image_id": number, "original_id": name, "root": 0, "path": f"images/{name}", "width": 100, "height": 50,
            "split": "unlabeled", "sha256": None, "licence": None,
        }
        for number, name in enumerate(("a.jpg", "deep/b.jpg", "c.jpg"))
    ]  # fmt: skip
    boxes = [_row(0, 0, 0, 0.9), _row(0, 0, 1, 0.8), _row(0, 1, 50, 0.7), _row(1, 0, 20, 0.6), _row(2, 0, 0, 0.9)]
    pair = pa.Table.from_pylist(images, schema=IMAGES_SCHEMA), pa.Table.from_pylist(boxes, schema=BOXES_SCHEMA)
    write_dataset(tmp_path / "tables", *pair, DatasetMetadata("pseudo", NAMES, (1, 2), ("unlabeled",)))
    return tmp_path / "tables"


def _truth(path: Path, boxes: list[tuple[int, int, float]], files: dict[int, str]) -> Path:
    """Image id, category id (3 cat, 5 dog, 8 owl) and left edge of each box."""
    categories = [{"id": 3, "name": "cat"}, {"id": 5, "name": "dog"}, {"id": 8, "name": "owl"}]
    annotations = [
        {"id": number, "image_id": image, "category_id": category, "bbox": [x, 0, 10, 10]}
        for number, (image, category, x) in enumerate(boxes)
    ]
    images = [{"id": number, "file_name": name} for number, name in files.items()]
    path.write_text(json.dumps({"images": images, "categories": categories, "annotations": annotations}))
    return path


FILES = {7: "a.jpg", 8: "images/deep/b.jpg", 9: "elsewhere.jpg"}


def test_worked_example(tables: Path, tmp_path: Path) -> None:
    """Of four labels on the two known images one is a second on the same cat and one lies on nothing."""
    boxes = [(7, 3, 0.0), (7, 5, 51.0), (8, 3, 60.0), (8, 8, 20.0), (9, 3, 0.0)]
    quality = label_quality(tables, _truth(tmp_path / "truth.json", boxes, FILES))
    assert (quality.kept, quality.correct, quality.truth) == (4, 2, 3)
    assert quality.per_class["cat"] == {"precision": 1 / 3, "recall": 0.5, "kept": 3.0, "truth": 2.0}
    assert quality.per_class["dog"] == {"precision": 1.0, "recall": 1.0, "kept": 1.0, "truth": 1.0}


def test_a_box_of_the_wrong_class_is_no_match(tables: Path, tmp_path: Path) -> None:
    quality = label_quality(tables, _truth(tmp_path / "truth.json", [(7, 5, 0.0)], FILES))
    assert (quality.kept, quality.correct, quality.truth) == (4, 0, 1)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "is no COCO annotation file: it holds a list"),
        ("{", "cannot be read"),
        ('{"images": [], "categories": []}', "KeyError\\('annotations'\\)"),
        ('{"images": [{"id": 1}], "categories": [], "annotations": []}', "KeyError\\('file_name'\\)"),
        ('{"images": [], "categories": [], "annotations": []}', "lists none of the pictures"),
    ],
)
def test_a_file_that_cannot_be_compared_is_refused(tables: Path, tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "truth.json"
    path.write_text(content)
    with pytest.raises(DataError, match=message):
        label_quality(tables, path)
