"""Putting files into the folder that is being written."""

from __future__ import annotations

import shutil
from pathlib import Path


def copy_picture(source: Path, target: Path) -> None:
    """Copy one picture, making the folders above it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)


def write_text(target: Path, text: str) -> None:
    """Write a UTF-8 file, making the folders above it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(text, encoding="utf-8", newline="\n")
