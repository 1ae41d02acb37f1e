"""`nasline data split`: training, validation and test images, so that no scene is in two of them."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from model.data.near_duplicates import NEAR_BITS
from pipeline_tasks.data.leaks import Leak, UnionFind, alike, find_leaks, fingerprints
from pipeline_tasks.data.raw import SPLITS, RawDataset
from pipeline_tasks.data.sets import OpenSet, distinct, usable_boxes, usable_images
from pipeline_tasks.errors import DataError, UsageError

METHODS = ("hash", "group", "stratified")
HASH_BITS = 64
FRAME_NUMBER = re.compile(r"[-_. ]*\d+$")


@dataclass(frozen=True)
class SplitRule:
    """How images are divided."""

    method: str = "hash"
    shares: tuple[float, float, float] = (0.8, 0.1, 0.1)
    """Of the images, for train, val and test."""
    group: str | None = None
    """What belongs together: "folder", "sequence" (names that differ in the number at their end), or a pattern whose
    first group (or whole match) names it."""
    near_bits: int | None = NEAR_BITS
    """Pictures that look alike to so many of 64 bits stay together; None: only equal files do."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise UsageError(f"--by {self.method} is unknown; choose one of {', '.join(METHODS)}")
        if not (min(self.shares) >= 0 and abs(sum(self.shares) - 1) <= 1e-6):  # NaN is neither
            raise UsageError(f"--shares {self.shares} must be three numbers that sum to 1: train, val, test")
        if self.near_bits is not None and self.near_bits >= HASH_BITS:
            raise UsageError(f"--near-bits {self.near_bits} must be below {HASH_BITS}: then all pictures look alike")
        if self.method == "group" and not self.group:
            raise UsageError("--by group needs --group: folder, sequence, or a pattern such as '(film[0-9]+)'")

    def __str__(self) -> str:
        together = f", together by {self.group}" if self.group else ""
        return f"by {self.method}{together}, shares {self.shares}, near bits {self.near_bits}, seed {self.seed}"


@dataclass(frozen=True)
class Division:
    """A set with new splits, and what is to be said about it."""

    raw: RawDataset
    images: dict[str, int]
    boxes: dict[str, int]
    leaks_before: list[Leak]
    kept_together: int
    """Images that share their split with another because they are equal, look alike or are of one group."""
    largest_unit: int
    """Most images that stay together."""
    without_group: int
    """Images that the pattern of --group says nothing about; each stands for itself."""
    class_shares: dict[str, dict[str, float]]
    """By class: the share of its boxes in each split."""


def divide(opened: OpenSet, rule: SplitRule) -> Division:
    """Give every usable image of a set a split, whatever split it had before.

    Raises:
        DataError: a split would be empty, or the set has no annotations.
    """
    if not opened.raw.labelled:
        raise DataError(f"{opened.folder} has no annotations: an unlabelled set is used whole and needs no splits")
    images = usable_images(opened.raw)
    paths = images["path"].to_pylist()
    looks = fingerprints(opened.folder, paths, rule.near_bits is not None)
    similar = alike(looks, rule.near_bits)
    leaks = find_leaks(paths, images["split"].to_pylist(), similar, looks.digests)
    keys = _group_keys(paths, rule.group)
    units = _units(similar, keys)
    splits = _assign(units, _names(paths, units, keys), _shown_classes(opened.raw, images), rule)
    for split, share in zip(SPLITS, rule.shares, strict=True):
        if share and split not in splits:
            raise DataError(
                f"{opened.folder}: {len(set(units.tolist()))} images or groups are too few for a {split} split of "
                f"{share:g}; give it a larger share or another --seed"
            )
    raw = _with_splits(opened.raw, images, splits, str(rule))
    boxes = usable_boxes(raw)
    sizes = np.bincount(units, minlength=len(units))
    return Division(
        raw=raw,
        images=_in_order(Counter(splits)),
        boxes=_in_order(_counted(boxes["split"])),
        leaks_before=leaks,
        kept_together=int(sizes[sizes > 1].sum()),
        largest_unit=int(sizes.max()),
        without_group=sum(key is None for key in keys) if rule.group else 0,
        class_shares=_class_shares(raw, boxes),
    )


def leaks_of(opened: OpenSet, near_bits: int | None) -> list[Leak]:
    """Pictures that are in more than one split of a set as it is."""
    images = usable_images(opened.raw)
    paths = images["path"].to_pylist()
    looks = fingerprints(opened.folder, paths, near_bits is not None)
    return find_leaks(paths, images["split"].to_pylist(), alike(looks, near_bits), looks.digests)


def _group_keys(paths: Sequence[str], group: str | None) -> list[str | None]:
    if group is None:
        return [None] * len(paths)
    if group == "folder":
        return [str(PurePosixPath(path).parent) for path in paths]
    if group == "sequence":
        return [FRAME_NUMBER.sub("", str(PurePosixPath(path).with_suffix(""))) for path in paths]
    try:
        pattern = re.compile(group)
    except re.error as error:
        raise UsageError(f"--group {group!r} is no regular expression ({error}); try '(film[0-9]+)'") from None
    matches = [pattern.search(path) for path in paths]
    return [match and (match[1] if pattern.groups else match[0]) for match in matches]


def _units(similar: NDArray[np.int64], keys: Sequence[str | None]) -> NDArray[np.int64]:
    """Images that must stay together have one number: those alike, those of one group, and what follows from both."""
    joined = UnionFind(len(similar))
    joined.join_equal(similar.tolist())
    joined.join_equal(keys)
    return joined.numbers()


def _names(paths: Sequence[str], units: NDArray[np.int64], keys: Sequence[str | None]) -> list[str]:
    """What the hash of each image's unit is taken from: its group, else the first of its file names."""
    names: dict[int, str] = {}
    for path, unit, key in zip(paths, units.tolist(), keys, strict=True):
        name = PurePosixPath(path).name if key is None else key
        names[unit] = min(name, names.get(unit, name))
    return [names[unit] for unit in units.tolist()]


def _shown_classes(raw: RawDataset, images: pa.Table) -> list[set[int]]:
    """The classes that each image shows; class -1 stands for an image without boxes."""
    boxes = usable_boxes(raw)
    classes = max(1, len(raw.metadata.class_names))
    pairs = distinct(boxes["image_id"].to_numpy() * classes + boxes["category"].to_numpy())
    shown: dict[int, set[int]] = {row: set() for row in images["image_id"].to_pylist()}
    for row, category in zip((pairs // classes).tolist(), (pairs % classes).tolist(), strict=True):
        shown[row].add(category)
    return [found or {-1} for found in shown.values()]


def _assign(units: NDArray[np.int64], names: list[str], shown: list[set[int]], rule: SplitRule) -> list[str]:
    if rule.method == "stratified":
        return _stratified(units, names, shown, rule)
    return [_by_hash(_fraction(name, rule.seed), rule.shares) for name in names]


def _fraction(name: str, seed: int) -> float:
    """A number from 0 to 1 that follows from the name alone, so more images do not move those that are there."""
    text = f"{seed}:{name}" if seed else name
    return int(hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()[:8], 16) / 2**32


def _by_hash(fraction: float, shares: tuple[float, float, float]) -> str:
    _, val, test = shares
    return "test" if fraction < test else "val" if fraction < test + val else "train"


def _stratified(units: NDArray[np.int64], names: list[str], shown: list[set[int]], rule: SplitRule) -> list[str]:
    """Iterative stratification (Sechidis et al. 2011, algorithm 1) of units instead of single images.

    The rarest class that is left is dealt out first, each unit to the split that lacks most images with that class.
    """
    of_unit: dict[int, Counter[int]] = {}
    for unit, classes in zip(units.tolist(), shown, strict=True):
        of_unit.setdefault(unit, Counter()).update(classes)
    order = sorted(of_unit, key=lambda unit: _fraction(names[unit], rule.seed))
    left = sum(of_unit.values(), Counter())
    wanted = {category: np.array(rule.shares) * total for category, total in left.items()}
    wanted_images = np.array(rule.shares) * len(units)
    sizes, chosen = Counter(units.tolist()), {}
    while left:
        category = min(left, key=lambda one: (left[one], one))
        showing = [unit for unit in order if unit not in chosen and category in of_unit[unit]]
        for unit in sorted(showing, key=lambda unit: -of_unit[unit][category]):
            split = max(range(3), key=lambda s: (wanted[category][s], wanted_images[s]))
            chosen[unit] = SPLITS[split]
            wanted_images[split] -= sizes[unit]
            for one, count in of_unit[unit].items():
                wanted[one][split] -= count
            left -= of_unit[unit]
    return [chosen[unit] for unit in units.tolist()]


def _with_splits(raw: RawDataset, images: pa.Table, splits: list[str], rule: str) -> RawDataset:
    """The usable images with these splits, and their boxes."""
    codes = np.zeros(len(raw.images), np.int64)  # rows that are left out: any split will do
    codes[images["image_id"].to_numpy()] = [SPLITS.index(split) for split in splits]
    boxes, names = usable_boxes(raw), pa.array(SPLITS, pa.string())
    return replace(
        raw,
        images=_set_split(raw.images, names.take(pa.array(codes))),
        boxes=_set_split(boxes, names.take(pa.array(codes[boxes["image_id"].to_numpy()]))),
        metadata=replace(raw.metadata, split_rule=rule),
    )


def _set_split(table: pa.Table, values: pa.Array) -> pa.Table:
    return table.set_column(table.schema.get_field_index("split"), "split", values)


def _class_shares(raw: RawDataset, boxes: pa.Table) -> dict[str, dict[str, float]]:
    classes, names = boxes["category"].to_numpy(), raw.metadata.class_names
    counts = {
        split: np.bincount(classes[pc.equal(boxes["split"], split).to_numpy()], minlength=len(names))
        for split in SPLITS
    }
    totals = np.sum(list(counts.values()), axis=0)
    return {
        name: {split: float(counts[split][category] / totals[category]) for split in SPLITS}
        for category, name in enumerate(names)
        if totals[category]
    }


def _counted(column: pa.ChunkedArray) -> Counter[str]:
    return Counter({entry["values"]: entry["counts"] for entry in pc.value_counts(column).to_pylist()})


def _in_order(counts: Counter[str]) -> dict[str, int]:
    return {split: counts[split] for split in SPLITS if counts[split]}


def text(found: Division, target: Path) -> str:
    """The division for a reader."""
    total = max(sum(found.images.values()), 1)
    lines = [
        f"{split}: {count} images ({100 * count / total:.1f} %), {found.boxes.get(split, 0)} boxes"
        for split, count in found.images.items()
    ]
    if found.kept_together:
        reason = f"equal, alike, or of one group; at most {found.largest_unit} in one"
        lines.append(f"{found.kept_together} images stay together with others ({reason})")
    if found.without_group:
        lines.append(f"{found.without_group} images match no group; each stands for itself")
    if found.leaks_before:
        lines.append(f"pictures in more than one split before: {len(found.leaks_before)}, now none")
    lines += [
        f"class {name!r} has no boxes in {' and '.join(missing)}"
        for name, shares in found.class_shares.items()
        if (missing := [split for split in found.images if not shares[split]])
    ]
    return "\n".join([*lines, f"written to {target}"])
