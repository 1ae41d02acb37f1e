"""Validation of the records alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from foreign_sets import write_picture

from pipeline_tasks.validation import ValidationLimits
from pipeline_tasks.validation import datasets as datasets_module
from pipeline_tasks.validation.folder import validate_folder


def test_records_are_judged_and_pictures_only_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("whole", "damaged", "absent")
    for seed, name in enumerate(names[:2]):
        write_picture(tmp_path / f"set/images/{name}.jpg", seed)
    damaged = tmp_path / "set/images/damaged.jpg"
    damaged.write_bytes(damaged.read_bytes()[:200])
    images = [{"id": i, "file_name": f"{name}.jpg", "width": 48, "height": 32} for i, name in enumerate(names)]
    images[0]["width"] = 47
    box = {"image_id": 0, "category_id": 1, "bbox": [1, 2, 3, 4], "area": 12, "iscrowd": 0}
    boxes = [{"id": 1, **box}, {"id": 1, **box, "category_id": 9}, {"id": 2, **box, "bbox": [40, 2, 30, 4]}]
    content = {"images": images, "annotations": boxes, "categories": [{"id": 1, "name": "c"}]}
    (tmp_path / "set/annotations.json").write_text(json.dumps(content))
    monkeypatch.setattr(datasets_module, "inspect_images", lambda *arguments: pytest.fail("pictures were opened"))
    found = validate_folder(tmp_path / "set", tmp_path / "out", ValidationLimits(), decode=False)
    in_records = {"annotation_id_unique": 2, "box_category_known": 1, "box_inside_image": 1}
    assert found.counts("error") == {"image_file_present": 1, **in_records}
    assert "error annotation_id_unique: 2" in list(found.lines())
