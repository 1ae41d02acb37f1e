"""YOLO: images/SPLIT, labels/SPLIT and data.yaml."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

import yaml

from pipeline_tasks.data.raw import SPLITS, UNSPLIT
from pipeline_tasks.data.writers.content import Box, Content, Lost, Picture, flat_names, lost_to_plain_boxes
from pipeline_tasks.data.writers.files import copy_pictures, write_text


def write(content: Content, target: Path) -> list[Lost]:
    """Write the set; returns what YOLO cannot hold."""
    names, lost = flat_names(content)
    places = [PurePosixPath("" if one.split == UNSPLIT else one.split, names[one.name]) for one in content.pictures]
    copy_pictures((one, target / "images" / place) for one, place in zip(content.pictures, places, strict=True))
    for picture, name in zip(content.pictures, places, strict=True):
        lines = "".join(_line(box, picture) for box in picture.boxes if not box.iscrowd)
        write_text(target / "labels" / name.with_suffix(".txt"), lines)
    write_text(target / "data.yaml", _description(content))
    if not set(content.splits) & set(SPLITS):
        lost = [*lost, Lost("that the set has no splits (data.yaml calls all of it train)", len(content.pictures))]
    if content.category_ids != tuple(range(len(content.class_names))):
        lost = [*lost, Lost("category ids", len(content.category_ids), str(content.category_ids[0]))]
    return [*lost, *lost_to_plain_boxes(content)]


def _line(box: Box, picture: Picture) -> str:
    x, y, w, h = box.xywh
    centre = ((x + w / 2) / picture.width, (y + h / 2) / picture.height)
    return " ".join(map(repr, (box.category, *centre, w / picture.width, h / picture.height))) + "\n"


def _description(content: Content) -> str:
    places = {split: f"images/{split}" for split in SPLITS if split in content.splits} or {"train": "images"}
    fields = {"path": ".", **places, "nc": len(content.class_names), "names": list(content.class_names)}
    return yaml.safe_dump(fields, sort_keys=False, allow_unicode=True)
