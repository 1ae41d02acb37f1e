"""The content digest of a folder, equal to the one that `dvc add` gives it.

DVC names a folder by the MD5 of a JSON list with the MD5 and the relative path of every file, followed by ".dir"
(`dvc_data.hashfile.tree.Tree.digest`). Computing it here gives data outside DVC a name of the same kind, and lets
tracked data be recognised without starting DVC.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import sqlite3
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

logger = logging.getLogger(__name__)

IGNORED_NAMES = frozenset({".git", ".hg", ".dvc"})
SETTLED_AFTER_S = 2.0
"""A file changed less than this long ago is not remembered: it could change again without a new time stamp."""

FileState = tuple[str, int, int, int]  # absolute path, size, mtime in ns, inode


def folder_digest(folder: Path, files: Iterable[str], cache: Path | None = None) -> str:
    """MD5 of the listing of `files` (relative to `folder`, with "/"), as 32 hex digits and ".dir".

    The digests of files are remembered by path, size, time of change and inode in the SQLite file `cache`, by
    default in the user's cache folder.
    """
    known = file_digests(folder, sorted(files), cache)
    text = json.dumps([{"md5": digest, "relpath": name} for name, digest in known.items()], sort_keys=True)
    return hashlib.md5(text.encode(), usedforsecurity=False).hexdigest() + ".dir"


def file_digests(folder: Path, files: Iterable[str], cache: Path | None = None) -> dict[str, str]:
    """MD5 of each of `files` (relative to `folder`, with "/"), in their order; remembered as `folder_digest` says."""
    names = list(files)
    states = [_state(folder / name) for name in names]
    cache = cache or default_cache()
    known = _recall(cache, states)
    missing = [state for state in states if state not in known]
    with ThreadPoolExecutor(os.cpu_count() or 1) as executor:
        fresh = dict(zip(missing, executor.map(_file_md5, missing, chunksize=32), strict=True))
    _remember(cache, fresh)
    known |= fresh
    return {name: known[state] for state, name in zip(states, names, strict=True)}


def default_cache() -> Path:
    """The SQLite file in the user's cache folder (XDG_CACHE_HOME, by default ~/.cache)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "nasline", "file_digests.sqlite")


def files_below(folder: Path) -> list[str]:
    """Files below a folder, relative to it; the folders that DVC and Git keep for themselves are left out."""
    found: list[str] = []
    for parent, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if name not in IGNORED_NAMES]
        prefix = Path(parent).relative_to(folder)
        found += [(prefix / name).as_posix() for name in names if name != ".git"]
    return found


def _state(path: Path) -> FileState:
    status = path.stat()
    return os.path.abspath(path), status.st_size, status.st_mtime_ns, status.st_ino


def _file_md5(state: FileState) -> str:
    with open(state[0], "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def _open(cache: Path) -> sqlite3.Connection:
    cache.parent.mkdir(parents=True, exist_ok=True)
    connection = sqlite3.connect(cache, timeout=60)
    connection.execute(
        "CREATE TABLE IF NOT EXISTS files "
        "(path TEXT PRIMARY KEY, size INTEGER, mtime_ns INTEGER, inode INTEGER, md5 TEXT)"
    )
    return connection


def _recall(cache: Path, states: list[FileState]) -> dict[FileState, str]:
    if not cache.is_file():
        return {}
    query = "SELECT md5 FROM files WHERE path = ? AND size = ? AND mtime_ns = ? AND inode = ?"
    try:
        with closing(_open(cache)) as connection:
            found = {state: connection.execute(query, state).fetchone() for state in states}
    except (OSError, sqlite3.Error) as error:
        logger.warning("%s cannot be read (%s); every file is digested again", cache, error)
        return {}
    return {state: row[0] for state, row in found.items() if row is not None}


def _remember(cache: Path, digests: dict[FileState, str]) -> None:
    settled = time.time_ns() - int(SETTLED_AFTER_S * 1e9)
    rows = [(*state, digest) for state, digest in digests.items() if state[2] < settled]
    if not rows:
        return
    try:
        with closing(_open(cache)) as connection, connection:
            connection.executemany("INSERT OR REPLACE INTO files VALUES (?, ?, ?, ?, ?)", rows)
    except (OSError, sqlite3.Error) as error:
        logger.warning("%s cannot be written (%s); the digests are not remembered", cache, error)
