"""Opening the pictures that dataset tables name by a symbolic root, such as `target/images/a.jpg`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from model.data.images import read_image
from pipeline_tasks.errors import DataError


@dataclass(frozen=True)
class FolderImages:
    """Opens pictures below local folders; a plain value, so that loader processes may receive a copy."""

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
        return read_image(Path(folder, relative), denominator)


def make_open_image(roots: Mapping[str, Path]) -> FolderImages:
    """An `OpenImage` for dataset tables whose symbolic roots lie in these folders."""
    return FolderImages(tuple((name, str(folder)) for name, folder in roots.items()))
