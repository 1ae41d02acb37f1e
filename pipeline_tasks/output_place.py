"""Whether something can be written where a command was told to, asked before the work and not after it."""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path

from pipeline_tasks.errors import ParameterError

SHOWN_LETTERS = 100
"""Of a path that may be too long for a file system."""
NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
NO_PLACE = (errno.ENOENT, errno.EEXIST, errno.ENOTDIR, errno.EPERM, errno.ENAMETOOLONG, errno.ELOOP)


def require_place(option: str, path: Path) -> None:
    """Try whether a path can be made, or written into where it is a folder; it may exist, and nothing is left there.

    Raises:
        ParameterError: a folder above it is no folder or takes nothing, or a name is too long.
    """
    place = path.absolute()
    nearest = next(folder for folder in (place, *place.parents) if os.path.lexists(folder))
    if nearest.is_dir():
        reason = _refusal(nearest, place)
    elif not nearest.exists():
        reason = f"{nearest} is a link to nothing"
    else:  # whether a file may be in the place itself, the command knows
        reason = "" if nearest == place else f"{nearest} is no folder"
    if reason:
        shown = str(path)[:SHOWN_LETTERS]
        raise ParameterError(f"{option} {shown} is no possible place: {reason}; give another one")


def _refusal(nearest: Path, place: Path) -> str:
    """Why no folders of these names can be made, "" where they can: permissions alone do not tell (/proc is root's)."""
    try:
        with tempfile.TemporaryDirectory(prefix=".nasline-", dir=nearest, ignore_cleanup_errors=True) as trial:
            (Path(trial) / place.relative_to(nearest)).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if error.errno in NO_ROOM:  # a fault of the moment, and of no name
            raise
        return f"{nearest} does not take it ({error.strerror})"
    return ""


def require_folder(option: str, folder: Path) -> None:
    """The same for a folder that may exist.

    Raises:
        ParameterError: a file has its place, or it cannot be made there.
    """
    require_place(option, folder)
    if folder.exists() and not folder.is_dir():
        raise ParameterError(f"{option} {folder} is no folder; give a folder, which need not exist")


def obstacle(out: Path, error: OSError) -> str:
    """Why a command's output could not be written after all; "" for an error of another kind or in another place.

    Its place is the path, what lies above it or in it, and a file of its name beside it, which is renamed at the end.
    """
    place = out.absolute()
    if error.errno not in NO_PLACE or (error.errno == errno.ENOENT and place.is_dir()):  # a file to be read from it
        return ""
    for name in (error.filename, error.filename2):
        failed = Path(name).absolute() if isinstance(name, str | os.PathLike) else Path()
        beside = failed.parent == place.parent and place.name in failed.name
        if beside or place in failed.parents or failed in (place, *place.parents):
            return f"{failed} cannot be written ({error.strerror})"
    return ""
