"""The images an engine has learned from, and the test images on which it may therefore not be judged.

An image is known by the digest of its file and by its perceptual hash, which also tells re-encoded and resized copies
and neighbouring frames of a film. Both are written into the lineage of a registered engine.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pipeline_tasks import initial_checkpoint, pinned_files
from pipeline_tasks.validate_data import is_absent

if TYPE_CHECKING:
    import pyarrow as pa

    from model.data.near_duplicates import Hashes
    from pipeline_tasks.execution import StepContext

LINEAGE_FILE = "lineage.json"
CONTENTS, HASHES, KIND = "seen_images", "seen_perceptual_hashes", "perceptual_hash_kind"
UNKNOWN = "images_unknown_of"
CANDIDATE = "the candidate"
ROLES = ("target", "pretrain", "unlabeled")


@dataclass(frozen=True)
class SeenImages:
    """What an engine was trained, chosen or pseudo-labelled on.

    hashed: whether all of it is known by perceptual hashes too; registrations of older releases have none.
    unknown: checkpoints it descends from that no run of the line has trained, by name; a checkpoint tells the sets and
    licences it descends from, but none of its images.
    """

    contents: frozenset[str]
    hashes: Hashes
    hashed: bool
    unknown: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Fields of lineage.json."""
        from model.data.near_duplicates import HASH_KIND, hash_text

        kind = HASH_KIND if self.hashed else None
        hashes = [hash_text(int(value)) for value in self.hashes]
        return {CONTENTS: sorted(self.contents), KIND: kind, HASHES: hashes, UNKNOWN: list(self.unknown)}


@dataclass(frozen=True)
class HeldOutImages:
    """The test split: paths, digests and hashes in its order; None where a hash is not known."""

    paths: tuple[str, ...]
    contents: tuple[str | None, ...]
    hashes: tuple[int | None, ...]


@dataclass(frozen=True)
class Exclusion:
    """A test image that is left out, who has seen it, and by what it was recognised.

    bits: in how many of 64 bits its hash differs from the nearest image that was seen; None for equal content.
    """

    image: str
    seen_by: str
    recognised_by: Literal["content", "perceptual hash"]
    bits: int | None


def seen_by_run(context: StepContext) -> SeenImages:
    """All images of the run but its test split, and, where it starts from the champion, what that one has seen.

    What its initial checkpoint and its extra teachers have seen nobody knows; they are named.
    """
    parts = [_of_tables(context.inputs[role], role) for role in ROLES if not is_absent(context.inputs[role])]
    descends = context.parameters.start.from_champion or context.parameters.teach.source != "train"
    if descends and context.champion:
        parts.append(seen_by_bundle(context.champion))
    joined = _joined(parts)
    return replace(joined, unknown=tuple(dict.fromkeys((*_foreign_checkpoints(context), *joined.unknown))))


def seen_by_bundle(folder: Path) -> SeenImages:
    """What a registered engine has seen, from its lineage."""
    from model.data.near_duplicates import HASH_KIND, hashes_from_text

    lineage = json.loads((folder / LINEAGE_FILE).read_text(encoding="utf-8"))
    hashed = lineage.get(KIND) == HASH_KIND
    hashes = hashes_from_text(lineage[HASHES] if hashed else [])
    unknown = lineage[UNKNOWN] if UNKNOWN in lineage else _foreign_checkpoints_of_old(lineage)
    return SeenImages(frozenset(lineage[CONTENTS]), hashes, hashed, tuple(unknown))


def read_held_out(target: Path) -> HeldOutImages:
    """The test split of a published dataset, in the order of `read_dataset(...).split("test")`."""
    from model.data.tables import HASH_COLUMN, read_dataset

    table = read_dataset(target).images
    rows = table.filter(_is_test(table))
    columns = (tuple(rows[name].to_pylist()) for name in ("path", "sha256", HASH_COLUMN))
    return HeldOutImages(*columns)


def exclusions(images: HeldOutImages, seen: Mapping[str, SeenImages], near_bits: int) -> dict[int, Exclusion]:
    """By row, the test images that one of `seen` knows; whoever comes first is named."""
    found: dict[int, Exclusion] = {}
    for name, one in seen.items():
        for row, exclusion in _known_to(images, name, one, near_bits):
            found.setdefault(row, exclusion)
    return dict(sorted(found.items()))


def _known_to(images: HeldOutImages, name: str, seen: SeenImages, near_bits: int) -> Iterator[tuple[int, Exclusion]]:
    import numpy as np

    from model.data.near_duplicates import nearest

    for row, content in enumerate(images.contents):
        if content in seen.contents:
            yield row, Exclusion(images.paths[row], name, "content", None)
    hashed = [row for row, value in enumerate(images.hashes) if value is not None]
    neighbours = nearest(np.array([images.hashes[row] for row in hashed], np.uint64), seen.hashes)
    for row, bits in zip(hashed, neighbours.bits.tolist(), strict=True):
        if bits <= near_bits:
            yield row, Exclusion(images.paths[row], name, "perceptual hash", bits)


def _foreign_checkpoints(context: StepContext) -> Iterator[str]:
    """The checkpoints from outside that the run's networks begin from or learn from, by name and digest."""
    trained = ("student", "teacher") if context.parameters.teach.source == "train" else ("student",)
    if any(initial_checkpoint.for_part(context.run, part) for part in trained):
        pinned = context.run[initial_checkpoint.INPUT]
        yield f"initial checkpoint {Path(pinned['path']).name} ({pinned['digest'][:8]})"
    for pinned in pinned_files.of_step(context.run, "teach").values():
        yield f"extra teacher {Path(pinned['path']).name} ({pinned['digest'][:8]})"


def _foreign_checkpoints_of_old(lineage: Mapping[str, Any]) -> Iterator[str]:
    """The same of an engine that an older release registered: it wrote down the digests alone."""
    if digest := lineage.get(initial_checkpoint.INPUT):
        yield f"initial checkpoint {digest[:8]}"
    for digest in lineage.get(pinned_files.EXTRA_TEACHERS, []):
        yield f"extra teacher {digest[:8]}"


def _of_tables(folder: Path, role: str) -> SeenImages:
    import numpy as np
    import pyarrow.compute as pc

    from model.data.tables import HASH_COLUMN, read_dataset

    table = read_dataset(folder).images
    table = table.filter(pc.invert(_is_test(table))) if role == "target" else table
    hashes = table[HASH_COLUMN].drop_null().combine_chunks()
    known = np.unique(hashes.to_numpy(zero_copy_only=False).astype(np.uint64))
    contents = frozenset(table["sha256"].drop_null().to_pylist())
    return SeenImages(contents, known, len(hashes) == len(table))


def _is_test(table: pa.Table) -> pa.ChunkedArray:
    import pyarrow.compute as pc

    return pc.equal(table["split"], "test")


def _joined(parts: Iterable[SeenImages]) -> SeenImages:
    import numpy as np

    parts = list(parts)
    hashes = np.unique(np.concatenate([np.empty(0, np.uint64), *(part.hashes for part in parts)]))
    contents = frozenset().union(*(part.contents for part in parts))
    unknown = tuple(dict.fromkeys(name for part in parts for name in part.unknown))
    return SeenImages(contents, hashes, all(part.hashed for part in parts), unknown)
