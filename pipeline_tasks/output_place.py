"""Whether something can be written where a command was told to, asked before the work and not after it."""

from __future__ import annotations

from pathlib import Path

from pipeline_tasks.errors import ParameterError

SHOWN_LETTERS = 100
"""Of a path that may be too long for a file system."""


def require_place(option: str, path: Path) -> None:
    """Look at the folders above a path; nothing is made, and the path itself may exist.

    Raises:
        ParameterError: one of them is no folder, or a name is too long.
    """
    place = path.expanduser().absolute()
    try:
        place.exists()  # asks the file system about the name
        nearest = next(folder for folder in place.parents if folder.exists())
    except OSError as error:
        shown = str(path)[:SHOWN_LETTERS]
        raise ParameterError(f"{option} {shown} is no possible place ({error.strerror}); give another one") from None
    if not nearest.is_dir():
        raise ParameterError(f"{option} {path} is no possible place: {nearest} is no folder; give another one")


def require_folder(option: str, folder: Path) -> None:
    """The same for a folder that may exist.

    Raises:
        ParameterError: a file has its place, or it cannot be made there.
    """
    require_place(option, folder)
    if folder.exists() and not folder.is_dir():
        raise ParameterError(f"{option} {folder} is no folder; give a folder, which need not exist")
