"""`nasline data diff`: what two versions of a set have in common, image by image and box by box."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from model.boxes import box_iou
from pipeline_tasks import bucket_images
from pipeline_tasks.data.picture_digests import picture_digests
from pipeline_tasks.data.sets import OpenSet, usable_boxes, usable_images
from pipeline_tasks.images import read_content

SAME_PX = 0.01
"""Boxes whose edges lie closer than this are the same: formats round."""
MOVED_IOU = 0.5
"""A box of one version and one of the other that overlap this much are one box, changed."""
LISTED = 10


@dataclass
class Boxes:
    """Counts of boxes by what became of them."""

    same: int = 0
    moved: int = 0
    renamed: int = 0
    """Overlapping box of another class."""
    added: int = 0
    removed: int = 0

    @property
    def differ(self) -> bool:
        """Whether any box is not as it was."""
        return bool(self.moved or self.renamed or self.added or self.removed)

    def count(self, more: Boxes) -> None:
        """Add the boxes of another image."""
        for name, value in asdict(more).items():
            setattr(self, name, getattr(self, name) + value)


@dataclass(frozen=True)
class ClassDrift:
    """Boxes of one class in both versions, None where a version has no such class."""

    name: str
    before: int | None
    after: int | None
    share_before: float
    share_after: float


@dataclass
class Comparison:
    """What `nasline data diff` tells; lists hold paths of images, sorted."""

    images_before: int
    images_after: int
    added: list[str] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)
    renamed: list[tuple[str, str]] = field(default_factory=list)
    """Same bytes under another path."""
    changed_pictures: list[str] = field(default_factory=list)
    """Same path, other bytes."""
    changed_splits: list[tuple[str, str, str]] = field(default_factory=list)
    changed_boxes: list[str] = field(default_factory=list)
    boxes: Boxes = field(default_factory=Boxes)
    classes: list[ClassDrift] = field(default_factory=list)

    @property
    def class_distance(self) -> float:
        """Total variation between the two class distributions: the share of boxes that changed sides, 0 to 1."""
        return sum(abs(one.share_before - one.share_after) for one in self.classes) / 2

    @property
    def equal(self) -> bool:
        """Whether nothing was found."""
        lists = (self.added, self.removed, self.renamed, self.changed_pictures, self.changed_splits)
        names = all(one.before is not None and one.after is not None for one in self.classes)
        return not any(lists) and not self.changed_boxes and names


def compare(before: OpenSet, after: OpenSet) -> Comparison:
    """Compare two versions. Pictures are matched by path, then by content; boxes by place and class name."""
    first, second = _Version(before), _Version(after)
    found = Comparison(len(first.rows), len(second.rows), classes=_class_drift(first, second))
    pairs = [(path, path) for path in sorted(first.rows.keys() & second.rows.keys())]
    found.renamed = _renamed(first, second)
    moved_from, moved_to = ({pair[side] for pair in found.renamed} for side in (0, 1))
    found.removed = sorted(first.rows.keys() - second.rows.keys() - moved_from)
    found.added = sorted(second.rows.keys() - first.rows.keys() - moved_to)
    found.changed_pictures = [path for path, _ in pairs if _other_bytes(first, second, path)]
    for old, new in sorted([*pairs, *found.renamed], key=lambda pair: pair[1]):
        if first.splits[old] != second.splits[new]:
            found.changed_splits.append((new, first.splits[old], second.splits[new]))
        boxes = _compare_boxes(first.boxes(old), second.boxes(new))
        found.boxes.count(boxes)
        if boxes.differ:
            found.changed_boxes.append(new)
    found.boxes.removed += sum(len(first.boxes(path).names) for path in found.removed)
    found.boxes.added += sum(len(second.boxes(path).names) for path in found.added)
    return found


@dataclass(frozen=True)
class _ImageBoxes:
    xyxy: NDArray[np.float64]  # (N, 4)
    names: NDArray[np.object_]  # (N,)


class _Version:
    """One of the two sets, ready to look images up by path."""

    def __init__(self, opened: OpenSet) -> None:
        images, boxes = usable_images(opened.raw), usable_boxes(opened.raw)
        paths = images["path"].to_pylist()
        self.rows = dict(zip(paths, images["image_id"].to_pylist(), strict=True))
        self.splits = dict(zip(paths, images["split"].to_pylist(), strict=True))
        self.folder = opened.folder
        self.in_bucket = bucket_images.of_folder(opened.folder) is not None
        self.digests = dict.fromkeys(paths) | picture_digests(opened.folder, paths)
        self.class_names = opened.class_names
        self.labels = boxes["category"].to_numpy()
        owners = boxes["image_id"].to_numpy()
        self._order = np.argsort(owners, kind="stable")
        self._first = np.searchsorted(owners[self._order], np.arange(len(opened.raw.images) + 1))
        corners = np.stack([boxes[name].to_numpy() for name in "xywh"], axis=1)
        corners[:, 2:] += corners[:, :2]
        self._xyxy, self._names = corners, np.array([*self.class_names, ""], dtype=object)

    def boxes(self, path: str) -> _ImageBoxes:
        row = self.rows[path]
        chosen = self._order[self._first[row] : self._first[row + 1]]
        return _ImageBoxes(self._xyxy[chosen], self._names[self.labels[chosen]])


def _other_bytes(first: _Version, second: _Version, path: str) -> bool:
    """Whether a picture is another one; fetched where a file and an ETag are compared, which may be no MD5."""
    digests = first.digests[path], second.digests[path]
    if digests[0] == digests[1] or None in digests or first.in_bucket == second.in_bucket:
        return digests[0] != digests[1]
    return read_content(first.folder, path) != read_content(second.folder, path)


def _renamed(first: _Version, second: _Version) -> list[tuple[str, str]]:
    """Pictures that only one version has by path, but both by content; a content that occurs twice is left alone."""
    gone = _by_content(first, first.rows.keys() - second.rows.keys())
    come = _by_content(second, second.rows.keys() - first.rows.keys())
    return sorted((gone[digest], come[digest]) for digest in gone.keys() & come.keys())


def _by_content(version: _Version, paths: set[str]) -> dict[str, str]:
    counts = Counter(version.digests[path] for path in paths)
    return {digest: path for path in paths if (digest := version.digests[path]) is not None and counts[digest] == 1}


def _compare_boxes(before: _ImageBoxes, after: _ImageBoxes) -> Boxes:
    """What became of the boxes of one image: equal ones first, then the pairs that overlap most."""
    old, new, same = _without_equal(before, after)
    counts = Boxes(same=same)
    overlap = box_iou(before.xyxy[old], after.xyxy[new])
    while overlap.size and overlap.max() >= MOVED_IOU:
        i, j = np.unravel_index(int(overlap.argmax()), overlap.shape)
        same_class = before.names[old[i]] == after.names[new[j]]
        counts.moved += int(same_class)
        counts.renamed += int(not same_class)
        old, new = np.delete(old, i), np.delete(new, j)
        overlap = np.delete(np.delete(overlap, i, axis=0), j, axis=1)
    counts.removed, counts.added = len(old), len(new)
    return counts


def _without_equal(before: _ImageBoxes, after: _ImageBoxes) -> tuple[NDArray[np.int64], NDArray[np.int64], int]:
    """Rows of both that have no equal in the other, and how many pairs are equal."""
    count = len(before.names)
    same_names = np.array_equal(before.names, after.names)
    if same_names and np.abs(before.xyxy - after.xyxy).max(initial=0.0) < SAME_PX:
        return np.empty(0, np.int64), np.empty(0, np.int64), count
    distance = np.abs(before.xyxy[:, None] - after.xyxy[None]).max(axis=2, initial=0.0)
    equal = (distance < SAME_PX) & (before.names[:, None] == after.names[None])
    free = np.ones(len(after.names), bool)
    left = []
    for row in range(count):
        candidates = np.flatnonzero(equal[row] & free)
        if len(candidates):
            free[candidates[0]] = False
        else:
            left.append(row)
    return np.array(left, np.int64), np.flatnonzero(free), count - len(left)


def _class_drift(first: _Version, second: _Version) -> list[ClassDrift]:
    """Every class of either version, those whose share changed most first."""
    counts = [_class_counts(version) for version in (first, second)]
    totals = [max(sum(one.values()), 1) for one in counts]
    names = dict.fromkeys([*first.class_names, *second.class_names])
    (before, after), (all_before, all_after) = counts, totals
    found = [
        ClassDrift(
            name,
            before.get(name),
            after.get(name),
            share_before=before.get(name, 0) / all_before,
            share_after=after.get(name, 0) / all_after,
        )
        for name in names
    ]
    return sorted(found, key=lambda one: -abs(one.share_before - one.share_after))


def _class_counts(version: _Version) -> dict[str, int]:
    counts = np.bincount(version.labels, minlength=len(version.class_names))
    return dict(zip(version.class_names, counts.tolist(), strict=True))


def text(found: Comparison) -> str:
    """The comparison for a reader."""
    if found.equal:
        return f"equal: {found.images_after} images, {found.boxes.same} boxes"
    lines = [
        f"images {found.images_before} -> {found.images_after}: {len(found.added)} added, "
        f"{len(found.removed)} removed, {len(found.renamed)} renamed, "
        f"{len(found.changed_pictures)} with other pixels, "
        f"{len(found.changed_splits)} in another split",
        f"boxes: {found.boxes.same} as they were, {found.boxes.added} added, {found.boxes.removed} removed, "
        f"{found.boxes.moved} moved or resized, {found.boxes.renamed} of another class "
        f"(in {len(found.changed_boxes)} images that both have)",
        *_listed("added", found.added),
        *_listed("removed", found.removed),
        *_listed("renamed", [f"{old} -> {new}" for old, new in found.renamed]),
        *_listed("other pixels", found.changed_pictures),
        *_listed("other split", [f"{path}: {old} -> {new}" for path, old, new in found.changed_splits]),
        *_listed("other boxes", found.changed_boxes),
        f"class drift: {100 * found.class_distance:.1f} % of the distribution",
    ]
    changed = [one for one in found.classes if one.before != one.after]
    return "\n".join([*lines, *(_drift_line(one) for one in changed)])


def _listed(title: str, entries: list[str]) -> list[str]:
    more = [f"    and {len(entries) - LISTED} more"] if len(entries) > LISTED else []
    return [f"  {title}:", *(f"    {entry}" for entry in entries[:LISTED]), *more] if entries else []


def _drift_line(one: ClassDrift) -> str:
    counts = ["no such class" if count is None else str(count) for count in (one.before, one.after)]
    change = 100 * (one.share_after - one.share_before)
    return f"  {one.name}: {counts[0]} -> {counts[1]} boxes, {change:+.2f} points of all"


def to_json(found: Comparison) -> dict[str, Any]:
    """The whole comparison as plain JSON values."""
    return {**asdict(found), "class_distance": found.class_distance, "equal": found.equal}
