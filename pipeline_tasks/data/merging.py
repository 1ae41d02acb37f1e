"""`nasline data merge`: one set of several, classes joined by name."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import yaml

from pipeline_tasks.data.coco import licence_counts
from pipeline_tasks.data.picture_digests import picture_digests
from pipeline_tasks.data.raw import RawDataset
from pipeline_tasks.data.sets import OpenSet, usable_boxes, usable_images
from pipeline_tasks.errors import DataError, UsageError

CLASSES = ("same", "union", "common", "first")
STRICTER = ("train", "val", "test")
"""A picture that sets have in different splits goes to the last of these: a test stays honest."""

ClassMap = Mapping[str, str | None]
_BoxKey = tuple[str | float | None, ...]


@dataclass
class Merged:
    """A set of several, and what is to be said about it."""

    raw: RawDataset
    folders: dict[int, Path]
    """By the column `root` of its images."""
    dropped_boxes: dict[str, int] = field(default_factory=dict)
    """By class: boxes of classes that the result does not have."""
    repeated: list[str] = field(default_factory=list)
    """Pictures that an earlier set has too, with equal bytes; they are taken once, with the earlier set's boxes."""
    copied_boxes: int = 0
    """Boxes of these pictures in the later sets, which are left out."""
    unlike_boxes: dict[str, int] = field(default_factory=dict)
    """By picture: those of them that the earlier set's picture has no equal of (class and place)."""
    partly_labelled: list[str] = field(default_factory=list)
    """Classes that some of the sets do not know, so their images lack these boxes."""


def read_class_map(path: Path) -> ClassMap:
    """A YAML file of old to new class names; null drops a class. Raises `DataError` when it is something else."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise DataError(f"class map {path} cannot be read: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict) or not all(value is None or isinstance(value, str) for value in content.values()):
        raise DataError(f"class map {path} must hold lines `old name: new name`, or `old name: null` to drop a class")
    return {str(name): value for name, value in content.items()}


def merge(sets: Sequence[OpenSet], classes: str = "same", class_map: ClassMap | None = None) -> Merged:
    """Join sets. `classes` says which class list the result has: "same" demands equal names, "union" takes the names of
    all, "common" those that all have, "first" those of the first set. `class_map` renames before that.

    Raises:
        UsageError: less than two sets.
        DataError: class names differ and nothing was said about it, or the map names a class that no set has.
    """
    if len(sets) < 2:
        raise UsageError("data merge needs at least two sets")
    renames = dict(class_map or {})
    _check_map(sets, renames)
    lists = [list(dict.fromkeys(n for n in _renamed(one, renames) if n is not None)) for one in sets]
    names = _class_list(sets, lists, classes)
    merged = Merged(_empty(sets[0].raw, names), dict(enumerate(one.folder for one in sets)))
    merged.partly_labelled = [name for name in names if not all(name in own for own in lists)]
    owners, shared = _owners(sets, merged)
    copies = _Copies(merged, owners, shared, renames)
    tables = [_rows(one, root, names, copies) for root, one in enumerate(sets)]
    images, boxes = _numbered(tables)
    metadata = replace(
        merged.raw.metadata,
        licences={"images": licence_counts(images["licence"]), "annotations": _annotation_licence(sets)},
        source="; ".join(dict.fromkeys(one.raw.metadata.source for one in sets if one.raw.metadata.source)),
        split_rule="as in the merged sets",
    )
    merged.raw = replace(merged.raw, images=images, boxes=boxes, metadata=metadata)
    return merged


def _check_map(sets: Sequence[OpenSet], renames: ClassMap) -> None:
    known = {name for one in sets for name in one.class_names}
    for name in renames:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"they have {sorted(known)}"
            raise DataError(f"class map: no set has a class {name!r}; {hint}")


def _renamed(one: OpenSet, renames: ClassMap) -> list[str | None]:
    return [renames.get(name, name) for name in one.class_names]


def _class_list(sets: Sequence[OpenSet], lists: list[list[str]], classes: str) -> list[str]:
    union = list(dict.fromkeys(name for own in lists for name in own))
    common = [name for name in lists[0] if all(name in own for own in lists)]
    if classes == "same" and len(common) != len(union):
        differing = [name for name in union if name not in common]
        shown = ", ".join(repr(name) for name in differing[:8]) + (" ..." if len(differing) > 8 else "")
        raise DataError(
            f"{' and '.join(str(one.folder) for one in sets)} have different classes: {shown}; say with --classes "
            "union, common or first which to keep, and rename with --map"
        )
    chosen = {"same": lists[0], "union": union, "common": common, "first": lists[0]}.get(classes)
    if chosen is None:
        raise UsageError(f"--classes {classes} is unknown; choose one of {', '.join(CLASSES)}")
    if not chosen:
        raise DataError("the sets have no class in common; use --classes union, or rename with --map")
    return chosen


def _empty(raw: RawDataset, names: list[str]) -> RawDataset:
    ids = tuple(range(1, len(names) + 1))
    metadata = replace(raw.metadata, name="merged", class_names=tuple(names), category_ids=ids, digests={})
    return replace(raw, metadata=metadata, required_splits=(), unlisted_files=(), notes=())


def _annotation_licence(sets: Sequence[OpenSet]) -> str:
    named = {str(one.raw.metadata.licences.get("annotations", "unknown")) for one in sets}
    return " and ".join(sorted(named))


def _owners(sets: Sequence[OpenSet], merged: Merged) -> tuple[dict[str, tuple[int, str]], set[str]]:
    """The set that keeps each picture, by content, with the strictest split of any set; and what several have."""
    owners: dict[str, tuple[int, str]] = {}
    shared = set()
    for root, one in enumerate(sets):
        images = usable_images(one.raw)
        splits = dict(zip(images["path"].to_pylist(), images["split"].to_pylist(), strict=True))
        for path, digest in picture_digests(one.folder, list(splits)).items():
            keeper, split = owners.get(digest, (root, splits[path]))
            owners[digest] = (keeper, max(split, splits[path], key=_strictness))
            if keeper != root:
                merged.repeated.append(f"{one.folder}/{path}")
                shared.add(digest)
    return owners, shared


def _strictness(split: str) -> int:
    return STRICTER.index(split) if split in STRICTER else -1


@dataclass
class _Copies:
    """Which set keeps each picture, and the boxes of pictures that several sets have."""

    merged: Merged
    owners: dict[str, tuple[int, str]]
    shared: set[str]
    """Digests of the pictures that several sets have."""
    renames: ClassMap
    _known: dict[str, set[_BoxKey]] = field(default_factory=dict)

    def count(self, one: OpenSet, images: pa.Table, boxes: pa.Table, kept: pa.Array, digests: list[str | None]) -> None:
        """Remember the boxes of pictures that are kept, and count those of later copies; `digests` by row of images."""
        rows = [row for row, digest in enumerate(digests) if digest in self.shared]
        own = _boxes_by_row(one, images, boxes, rows, self.renames)
        for row in rows:
            digest, found = str(digests[row]), own.get(row, [])
            if kept[row].as_py():
                self._known.setdefault(digest, set()).update(found)
                continue
            self.merged.copied_boxes += len(found)
            unlike = sum(box not in self._known.get(digest, set()) for box in found)
            if unlike:
                self.merged.unlike_boxes[f"{one.folder}/{images['path'][row].as_py()}"] = unlike


def _rows(one: OpenSet, root: int, names: list[str], copies: _Copies) -> tuple[pa.Table, pa.Table]:
    """Images and boxes of one set that the result takes, the classes as indices into `names`."""
    images, boxes = usable_images(one.raw), usable_boxes(one.raw)
    paths, merged, renames = images["path"].to_pylist(), copies.merged, copies.renames
    digests = picture_digests(one.folder, paths)
    homes = [copies.owners[digests[path]] if path in digests else (root, "") for path in paths]
    kept = pa.array([home == root for home, _ in homes])
    copies.count(one, images, boxes, kept, [digests.get(path) for path in paths])
    splits = [split or own for (_, split), own in zip(homes, images["split"].to_pylist(), strict=True)]
    images = _set(images, "split", pa.array(splits, pa.string())).filter(kept)
    images = images.append_column("root", pa.array(np.full(len(images), root, np.int32)))
    boxes = boxes.filter(pc.is_in(boxes["image_id"], value_set=images["image_id"].combine_chunks()))
    indices = [names.index(name) if name in names else -1 for name in _renamed(one, renames)]
    categories = np.array([*indices, -1], np.int32)[boxes["category"].to_numpy()]
    _count_dropped(one, boxes["category"].to_numpy()[categories < 0], merged)
    boxes = _set(boxes, "category", pa.array(categories)).filter(pa.array(categories >= 0))
    rows = pc.index_in(boxes["image_id"], value_set=images["image_id"].combine_chunks())
    return images, _set(boxes, "split", images["split"].take(rows.combine_chunks()))


def _boxes_by_row(
    one: OpenSet, images: pa.Table, boxes: pa.Table, rows: list[int], renames: ClassMap
) -> dict[int, list[_BoxKey]]:
    """The boxes of some rows of `images`: class by its new name, and place to a hundredth of a pixel."""
    names = _renamed(one, renames)
    ids = images["image_id"].take(pa.array(rows, pa.int64())).combine_chunks()
    places = pc.index_in(boxes["image_id"], value_set=ids)
    chosen = boxes.filter(pc.is_valid(places))
    found: dict[int, list[_BoxKey]] = {}
    columns = [places.drop_null().to_pylist(), *(chosen[name].to_pylist() for name in ("category", *"xywh"))]
    for place, category, *xywh in zip(*columns, strict=True):
        key = (names[category], *(round(side, 2) for side in xywh))
        found.setdefault(rows[place], []).append(key)
    return found


def _count_dropped(one: OpenSet, categories: np.ndarray[Any, Any], merged: Merged) -> None:
    for category, count in zip(*np.unique(categories, return_counts=True), strict=True):
        name = one.class_names[category]
        merged.dropped_boxes[name] = merged.dropped_boxes.get(name, 0) + int(count)


def _numbered(tables: list[tuple[pa.Table, pa.Table]]) -> tuple[pa.Table, pa.Table]:
    """All rows with image ids 0 … in one sequence."""
    images, boxes, first = [], [], 0
    for own_images, own_boxes in tables:
        old = own_images["image_id"].combine_chunks()
        fresh = pa.array(np.arange(first, first + len(old), dtype=np.int64))
        images.append(_set(own_images, "image_id", fresh))
        places = pc.index_in(own_boxes["image_id"], value_set=old).cast(pa.int64())
        boxes.append(_set(own_boxes, "image_id", pc.add(places, first)))
        first += len(old)
    return pa.concat_tables(images), pa.concat_tables(boxes)


def _set(table: pa.Table, name: str, values: Any) -> pa.Table:
    return table.set_column(table.schema.get_field_index(name), name, values)


def _copies_text(found: Merged) -> list[str]:
    lines = [
        f"{len(found.repeated)} pictures are in an earlier set too and were taken once: {found.repeated[0]}",
        f"left out with them: {found.copied_boxes} boxes of the later sets",
    ]
    if found.unlike_boxes:
        path, count = next(iter(found.unlike_boxes.items()))
        lines.append(
            f"  {sum(found.unlike_boxes.values())} of them, in {len(found.unlike_boxes)} pictures, have no equal among "
            f"the boxes of the earlier set: {path} ({count})"
        )
    return lines


def text(found: Merged, target: Path) -> str:
    """The merge for a reader."""
    count, classes = len(found.raw.boxes), len(found.raw.metadata.class_names)
    lines = [f"{len(found.raw.images)} images, {count} boxes, {classes} classes of {len(found.folders)} sets"]
    lines += [f"dropped: {number} boxes of class {name!r}" for name, number in found.dropped_boxes.items()]
    if found.repeated:
        lines += _copies_text(found)
    if found.partly_labelled:
        shown = ", ".join(repr(name) for name in found.partly_labelled[:8])
        lines.append(
            f"not every set labels {shown}: objects of these classes in the other sets' images have no box, which "
            "teaches a network that they are background"
        )
    return "\n".join([*lines, f"written to {target}"])
