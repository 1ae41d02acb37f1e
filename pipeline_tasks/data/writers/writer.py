"""Writing a set in a foreign format, whole or not at all."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from pipeline_tasks.bucket_images import LIST_FILE, ROOT_FILE
from pipeline_tasks.data.raw import RawDataset
from pipeline_tasks.data.versioning import require_new, written_aside
from pipeline_tasks.data.writers import coco, objects365, voc, yolo
from pipeline_tasks.data.writers.content import Content, Lost, content_of
from pipeline_tasks.data.writers.files import write_text
from pipeline_tasks.errors import DataError, UsageError

WriteContent = Callable[[Content, Path], list[Lost]]
_WRITERS: dict[str, WriteContent] = {
    "coco": coco.write,
    "yolo": yolo.write,
    "voc": voc.write,
    "objects365": objects365.write,
}
WRITABLE = tuple(_WRITERS)


@dataclass(frozen=True)
class Written:
    """A folder that was written, and what of the set is not in it."""

    folder: Path
    format: str
    images: int
    boxes: int
    lost: tuple[Lost, ...]


def write_folder(
    raw: RawDataset,
    source: Path | Mapping[int, Path],
    target: Path,
    format: str = "coco",
    notes: Mapping[str, str] | None = None,
    listed_in: Path | None = None,
) -> Written:
    """Write the set `raw` with copies of its pictures into the new folder `target`.

    `source`: the folder that `images.path` is relative to, or several by the number in the column `root` of
    `raw.images`. The column `split` decides the splits, a column `name` the pictures' names where there is one. `notes`
    are more text files by name. `listed_in`: the folder of a set whose pictures stay in a bucket, and whose list of it
    the new set takes over in place of copies; the format must be COCO's. The folder is written beside `target` and
    renamed when it is whole.

    Raises:
        UsageError: the format cannot be written, or `target` exists or lies below a file.
        DataError: a picture is missing, or the format cannot hold such a set at all.
    """
    if format not in _WRITERS:
        raise UsageError(f"--format {format} cannot be written; formats are {', '.join(WRITABLE)}")
    require_new(target)
    assert listed_in is None or format == "coco"
    content, lost = content_of(raw, source, copied=listed_in is None)
    if not content.pictures:
        raise DataError(f"there is no image to write to {target}")
    if not content.labelled and format != "coco":
        raise DataError(
            f"the set has no classes and no boxes, which {format} cannot tell from missing labels; use coco"
        )
    with written_aside(target) as beside:
        lost += _WRITERS[format](content, beside)
        for name, text in (notes or {}).items():
            write_text(beside / name, text)
        if listed_in is not None:
            for name in (ROOT_FILE, LIST_FILE):
                shutil.copyfile(listed_in / name, beside / name)
    return Written(target, format, len(content.pictures), sum(1 for _ in content.boxes()), tuple(lost))
