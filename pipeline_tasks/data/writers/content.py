"""What is written, the same for every format: pictures with their names and sizes, and their boxes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline_tasks.bucket_images import PICTURES, is_there
from pipeline_tasks.data.picture_size import upright_size
from pipeline_tasks.data.raw import UNLABELED_SPLIT, RawDataset
from pipeline_tasks.errors import DataError

SAME_AREA = 1e-6  # relative: areas that differ less are the box's own


@dataclass(frozen=True)
class Lost:
    """Something of a set that the written format cannot hold."""

    what: str
    count: int
    example: str = ""

    def __str__(self) -> str:
        return f"lost: {self.what} ({self.count})" + (f", for example {self.example}" if self.example else "")


@dataclass(frozen=True)
class Box:
    """One box, x, y, width, height in pixels."""

    category: int  # index into class_names
    xywh: tuple[float, float, float, float]
    area: float | None
    iscrowd: bool
    annotation_id: str


@dataclass(frozen=True)
class Picture:
    """One picture: the set's folder, its path there (or below the bucket of that set), and the name it gets."""

    folder: Path
    path: str
    name: str  # with "/" between folders where base names repeat
    width: int
    height: int
    split: str
    licence: str | None
    original_id: str
    boxes: tuple[Box, ...]


@dataclass(frozen=True)
class Content:
    """A set that is about to be written."""

    class_names: tuple[str, ...]
    category_ids: tuple[int, ...]
    source: str
    annotation_licence: str
    labelled: bool
    pictures: tuple[Picture, ...]
    copied: bool = True
    """Whether the pictures are written too; else they stay in a bucket, under their names."""

    @property
    def splits(self) -> list[str]:
        """The splits in the order of their first picture."""
        return list(dict.fromkeys(picture.split for picture in self.pictures))

    def of_split(self, split: str) -> Iterator[Picture]:
        """The pictures of one split."""
        return (picture for picture in self.pictures if picture.split == split)

    def boxes(self) -> Iterator[Box]:
        """Every box."""
        return (box for picture in self.pictures for box in picture.boxes)


def content_of(raw: RawDataset, source: Path | Mapping[int, Path], copied: bool = True) -> tuple[Content, list[Lost]]:
    """The rows that can be written, and those that cannot; pictures whose size is not recorded are asked for it.

    `source`: the folder of the pictures, or by the numbers in the column `root` several. Pictures that are not `copied`
    keep their names below images/. Raises `DataError` for a picture that is missing.
    """
    roots = {0: source} if isinstance(source, Path) else source
    images, bad_images = _usable(raw.images, ["original_id", "path"])
    boxes, bad_boxes = _usable(raw.boxes, ["image_id", "category", *"xywh"])
    boxes = boxes.filter(pc.is_in(boxes["image_id"], value_set=images["image_id"].combine_chunks()))
    owners = boxes["image_id"].to_numpy()
    rows = boxes.select(["category", *"xywh", "area", "iscrowd", "annotation_id"]).take(
        np.argsort(owners, kind="stable")
    )
    grouped = _grouped(rows, np.sort(owners))
    paths = images["name" if copied and "name" in images.column_names else "path"].to_pylist()
    names = _names(paths) if copied else [path.removeprefix(PICTURES) for path in paths]
    metadata = raw.metadata
    content = Content(
        class_names=metadata.class_names,
        category_ids=metadata.category_ids,
        source=metadata.source,
        annotation_licence=str(metadata.licences.get("annotations", "unknown")),
        labelled=raw.labelled,
        pictures=tuple(
            _picture(row if raw.labelled else row | {"split": UNLABELED_SPLIT}, name, roots, grouped)
            for row, name in zip(images.to_pylist(), names, strict=True)
        ),
        copied=copied,
    )
    lost = [Lost("malformed image records", *bad_images), Lost("malformed annotations", *bad_boxes)]
    return content, [one for one in lost if one.count]


def _usable(table: pa.Table, needed: Sequence[str]) -> tuple[pa.Table, tuple[int, str]]:
    """The rows without fault that have the needed values; how many others there are, and where the first is."""
    good = pc.is_null(table["fault"])
    for name in needed:
        good = pc.and_(good, pc.is_valid(table[name]))
    bad = table.filter(pc.invert(good))
    return table.filter(good), (len(bad), bad["source_record"][0].as_py() if len(bad) else "")


def _grouped(boxes: pa.Table, owners: np.ndarray[Any, np.dtype[np.int64]]) -> dict[int, tuple[Box, ...]]:
    """Boxes by image id; `boxes` are in the order of `owners`."""
    columns = [boxes[name].to_pylist() for name in boxes.column_names]
    found: dict[int, list[Box]] = {}
    for owner, category, x, y, w, h, area, crowd, identifier in zip(owners.tolist(), *columns, strict=True):
        box = Box(category, (x, y, w, h), area, bool(crowd), identifier or "")
        found.setdefault(owner, []).append(box)
    return {owner: tuple(those) for owner, those in found.items()}


def _picture(
    row: Mapping[str, Any], name: str, roots: Mapping[int, Path], grouped: Mapping[int, tuple[Box, ...]]
) -> Picture:
    root = roots[row.get("root") or 0]
    file = root / row["path"]
    if not is_there(root, row["path"]):
        raise DataError(
            f"{file} does not exist, but {row['source_record']} lists it; remove the record or add the file"
        )
    width, height = row["width"], row["height"]
    if width is None or height is None:
        found = upright_size(root, row["path"])
        if found is None:
            raise DataError(f"{file} is no picture that can be read; remove it, `nasline data validate` says why")
        width, height = found
    boxes = grouped.get(row["image_id"], ())
    return Picture(root, row["path"], name, width, height, row["split"], row["licence"], row["original_id"], boxes)


def _names(paths: Sequence[str]) -> list[str]:
    """File names alone where they differ, else the paths below images/, numbered where even these repeat."""
    bare = [PurePosixPath(path).name for path in paths]
    names = bare if len(set(bare)) == len(bare) else [path.removeprefix(PICTURES) for path in paths]
    return _numbered(names, str)


def _numbered(names: Sequence[str], what_differs: Callable[[PurePosixPath], str]) -> list[str]:
    """The names, repeated ones with a number behind the stem that no other name has."""
    taken = {what_differs(PurePosixPath(name)) for name in names}
    first: set[str] = set()
    following: Counter[str] = Counter()
    unique = []
    for name in names:
        path = PurePosixPath(name)
        key = what_differs(path)
        if key in first:
            while what_differs(numbered := path.with_stem(f"{path.stem}_{following[key] + 2}")) in taken:
                following[key] += 1
            path = numbered
            taken.add(what_differs(path))
        first.add(key)
        unique.append(str(path))
    return unique


def flat_names(content: Content) -> tuple[dict[str, str], list[Lost]]:
    """Names without folders whose stems differ, for formats with one label file a picture; what had to be renamed."""
    given = [picture.name for picture in content.pictures]
    flat = _numbered([name.replace("/", "__") for name in given], lambda path: path.stem)
    names = dict(zip(given, flat, strict=True))
    renamed = [f"{name} -> {new}" for name, new in names.items() if name != new]
    return names, [Lost("file names that had to change", len(renamed), renamed[0])] if renamed else []


def lost_to_plain_boxes(content: Content) -> list[Lost]:
    """What a format of names, classes and four numbers cannot hold.

    Images without a number come from such a format: then the ids are only the reader's.
    """
    numbered = all(picture.original_id.isdecimal() for picture in content.pictures)
    boxes = list(content.boxes())
    crowds = [box.annotation_id for box in boxes if box.iscrowd]
    areas = [box for box in boxes if _has_own_area(box)]
    licences = Counter(picture.licence for picture in content.pictures if picture.licence)
    lost = [
        Lost("crowd regions (annotations left out)", len(crowds), crowds[0] if crowds else ""),
        Lost("areas of annotations other than width times height", len(areas), areas[0].annotation_id if areas else ""),
        Lost("licences of images", sum(licences.values()), next(iter(licences), "")),
        Lost("annotation ids", len(boxes) if numbered else 0),
        Lost("image ids", len(content.pictures) if numbered else 0),
        Lost("licence of the annotations", int(content.annotation_licence not in ("unknown", "none")),
             content.annotation_licence),
        Lost("source", int(bool(content.source)), content.source),
    ]  # fmt: skip
    return [one for one in lost if one.count]


def _has_own_area(box: Box) -> bool:
    own = box.xywh[2] * box.xywh[3]
    return box.area is not None and abs(box.area - own) > SAME_AREA * max(abs(own), 1.0)
