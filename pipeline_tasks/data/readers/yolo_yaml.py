"""The YAML file of a YOLO set: class names, and what it says of splits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from pipeline_tasks.data.raw import SPLITS
from pipeline_tasks.errors import DataError

LARGEST_FILE_BYTES = 4 << 20


@dataclass(frozen=True)
class YoloDescription:
    """What data.yaml says."""

    class_names: tuple[str, ...]
    split_places: dict[str, list[str]] = field(default_factory=dict)
    """By split: folders or text files with lists, relative to the dataset folder; ".." and absolute parts left out."""
    class_count: int | None = None  # nc, where it is given


class _WithoutAliases(yaml.SafeLoader):
    """Aliases let a few lines expand to gigabytes, and no class list needs them."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise yaml.YAMLError(f"line {mark.line + 1}: aliases (*name) are not accepted")
        return super().compose_node(parent, index)


def read_description(folder: Path, name: str) -> YoloDescription:
    """Read `folder`/`name`; `DataError` names what is wrong with it."""
    file = folder / name
    if file.stat().st_size > LARGEST_FILE_BYTES:
        raise DataError(f"{file} has {file.stat().st_size} bytes, which is too large for a list of classes")
    try:
        content = yaml.load(file.read_text(encoding="utf-8"), _WithoutAliases)  # a SafeLoader
    except (yaml.YAMLError, UnicodeDecodeError, ValueError, RecursionError) as error:
        raise DataError(f"{file} is not valid YAML: {' '.join(str(error).split()):.300}") from error
    if not isinstance(content, dict):
        raise DataError(f"{file} must hold names: [...], it is no mapping")
    count = content.get("nc")
    return YoloDescription(_names(file, content.get("names")), _places(content), count if type(count) is int else None)


def _names(file: Path, names: Any) -> tuple[str, ...]:
    """names: a list, or a mapping of 0, 1, … to names."""
    if isinstance(names, dict):
        if sorted(names, key=str) != sorted(range(len(names)), key=str):
            raise DataError(f"{file}: the keys of names must be 0 to {len(names) - 1}, they are {list(names)!r:.80}")
        names = [names[index] for index in range(len(names))]
    if not isinstance(names, list) or not names or not all(type(name) in (str, int, float) for name in names):
        raise DataError(f"{file}: names must be a list of class names, it is {names!r:.80}")
    texts = tuple(str(name).strip() for name in names)
    repeated = [text for text in texts if texts.count(text) > 1 or not text]
    if repeated:
        raise DataError(f"{file}: the class name {repeated[0]!r} is empty or given twice; class names must differ")
    return texts


def _places(content: dict[str, Any]) -> dict[str, list[str]]:
    """Exports write ../train/images and absolute paths of their machine; the last parts are what a set can have."""
    base = content.get("path")
    found = {}
    for split in SPLITS:
        given = content.get(split) or (content.get("valid") if split == "val" else None)
        texts = [text for text in (given if isinstance(given, list) else [given]) if type(text) is str]
        found[split] = [place for text in texts for place in _inside(base, text)]
    return {split: places for split, places in found.items() if places}


def _inside(base: Any, text: str) -> Sequence[str]:
    plain = [part for part in PurePosixPath(text.replace("\\", "/")).parts if part not in ("..", ".", "/")]
    if not plain:
        return []
    above = [part for part in PurePosixPath(base).parts if part not in ("..", ".", "/")] if type(base) is str else []
    return ["/".join(plain), "/".join([*above[-1:], *plain])]
