"""Pascal VOC: an XML file for each picture, in Annotations/ or beside it, splits in ImageSets/Main or in folders.

x and y are xmin and ymin as written, width and height the differences, without the one pixel that VOC 2007 counts
from: most tools that write this format count from 0.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import PurePosixPath

from pipeline_tasks.data.raw import SPLITS, UNSPLIT, RawDataset
from pipeline_tasks.data.readers.listing import Listing
from pipeline_tasks.data.readers.rows import NO_BOX, Numbers, Rows, key_of, number
from pipeline_tasks.data.readers.voc_xml import VocAnnotation, VocObject, read_voc_xml
from pipeline_tasks.data.split_names import split_of_path
from pipeline_tasks.errors import DataError

PICTURE_FOLDERS = ("JPEGImages", "images", "")
LONGEST_CLASS_NAME = 200
_LARGEST_SIDE = 1_000_000
_CLASS_FLAG = re.compile(r"\s+-?[01]$")
"""What the lists of single classes add to a name; other blanks belong to it."""


def read(listing: Listing, root_name: str, required_splits: Sequence[str], name: str) -> RawDataset:
    """See `Reader.read`."""
    files = listing.having(".xml")
    if not files:
        raise DataError(f"{listing.folder} has no .xml files; Pascal VOC has one for each picture")
    pictures, splits = _Pictures(listing), _split_lists(listing)
    rows, class_names = Rows(), set()
    for file in files:
        try:
            annotation = read_voc_xml(listing.folder / file)
        except DataError as error:
            _add_unread(rows, file, str(error), pictures, splits)
            continue
        _add_image(rows, file, annotation, pictures, splits)
        class_names |= {_add_object(rows, file, found) for found in annotation.objects}
    ordered = sorted(class_name for class_name in class_names if class_name)
    rule = "ImageSets/Main" if splits else "folders"
    classes = {class_name: class_name for class_name in ordered}
    ids = range(1, len(classes) + 1)
    return rows.finish(listing, name, root_name, classes, ids, files, required_splits, f"split by {rule}")


class _Pictures:
    """Finds the picture of an XML file."""

    def __init__(self, listing: Listing) -> None:
        self._known = listing.known
        self._by_key: dict[str, str] = {}
        for picture in listing.pictures:
            self._by_key.setdefault(key_of(picture), picture)

    def named(self, file: str, name: str) -> str | None:
        """The picture that a file names, beside it or in one of the usual folders."""
        return next((path for path in self._places(file, name) if path in self._known), None)

    def alike(self, file: str, name: str) -> str | None:
        """A picture that has the name but for its suffix."""
        keys = (key_of(path) for path in self._places(file, f"{name}.x"))
        return next((self._by_key[key] for key in keys if key in self._by_key), None)

    @staticmethod
    def _places(file: str, name: str) -> Iterator[str]:
        parent = PurePosixPath(file).parent
        above = parent.parent if parent.name.lower() in ("annotations", "labels", "xml", "xmls") else parent
        for folder in (*(above / folder for folder in PICTURE_FOLDERS), parent, *map(PurePosixPath, PICTURE_FOLDERS)):
            yield str(folder / name)


def _add_image(rows: Rows, file: str, annotation: VocAnnotation, pictures: _Pictures, splits: dict[str, str]) -> None:
    stem = PurePosixPath(file).stem
    given = annotation.values.get("filename") or ""
    name = PurePosixPath(given.replace("\\", "/")).name
    path = pictures.named(file, name) if name else None
    if path is None:
        path = (pictures.alike(file, name) if name else None) or pictures.alike(file, stem)
        if path is not None:
            rows.note("file_name_matches", file, f"<filename>{given}</filename> does not exist, {path} is taken")
    fault = None if path or name else "has no <filename> and no picture of its own name"
    if path is None and name:
        path = str(PurePosixPath("JPEGImages", name))
    sides = [_side(annotation.values.get(f"size/{side}")) for side in ("width", "height")]
    split = splits.get(stem) or split_of_path(file) or UNSPLIT
    rows.add_image((path and key_of(path)) or key_of(file), path, (sides[0], sides[1]), split, f"{file}#line=1", fault)
    if not annotation.objects:
        rows.note("label_file_filled", file, "the file has no object: its picture counts as one without boxes")


def _add_unread(rows: Rows, file: str, fault: str, pictures: _Pictures, splits: dict[str, str]) -> None:
    """A file that cannot be read takes its picture with it."""
    stem = PurePosixPath(file).stem
    path = pictures.alike(file, stem)
    split = splits.get(stem) or split_of_path(file) or UNSPLIT
    rows.add_image(key_of(path or file), path, (None, None), split, f"{file}#line=1", fault)


def _side(text: str | None) -> int | None:
    """A recorded side; what is no size (missing, 0, as some tools write) counts as not recorded."""
    value = number(text or "")
    return int(value) if value is not None and 1 <= value <= _LARGEST_SIDE else None


def _add_object(rows: Rows, file: str, found: VocObject) -> str | None:
    """Add a box; returns its class name."""
    record = f"{file}#line={found.line}"
    class_name = found.values.get("name")
    if not class_name:
        rows.add_box(None, NO_BOX, record, "has no <name>")
        return None
    if len(class_name) > LONGEST_CLASS_NAME:
        rows.add_box(None, NO_BOX, record, f"<name> has {len(class_name)} characters")
        return None
    corners, fault = _corners(found)
    rows.add_box(class_name, corners, record, fault)
    return class_name


def _corners(found: VocObject) -> tuple[Numbers, str | None]:
    """x, y, width, height, or what is wrong with the four numbers."""
    numbers = []
    for side in ("xmin", "ymin", "xmax", "ymax"):
        text = found.values.get(f"bndbox/{side}")
        if text is None:
            return NO_BOX, f"has no <{side}>"
        value = number(text)
        if value is None:
            return NO_BOX, f"<{side}> is {text!r:.40}, not a number"
        numbers.append(value)
    left, top, right, bottom = numbers
    return (left, top, right - left, bottom - top), None


def _split_lists(listing: Listing) -> dict[str, str]:
    """Picture name to split, from ImageSets/Main/{train,val,test}.txt; test wins over val, val over train."""
    splits: dict[str, str] = {}
    flagged: dict[str, str] = {}
    for split in SPLITS:
        for file in listing.having(f"imagesets/main/{split}.txt"):
            for line in (listing.folder / file).read_text("utf-8-sig", "replace").splitlines():
                if name := PurePosixPath(line.strip()).name:
                    splits[name] = split
                    flagged[_CLASS_FLAG.sub("", name)] = split
    return flagged | splits
