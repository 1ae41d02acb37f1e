"""What may be meant by a file name that does not exist."""

from __future__ import annotations

import re
from pathlib import PurePosixPath

import pyarrow as pa

from pipeline_tasks.data.raw import RawDataset

_EXPORT_SUFFIX = re.compile(r"\.rf\.[0-9a-f]{8,}", re.IGNORECASE)
"""What Roboflow puts into the names of each export."""


def missing_hints(raw: RawDataset, present: pa.ChunkedArray) -> pa.Array:
    """For each missing picture, what lies there instead: the same picture of another export, or nothing."""
    others = {_export_key(path): path for path in raw.unlisted_files}
    paths, there = raw.images["path"].to_pylist(), present.to_pylist()
    return pa.array(
        [
            f"; {others[_export_key(path)]} has the same name but for the export's suffix"
            if path and found is False and _export_key(path) in others
            else ""
            for path, found in zip(paths, there, strict=True)
        ],
        pa.string(),
    )


def _export_key(path: str) -> str:
    """A file name without what an export added."""
    return _EXPORT_SUFFIX.sub("", PurePosixPath(path).name)
