"""The form of Objects365: zhiyuan_objv2_SPLIT.json and pictures in patch folders, as its archives unpack."""

from __future__ import annotations

from pathlib import Path

from pipeline_tasks.data.raw import UNSPLIT
from pipeline_tasks.data.writers.coco import write_json
from pipeline_tasks.data.writers.content import Content, Lost
from pipeline_tasks.data.writers.files import copy_pictures

PICTURES_IN_A_PATCH = 30_000  # about what the archives hold


def write(content: Content, target: Path) -> list[Lost]:
    """Write the set; returns what the form cannot hold."""
    places: dict[str, str] = {}
    for split in content.splits:
        for position, picture in enumerate(content.of_split(split)):
            places[picture.name] = f"patch{position // PICTURES_IN_A_PATCH}/{picture.name}"
    copy_pictures((one, target / _folder(one.split) / places[one.name]) for one in content.pictures)
    return write_json(
        content,
        lambda split: target / f"zhiyuan_objv2_{_folder(split)}.json",
        lambda picture: f"images/v1/{places[picture.name]}",
    )


def _folder(split: str) -> str:
    return "all" if split == UNSPLIT else split
