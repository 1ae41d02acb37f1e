"""Pictures from a bucket on a local disk: as many as a bound allows, the least recently used ones go first.

Any number of processes and threads may share the folder. A picture is written beside its place and renamed, so a killed
process leaves no half one; the sum of sizes is kept in one small file under a lock, and counted anew before anything is
removed.
"""

from __future__ import annotations

import fcntl
import logging
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path

from pipeline_tasks.errors import ConfigurationError

log = logging.getLogger(__name__)

FOLDER, GIGABYTES = "NASLINE_IMAGE_CACHE", "NASLINE_IMAGE_CACHE_GB"
DEFAULT_GIGABYTES = 20.0
KEPT_SHARE = 0.9
"""What is left of the bound after a clean-up, so that the next picture does not need another one."""
ABANDONED_SECONDS = 3600.0
_USAGE, _INCOMING = "usage", ".incoming"


class ImageCache:
    """Files by key below a folder, together no more than `limit_bytes`; 0 keeps nothing."""

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        self._folder, self._limit = folder, limit_bytes
        self._warned = False

    def get(self, key: str, size: int) -> bytes | None:
        """The content under a key (hex digits), None where it is not there or has not that many bytes."""
        path = self._path(key)
        try:
            content = path.read_bytes()
        except OSError:
            return None
        with suppress(OSError):  # another process has just removed it
            if len(content) == size:
                os.utime(path)  # the time of the last use decides who goes
            else:
                path.unlink()
        return content if len(content) == size else None

    def put(self, key: str, content: bytes) -> None:
        """Keep a content; a full or unwritable disk is a warning, since the picture is at hand all the same."""
        if len(content) > self._limit:
            return
        path = self._path(key)
        beside = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}{_INCOMING}")
        try:
            self._reserve(beside, len(content))
            with beside.open("r+b") as file:
                file.write(content)
            os.replace(beside, path)
        except OSError as error:
            with suppress(OSError):
                beside.unlink(missing_ok=True)
            if not self._warned:
                log.warning("pictures are not kept in %s: %s; they are fetched each time", self._folder, error.strerror)
            self._warned = True

    def _path(self, key: str) -> Path:
        return self._folder / key[:2] / key[2:]

    def _reserve(self, beside: Path, size: int) -> None:
        """Make room for a file and create it in its full size, before it is written: whoever counts sees it, and a
        process that dies in between leaves the sum too high, not too low; it is counted anew before a picture goes.
        """
        with self._usage() as file:
            text = file.read()
            used = int(text) if text.isdigit() else self._clean_up(self._limit)
            if used + size > self._limit:
                used = self._clean_up(int(KEPT_SHARE * self._limit) - size)
            file.seek(0)
            file.truncate()
            file.write(str(used + size).encode())
            beside.parent.mkdir(exist_ok=True)
            with beside.open("wb") as reserved:
                reserved.truncate(size)

    @contextmanager
    def _usage(self) -> Iterator[FileIO]:
        self._folder.mkdir(parents=True, exist_ok=True)
        with FileIO(os.open(self._folder / _USAGE, os.O_RDWR | os.O_CREAT, 0o644), "r+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            try:
                yield file
            finally:  # closing would not do: a process forked off meanwhile holds the same lock
                fcntl.flock(file, fcntl.LOCK_UN)

    def _clean_up(self, allowed: int) -> int:
        """Remove the least recently used files until no more than `allowed` bytes are left; gives what is left."""
        found = sorted(self._files())
        left = sum(size for _, size, _ in found)
        for _, size, path in found:
            if left <= max(allowed, 0):
                break
            with suppress(OSError):
                os.unlink(path)
            left -= size
        return left

    def _files(self) -> Iterator[tuple[float, int, str]]:
        """Time of last use, size and path of all files; what a killed process was writing an hour ago comes first."""
        forgotten = time.time() - ABANDONED_SECONDS
        for shelf in self._folder.iterdir():
            if not shelf.is_dir():
                continue
            for entry in os.scandir(shelf):
                with suppress(OSError):  # another process may have renamed it
                    status = entry.stat()
                    abandoned = entry.name.endswith(_INCOMING) and status.st_mtime < forgotten
                    yield (0.0 if abandoned else status.st_mtime), status.st_size, entry.path


def default_cache() -> ImageCache:
    """The cache that the environment names: NASLINE_IMAGE_CACHE (default: `images` in NASLINE_CACHE or
    ~/.cache/nasline) and NASLINE_IMAGE_CACHE_GB (default 20).

    Raises:
        ConfigurationError: the bound is no number, or negative.
    """
    base = os.environ.get("NASLINE_CACHE") or "~/.cache/nasline"
    folder = os.environ.get(FOLDER) or f"{base}/images"
    given = os.environ.get(GIGABYTES) or str(DEFAULT_GIGABYTES)
    try:
        limit = int(float(given) * 1e9)
    except (ValueError, OverflowError):
        limit = -1
    if limit < 0:
        raise ConfigurationError(f"{GIGABYTES} must be a number of gigabytes, 0 or more, got {given!r}")
    return ImageCache(Path(folder).expanduser(), limit)
