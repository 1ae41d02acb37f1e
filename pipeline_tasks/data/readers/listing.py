"""What lies in a dataset folder: every file once, and no link that leads out of it."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath

from pipeline_tasks import bucket_images
from pipeline_tasks.data.coco import is_picture
from pipeline_tasks.errors import DataError

ARCHIVE_SUFFIXES = (".zip", ".tar", ".tgz", ".tar.gz", ".tar.bz2", ".tar.xz", ".7z", ".rar")
IGNORED_FOLDERS = frozenset({".git", ".hg", ".dvc", "__MACOSX"})
_DVC_CACHE_ENTRY = re.compile(r"/files/md5/[0-9a-f]{2}/[0-9a-f]{30}$")
"""Where `dvc checkout` points the files of a folder to when its cache is set to links."""


@dataclass(frozen=True)
class Listing:
    """The regular files below a folder, relative to it with "/" between folders, sorted."""

    folder: Path
    files: tuple[str, ...]

    @cached_property
    def pictures(self) -> tuple[str, ...]:
        """The files with the suffix of a picture."""
        return tuple(file for file in self.files if is_picture(PurePosixPath(file).name))

    @cached_property
    def known(self) -> frozenset[str]:
        """All files, to ask whether one exists."""
        return frozenset(self.files)

    def having(self, *suffixes: str) -> list[str]:
        """The files with one of these suffixes, written in lower case."""
        return [file for file in self.files if file.lower().endswith(suffixes)]


def list_folder(folder: Path, allow_links: bool = False) -> Listing:
    """List a dataset folder, with the pictures that stay in a bucket (`bucket_images`).

    `allow_links`: follow links that lead out of the folder. Raises `DataError` for what is no folder (with the way
    to make it one) and, unless allowed, for such a link.
    """
    if not folder.is_dir():
        raise DataError(_no_folder(folder))
    walk = _Walk(folder, allow_links)
    walk.visit(str(folder), "")
    listing = Listing(folder, tuple(sorted(walk.found)))
    bucket = bucket_images.of_folder(folder)
    if bucket is None:
        return listing
    if own := next((picture for picture in listing.pictures if picture.startswith("images/")), None):
        raise DataError(
            f"{folder / own} lies here, while {bucket_images.ROOT_FILE} says that images/ stays at {bucket.address}; "
            "remove one of the two"
        )
    return Listing(folder, tuple(sorted([*walk.found, *bucket.paths()])))


def _no_folder(folder: Path) -> str:
    pointer = folder.with_name(folder.name + ".dvc")
    if pointer.is_file():
        return f"{folder} is not a folder; run `dvc pull {pointer}`"
    if folder.name.lower().endswith(ARCHIVE_SUFFIXES):
        return f"{folder} is an archive, which is not read; unpack it and give the folder that comes out"
    return f"{folder} is not a folder; give the folder of a dataset"


def _require_text(entry: os.DirEntry[str]) -> None:
    """Names that were written in another encoding (old archives) are in no table."""
    try:
        entry.name.encode()
    except UnicodeEncodeError:
        raise DataError(f"the name of {os.fsencode(entry.path)!r} is no UTF-8 text; rename the file") from None


class _Walk:
    """A walk that enters each real folder once, so that links cannot make it endless."""

    def __init__(self, folder: Path, allow_links: bool) -> None:
        self.found: list[str] = []
        self._root, self._allow_links = os.path.realpath(folder), allow_links
        self._entered = {self._root}

    def visit(self, folder: str, prefix: str) -> None:
        with os.scandir(folder) as entries:
            for entry in entries:
                _require_text(entry)
                if entry.is_symlink() and not self._may_follow(entry):
                    continue
                if entry.is_dir():
                    self._enter(entry, prefix)
                elif entry.is_file():  # neither pipes nor devices, which would be read for ever
                    self.found.append(prefix + entry.name)

    def _enter(self, entry: os.DirEntry[str], prefix: str) -> None:
        real = os.path.realpath(entry.path)
        if entry.name not in IGNORED_FOLDERS and real not in self._entered:
            self._entered.add(real)
            self.visit(entry.path, f"{prefix}{entry.name}/")

    def _may_follow(self, entry: os.DirEntry[str]) -> bool:
        """Whether a link points to something; `DataError` where it leads out of the folder."""
        target = os.path.realpath(entry.path)
        inside = target == self._root or target.startswith(self._root + os.sep)
        if not (inside or self._allow_links or _DVC_CACHE_ENTRY.search(target)):
            raise DataError(
                f"{entry.path} is a link to {target}, outside of the dataset; put a copy in its place, or set "
                "validate_data.allow_links if it is yours"
            )
        return os.path.exists(target)
