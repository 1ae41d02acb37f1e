"""Putting files into the folder that is being written."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

from pipeline_tasks.bucket_images import of_folder
from pipeline_tasks.data.writers.content import Picture
from pipeline_tasks.errors import DataError
from pipeline_tasks.images import read_content
from pipeline_tasks.store import in_parallel

FETCHED_PER_TASK = 32


def copy_pictures(places: Iterable[tuple[Picture, Path]]) -> None:
    """Copy pictures, making the folders above them; those that stay in a bucket are fetched, many at once.

    Raises:
        DataError: one is not in the bucket any more, or another has taken its place.
        UnavailableError: the bucket does not answer.
    """
    to_fetch = []
    for picture, target in places:
        target.parent.mkdir(parents=True, exist_ok=True)
        if of_folder(picture.folder) is not None:
            to_fetch.append((picture, target))
        else:
            shutil.copyfile(picture.folder / picture.path, target)
    groups = [to_fetch[start : start + FETCHED_PER_TASK] for start in range(0, len(to_fetch), FETCHED_PER_TASK)]
    in_parallel(_fetch, groups)


def _fetch(places: Sequence[tuple[Picture, Path]]) -> None:
    for picture, target in places:
        try:
            target.write_bytes(read_content(picture.folder, picture.path))
        except ValueError as error:
            raise DataError(str(error)) from None


def write_text(target: Path, text: str) -> None:
    """Write a UTF-8 file, making the folders above it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(text, encoding="utf-8", newline="\n")
