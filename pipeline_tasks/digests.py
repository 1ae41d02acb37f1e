"""Digests: names for content that do not depend on time, place or the order of keys."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

FileDigests = dict[str, dict[str, Any]]


def of_json(value: Any) -> str:
    """SHA-256 (hex) of a JSON value in canonical form."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def of_file(path: Path) -> str:
    """SHA-256 (hex) of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def of_folder(folder: Path) -> FileDigests:
    """Digest and size of every file below a folder, by its path relative to it, in sorted order."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        path.relative_to(folder).as_posix(): {"sha256": of_file(path), "size": path.stat().st_size} for path in files
    }


def of_files(files: FileDigests, subfolder: str = "") -> str:
    """One digest for the listed files, or for those below `subfolder`, whose prefix is left out of the names."""
    prefix = subfolder + "/" if subfolder else ""
    return of_json(
        {name.removeprefix(prefix): entry["sha256"] for name, entry in files.items() if name.startswith(prefix)}
    )
