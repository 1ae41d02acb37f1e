"""Opening the pictures that dataset tables name by a symbolic root, such as `target/images/a.jpg`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import cv2
import numpy as np
from numpy.typing import NDArray

from model.data.tables import OpenImage
from pipeline_tasks.errors import DataError


@dataclass(frozen=True)
class FolderImages:
    """Opens pictures below local folders; a plain value, so that loader processes may receive a copy."""

    roots: tuple[tuple[str, str], ...]

    def __call__(self, path: str) -> NDArray[np.uint8]:
        """The picture as RGB uint8 (height, width, 3), turned upright where its EXIF data say so.

        Grey pictures become three equal channels. Raises `DataError` for a file that is gone or cannot be decoded.
        """
        root, _, relative = path.partition("/")
        folder = dict(self.roots).get(root)
        if folder is None:
            known = ", ".join(name for name, _ in self.roots)
            raise DataError(f"{path} belongs to the unknown image root {root!r}; known are: {known}")
        file = Path(folder, relative)
        try:
            content = np.fromfile(file, np.uint8)
        except OSError as error:
            raise DataError(f"{file} cannot be read ({error.strerror}); run validate_data again") from error
        return decode(content, str(file))


def decode(content: NDArray[np.uint8], name: str) -> NDArray[np.uint8]:
    """RGB uint8 (height, width, 3) of an encoded picture; `DataError` names the file when that fails."""
    image = cv2.imdecode(content, cv2.IMREAD_COLOR_RGB) if len(content) else None
    if image is None:
        raise DataError(f"{name} is not a picture that can be decoded; replace it and run validate_data again")
    return cast(NDArray[np.uint8], image)


def make_open_image(roots: Mapping[str, Path]) -> OpenImage:
    """An `OpenImage` for dataset tables whose symbolic roots lie in these folders."""
    return FolderImages(tuple((name, str(folder)) for name, folder in roots.items()))
