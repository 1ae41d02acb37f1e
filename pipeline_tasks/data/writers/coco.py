"""COCO: images/ and annotations/instances_SPLIT.json; an unlabelled set is images/ and images.json."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from pipeline_tasks.bucket_images import PICTURES
from pipeline_tasks.data.raw import UNSPLIT
from pipeline_tasks.data.writers.content import Box, Content, Lost, Picture
from pipeline_tasks.data.writers.files import copy_pictures

FileName = Callable[[Picture], str]


def write(content: Content, target: Path) -> list[Lost]:
    """Write the set; returns what COCO cannot hold."""
    if content.copied:
        copy_pictures((picture, target / PICTURES / picture.name) for picture in content.pictures)
    return write_json(content, lambda split: target / _file_of(content, split), lambda picture: picture.name)


def _file_of(content: Content, split: str) -> str:
    if not content.labelled:
        return "images.json"
    return f"annotations/instances_{'all' if split == UNSPLIT else split}.json"


def write_json(content: Content, file_of: Callable[[str], Path], file_name: FileName) -> list[Lost]:
    """Write one JSON file for each split, record by record; returns the ids that had to be numbered anew."""
    licences = {name: row for row, name in enumerate(sorted({p.licence for p in content.pictures if p.licence}), 1)}
    image_ids = _Numbers([picture.original_id for picture in content.pictures])
    box_ids = _Numbers([box.annotation_id for box in content.boxes()])
    numbers, annotation_numbers = iter(image_ids.numbers), iter(box_ids.numbers)
    identified = [(p, next(numbers), [(box, next(annotation_numbers)) for box in p.boxes]) for p in content.pictures]
    for split in content.splits:
        chosen = [one for one in identified if one[0].split == split]
        images = (_image(p, number, file_name(p), licences) for p, number, _ in chosen)
        boxes = (_annotation(content, *box, number) for _, number, own in chosen for box in own)
        file = file_of(split)
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("w", encoding="utf-8", newline="\n") as out:
            out.writelines(_document(_head(content, licences), images, boxes if content.labelled else None))
    return [*image_ids.lost("image ids"), *box_ids.lost("annotation ids")]


def _head(content: Content, licences: dict[str, int]) -> dict[str, Any]:
    info = {"description": content.source}
    if content.annotation_licence not in ("unknown", "none"):
        info["license"] = content.annotation_licence
    head: dict[str, Any] = {"info": info, "licenses": [{"id": row, "name": name} for name, row in licences.items()]}
    if content.labelled:
        pairs = zip(content.category_ids, content.class_names, strict=True)
        head["categories"] = [{"id": identifier, "name": name} for identifier, name in pairs]
    return head


def _document(head: dict[str, Any], images: Iterable[Any], boxes: Iterable[Any] | None) -> Iterator[str]:
    yield json.dumps(head, ensure_ascii=False)[:-1]
    for key, records in (("images", images), ("annotations", boxes)):
        if records is not None:
            yield f',\n"{key}": ['
            for row, record in enumerate(records):
                yield ("\n" if row == 0 else ",\n") + json.dumps(record, ensure_ascii=False)
            yield "]"
    yield "}\n"


def _image(picture: Picture, identifier: int, name: str, licences: dict[str, int]) -> dict[str, Any]:
    record = {"id": identifier, "file_name": name, "width": picture.width, "height": picture.height}
    return record | ({"license": licences[picture.licence]} if picture.licence else {})


def _annotation(content: Content, box: Box, identifier: int, image: int) -> dict[str, Any]:
    width, height = box.xywh[2:]
    return {
        "id": identifier,
        "image_id": image,
        "category_id": content.category_ids[box.category],
        "bbox": list(box.xywh),
        "area": width * height if box.area is None else box.area,
        "iscrowd": int(box.iscrowd),
    }


class _Numbers:
    """Ids as whole numbers: the set's own where all are and no two are equal, else 1, 2, …"""

    def __init__(self, texts: Sequence[str]) -> None:
        own = [int(text) for text in texts if text.isascii() and text.isdecimal() and len(text) < 19]
        self.kept = len(own) == len(texts) == len(set(own))
        self.numbers = own if self.kept else list(range(1, len(texts) + 1))
        self._first = texts[0] if texts else ""

    def lost(self, what: str) -> list[Lost]:
        """What the new numbers take the place of."""
        return [] if self.kept else [Lost(f"{what}, numbered anew", len(self.numbers), self._first)]
