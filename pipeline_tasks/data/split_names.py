"""Which split a folder or a file is of, told by its name."""

from __future__ import annotations

import re
from pathlib import PurePosixPath

_SPLIT_OF_WORD = {
    "train": "train", "training": "train",
    "val": "val", "valid": "val", "validation": "val",
    "test": "test", "testing": "test",
}  # fmt: skip
SPLIT_NAMES = tuple(_SPLIT_OF_WORD)
_YEAR = re.compile(r"\d{4}$")
_WORD = re.compile(r"[a-z]+")


def split_of_folder(name: str) -> str | None:
    """The split of a folder such as `train`, `valid` or `val2017`; None for any other name."""
    return _SPLIT_OF_WORD.get(_YEAR.sub("", name.lower()).rstrip("-_"))


def split_of_file(path: str) -> str | None:
    """The split that one word of the file's name tells, else the nearest folder above it; None where neither does."""
    words = {_SPLIT_OF_WORD[word] for word in _WORD.findall(PurePosixPath(path).stem.lower()) if word in _SPLIT_OF_WORD}
    return words.pop() if len(words) == 1 else split_of_path(path)


def split_of_path(path: str) -> str | None:
    """The split of the nearest folder above a file."""
    for folder in reversed(PurePosixPath(path).parts[:-1]):
        if (split := split_of_folder(folder)) is not None:
            return split
    return None
