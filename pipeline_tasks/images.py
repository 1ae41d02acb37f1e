"""Opening the pictures that dataset tables name by a symbolic root, such as `target/images/a.jpg`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from model.data.images import decode_image
from pipeline_tasks import bucket_images
from pipeline_tasks.errors import DataError


def read_content(folder: Path, relative: str) -> bytes:
    """The bytes of a picture of the set in `folder`: from there, or from the bucket where its pictures stay.

    Raises:
        ValueError: it cannot be opened.
        StepError: whatever a bucket can be the cause of (`bucket_images`).
    """
    try:
        if (bucket := bucket_images.of_folder(folder)) is not None:
            return bucket.content(relative)
        return Path(folder, relative).read_bytes()
    except OSError as error:
        raise ValueError(f"image {folder}/{relative} cannot be opened: {error.strerror}") from error


@dataclass(frozen=True)
class FolderImages:
    """Opens pictures of sets by their folders; a plain value, so that loader processes may receive a copy."""

    roots: tuple[tuple[str, str], ...]

    def __call__(self, path: str) -> NDArray[np.uint8]:
        """The picture as RGB uint8 (height, width, 3), upright; a file that is gone or damaged raises ValueError."""
        return self.reduced(path, 1)

    def reduced(self, path: str, denominator: int) -> NDArray[np.uint8]:
        """The same; a JPEG with ``denominator`` (1, 2, 4 or 8) times fewer rows and columns."""
        root, _, relative = path.partition("/")
        folder = dict(self.roots).get(root)
        if folder is None:
            known = ", ".join(name for name, _ in self.roots)
            raise DataError(f"{path} belongs to the unknown image root {root!r}; known are: {known}")
        return decode_image(read_content(Path(folder), relative), f"{folder}/{relative}", denominator)


def make_open_image(roots: Mapping[str, Path]) -> FolderImages:
    """An `OpenImage` for dataset tables whose symbolic roots lie in these folders."""
    return FolderImages(tuple((name, str(folder)) for name, folder in roots.items()))
