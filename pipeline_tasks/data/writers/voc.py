"""Pascal VOC: JPEGImages/, Annotations/ and ImageSets/Main/SPLIT.txt."""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath
from xml.sax.saxutils import escape

from pipeline_tasks.data.raw import SPLITS
from pipeline_tasks.data.writers.content import Content, Lost, Picture, flat_names, lost_to_plain_boxes
from pipeline_tasks.data.writers.files import copy_pictures, write_text
from pipeline_tasks.errors import DataError

_NOT_IN_XML = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff\ufffe\uffff]")


def write(content: Content, target: Path) -> list[Lost]:
    """Write the set; returns what VOC cannot hold."""
    for class_name in content.class_names:
        if _NOT_IN_XML.search(class_name) or class_name != class_name.strip():
            raise DataError(f"the class name {class_name!r} cannot be written to XML; rename the class")
    names, lost = flat_names(content)
    copy_pictures((picture, target / "JPEGImages" / names[picture.name]) for picture in content.pictures)
    for picture in content.pictures:
        name = PurePosixPath(names[picture.name])
        write_text(target / "Annotations" / name.with_suffix(".xml"), _document(content, picture, str(name)))
    for split in (split for split in SPLITS if split in content.splits):
        stems = [PurePosixPath(names[picture.name]).stem for picture in content.of_split(split)]
        write_text(target / f"ImageSets/Main/{split}.txt", "".join(f"{stem}\n" for stem in stems))
    return [*lost, *_lost_classes(content), *lost_to_plain_boxes(content)]


def _document(content: Content, picture: Picture, name: str) -> str:
    size = f"<width>{picture.width}</width><height>{picture.height}</height><depth>3</depth>"
    objects = (
        f"  <object>\n    <name>{escape(content.class_names[box.category])}</name>\n    <difficult>0</difficult>\n"
        f"    {_corners(*box.xywh)}\n  </object>\n"
        for box in picture.boxes
        if not box.iscrowd
    )
    return (
        f"<annotation>\n  <filename>{escape(name)}</filename>\n  <size>{size}</size>\n{''.join(objects)}</annotation>\n"
    )


def _corners(x: float, y: float, w: float, h: float) -> str:
    sides = {"xmin": x, "ymin": y, "xmax": x + w, "ymax": y + h}
    return f"<bndbox>{''.join(f'<{side}>{value!r}</{side}>' for side, value in sides.items())}</bndbox>"


def _lost_classes(content: Content) -> list[Lost]:
    """VOC has no list of classes: their order and ids, and classes without boxes, are not in the files."""
    used = {box.category for box in content.boxes() if not box.iscrowd}
    unused = [name for index, name in enumerate(content.class_names) if index not in used]
    lost = [Lost("category ids", len(content.category_ids), str(content.category_ids[0]))]
    return lost + ([Lost("classes without boxes", len(unused), unused[0])] if unused else [])
