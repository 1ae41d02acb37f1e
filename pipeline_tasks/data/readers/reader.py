"""Opening a folder in any known format."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline_tasks.data.coco import read_pictures, read_unlabeled_folder
from pipeline_tasks.data.raw import UNSPLIT, RawDataset
from pipeline_tasks.data.readers import coco, objects365, voc, yolo
from pipeline_tasks.data.readers.listing import Listing, list_folder
from pipeline_tasks.data.readers.recognition import FORMATS, Recognised, image_list_files, recognise_listing
from pipeline_tasks.errors import DataError, UsageError

ReadLabels = Callable[[Listing, str, Sequence[str], str], RawDataset]
_LABELLED: dict[str, ReadLabels] = {
    "coco": coco.read,
    "objects365": objects365.read,
    "voc": voc.read,
    "yolo": yolo.read,
}


@dataclass(frozen=True)
class Reader:
    """A recognised folder."""

    folder: Path
    recognised: Recognised
    listing: Listing

    @property
    def labelled(self) -> bool:
        """Whether the format has boxes."""
        return self.recognised.format in _LABELLED

    def read(self, root_name: str = "data", required_splits: Sequence[str] = (), name: str | None = None) -> RawDataset:
        """All records as rows, malformed ones with a fault.

        `root_name` is the symbolic root of the tables and, unless `name` is given, the set's name. Without
        `required_splits` oddities of the set become notes where it can be read at all; otherwise raises `DataError`
        for a split that is missing or empty, and for class lists that differ.
        """
        if not self.labelled:
            if required_splits:
                raise DataError(f"{self.folder} has no annotations: {self.recognised.reason}; give a labelled set")
            return self.read_unlabeled(root_name, name)
        raw = _LABELLED[self.recognised.format](self.listing, root_name, required_splits, name or root_name)
        for split in required_splits:
            _require(self.folder, raw, split)
        return raw

    def read_unlabeled(self, root_name: str = "data", name: str | None = None) -> RawDataset:
        """The pictures alone, whatever annotations lie beside them; raises `DataError` when there are none."""
        if "images.json" in self.listing.known and (self.folder / "images").is_dir():
            return read_unlabeled_folder(self.folder, root_name, name)
        below = [picture for picture in self.listing.pictures if picture.startswith("images/")]
        described = next(iter(image_list_files(self.listing)), None)
        return read_pictures(self.folder, below or self.listing.pictures, described, root_name, name or root_name)


def open_reader(folder: Path, format: str | None = None, allow_links: bool = False) -> Reader:
    """Recognise a folder, or take it for the `format` that is named.

    `allow_links`: follow links that lead out of the folder. Raises `DataError` when it is no dataset, `UsageError`
    for an unknown format.
    """
    if format is not None and format not in FORMATS:
        raise UsageError(f"--format {format} is unknown; formats are {', '.join(FORMATS)}")
    listing = list_folder(folder, allow_links)
    recognised = recognise_listing(listing) if format is None else Recognised(format, f"named {format} by --format")
    return Reader(folder, recognised, listing)


def read_folder(
    folder: Path,
    root_name: str = "data",
    required_splits: Sequence[str] = (),
    name: str | None = None,
    format: str | None = None,
    allow_links: bool = False,
) -> RawDataset:
    """`open_reader` and `Reader.read` in one."""
    return open_reader(folder, format, allow_links).read(root_name, required_splits, name)


def _require(folder: Path, raw: RawDataset, split: str) -> None:
    """The same demands for every format: pictures and boxes in each required split."""
    splits = raw.images["split"].to_pylist()
    if set(splits) == {UNSPLIT}:
        raise DataError(
            f"{folder} does not say which images are for training, validation and test; divide it with "
            f"`nasline data split {folder} --to DIR`"
        )
    if split not in splits:
        raise DataError(
            f"{folder} has no split {split}, only {', '.join(sorted(set(splits)))}; add it, or divide the images anew "
            f"with `nasline data split {folder} --to DIR`"
        )
    if split not in raw.boxes["split"].to_pylist():
        raise DataError(f"{folder}: the split {split} has {splits.count(split)} images but no boxes")
