"""`nasline data list`: the sets that a DVC project tracks, with what is in them."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from pipeline_tasks.data.sets import open_set, usable_boxes, usable_images
from pipeline_tasks.data.versioning import dataset_digest, project_root
from pipeline_tasks.errors import DataError, UsageError

SKIPPED = frozenset({".git", ".dvc", ".venv", "node_modules", "__pycache__", ".nasline"})
SHOWN_CLASSES = 6


@dataclass(frozen=True)
class ListedSet:
    """One set of the project."""

    path: Path
    digest: str
    """As the .dvc file records it."""
    files: int
    size_bytes: int
    state: str
    """"as recorded", "changed since", "not here", or why it cannot be read."""
    format: str = ""
    images: int = 0
    boxes: int = 0
    classes: tuple[str, ...] = ()
    splits: dict[str, int] = field(default_factory=dict)


def list_sets(where: Path) -> list[ListedSet]:
    """The folders tracked by .dvc files in the project that `where` lies in, sorted by path.

    Raises `UsageError` outside of a DVC project, `DataError` for a damaged .dvc file.
    """
    project = where.resolve() if (where / ".dvc").is_dir() else project_root(where / "x")
    if project is None:
        raise UsageError(f"{where} lies outside of a DVC project; make one with `nasline init DIR`")
    return [_listed(pointer, out) for pointer in pointers(project) for out in _folders(pointer)]


def pointers(project: Path) -> list[Path]:
    """The .dvc files of a project, sorted."""
    found = []
    for parent, folders, names in os.walk(project):
        folders[:] = [name for name in folders if name not in SKIPPED]
        found += [Path(parent, name) for name in names if name.endswith(".dvc")]
    return sorted(found)


def _folders(pointer: Path) -> list[dict[str, Any]]:
    """The outputs of a .dvc file that are folders."""
    try:
        outs = yaml.safe_load(pointer.read_text(encoding="utf-8"))["outs"]
        return [out for out in outs if str(out["md5"]).endswith(".dir")]
    except (yaml.YAMLError, KeyError, TypeError, UnicodeDecodeError):
        raise DataError(f"{pointer} is no .dvc file; restore it, or run `nasline data add` on its folder") from None


def _listed(pointer: Path, out: dict[str, Any]) -> ListedSet:
    path = pointer.parent / out["path"]
    known = {"digest": out["md5"], "files": int(out.get("nfiles", 0)), "size_bytes": int(out.get("size", 0))}
    if not path.is_dir():
        return ListedSet(path, state="not here; `dvc pull` fetches it", **known)
    state = "as recorded" if dataset_digest(path) == out["md5"] else "changed since; `nasline data add` records it"
    try:
        with open_set(str(path)) as opened:
            images, boxes = usable_images(opened.raw), usable_boxes(opened.raw)
            return ListedSet(
                path,
                state=state,
                format=opened.recognised.format,
                images=len(images),
                boxes=len(boxes),
                classes=opened.class_names,
                splits=dict(Counter(images["split"].to_pylist())),
                **known,
            )
    except DataError as error:
        return ListedSet(path, state=f"{state}; cannot be read: {error}", **known)


def text(sets: list[ListedSet]) -> str:
    """The list for a reader, paths relative to the current folder."""
    if not sets:
        return "no sets yet; `nasline data add PATH` adds one"
    return "\n".join("\n".join(_lines(one)) for one in sets)


def _lines(one: ListedSet) -> list[str]:
    splits = ", ".join(f"{name} {count}" for name, count in one.splits.items())
    more = f" and {len(one.classes) - SHOWN_CLASSES} more" if len(one.classes) > SHOWN_CLASSES else ""
    classes = f"{len(one.classes)} classes ({', '.join(one.classes[:SHOWN_CLASSES])}{more})" if one.classes else ""
    content = [f"{one.images} images ({splits})", f"{one.boxes} boxes", classes] if one.splits else []
    return [
        f"{os.path.relpath(one.path)}  {one.state}",
        f"    digest {one.digest}  {one.files} files, {one.size_bytes / 1e6:.1f} MB",
        *([f"    {one.format}: {', '.join(part for part in content if part)}"] if content else []),
    ]
