"""YOLO: a text file for each picture with a line for each box, in labels/ or beside it, and a YAML file with the names.

A line is `class x_centre y_centre width height`, in fractions of the upright picture; a line with more numbers is a
polygon, which is read as the box around it. A picture without a label file is one without boxes, as trainers take it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import PurePosixPath

from pipeline_tasks.data.picture_size import upright_size
from pipeline_tasks.data.raw import UNSPLIT, RawDataset
from pipeline_tasks.data.readers.listing import Listing
from pipeline_tasks.data.readers.recognition import label_files, yolo_description
from pipeline_tasks.data.readers.rows import NO_BOX, Numbers, Rows, key_of, number
from pipeline_tasks.data.readers.yolo_yaml import YoloDescription, read_description
from pipeline_tasks.data.split_names import split_of_path

LARGEST_CLASS = 99_999


def read(listing: Listing, root_name: str, required_splits: Sequence[str], name: str) -> RawDataset:
    """See `Reader.read`."""
    description_file = yolo_description(listing)
    described = read_description(listing.folder, description_file) if description_file else YoloDescription(())
    rows, labels = Rows(), set(label_files(listing))
    splits = _Splits(listing, described)
    largest = -1
    for picture in listing.pictures:
        largest = max(largest, _add_picture(rows, listing, picture, splits.of(picture), labels))
    for file in sorted(labels):  # what is left has no picture
        _add_orphan(rows, listing, file, splits.of(file))
    names = described.class_names or tuple(f"class {index}" for index in range(largest + 1))
    _note_classes(rows, listing, description_file, described, largest)
    files = [*label_files(listing), *([description_file] if description_file else [])]
    classes = {str(index): class_name for index, class_name in enumerate(names)}
    return rows.finish(
        listing, name, root_name, classes, range(len(classes)), files, required_splits, f"split by {splits.rule}"
    )


def _note_classes(rows: Rows, listing: Listing, file: str | None, described: YoloDescription, largest: int) -> None:
    if file is None:
        detail = f"no YAML file names the classes; they are called class 0 to class {largest}"
        rows.note("class_names_given", label_files(listing)[0], detail)
    elif described.class_count not in (None, len(described.class_names)):
        rows.note(
            "class_count", file, f"nc is {described.class_count}, but there are {len(described.class_names)} names"
        )


class _Splits:
    """The split of a picture: by the places that data.yaml names, else by the folders it lies in."""

    def __init__(self, listing: Listing, described: YoloDescription) -> None:
        self._folders: dict[str, str] = {}
        listed: dict[str, str] = {}
        for split, places in described.split_places.items():
            for place in places:
                if place in listing.known and place.endswith(".txt"):
                    listed |= dict.fromkeys(_listed_pictures(listing, place), split)  # test wins over val over train
                else:
                    self._folders.setdefault(place.rstrip("/"), split)  # some name one folder for train and val
        self._listed = _with_ends(listed)
        self.rule = "data.yaml" if described.split_places else "folders"

    def of(self, path: str) -> str:
        listed = next((split for end in _ends(key_of(path)) if (split := self._listed.get(end))), None)
        if listed is not None:
            return listed
        own = (str(parent) for parent in PurePosixPath(path).parents)
        named = next((self._folders[folder] for folder in own if folder in self._folders), None)
        return named or split_of_path(path) or UNSPLIT


def _listed_pictures(listing: Listing, place: str) -> list[str]:
    """The pictures that a text file lists, without suffix."""
    lines = (listing.folder / place).read_text("utf-8-sig", "replace").replace("\\", "/").splitlines()
    return [key_of(line.strip()) for line in lines if PurePosixPath(line.strip()).name]


def _with_ends(listed: dict[str, str]) -> dict[str, str]:
    """The split by path and by each end of it, since lists have paths of the machine that wrote them; "" where pictures
    of several splits end so.
    """
    found: dict[str, str] = {}
    for key, split in listed.items():
        for end in _ends(key):
            found[end] = split if found.get(end, split) == split else ""
    return found | listed


def _ends(key: str) -> Iterator[str]:
    """a/b/c, b/c and c."""
    parts = PurePosixPath(key).parts
    return ("/".join(parts[start:]) for start in range(len(parts)))


def _label_places(picture: str) -> Iterator[str]:
    """Where the labels of a picture may lie: in labels/ in place of images/, or beside it."""
    key = PurePosixPath(key_of(picture))
    for position in reversed(range(len(key.parts) - 1)):
        if key.parts[position] == "images":
            yield "/".join((*key.parts[:position], "labels", *key.parts[position + 1 :])) + ".txt"
    yield f"{key}.txt"
    yield str(key.parent / "labels" / key.name) + ".txt"


def _add_picture(rows: Rows, listing: Listing, picture: str, split: str, labels: set[str]) -> int:
    """Add a picture and its boxes; returns the largest class number. `labels` keeps the files no picture has taken."""
    places = list(_label_places(picture))
    file = next((place for place in places if place in listing.known), None)
    record = f"{file}#line=1" if file else picture
    if file and file not in labels:
        rows.add_image(key_of(file), picture, (None, None), split, record)  # its id collides with the picture before
        return -1
    rows.add_image(key_of(file or picture), picture, (None, None), split, record)
    if file is None:
        rows.note("label_file_present", picture, f"there is no label file {places[0]}; it counts as without boxes")
        return -1
    labels.discard(file)
    size = upright_size(listing.folder, picture)
    return _add_boxes(rows, listing, file, size)


def _add_orphan(rows: Rows, listing: Listing, file: str, split: str) -> None:
    """Labels without a picture; other text files (a list of classes, a README) are none."""
    lines = (listing.folder / file).read_bytes().decode("utf-8", "replace").splitlines()
    if "labels" in PurePosixPath(file).parts[:-1] and any(_parse(line)[1] is None for line in lines if line.strip()):
        rows.add_image(key_of(file), None, (None, None), split, f"{file}#line=1", "has no picture of its name")


def _add_boxes(rows: Rows, listing: Listing, file: str, size: tuple[int, int] | None) -> int:
    content = (listing.folder / file).read_bytes()
    largest, found = -1, False
    for position, line in enumerate(content.decode("utf-8-sig", "replace").splitlines(), 1):
        if not line.strip():
            continue
        found = True
        category, fault, fractions = _parse(line)
        box = _in_pixels(fractions, size) if fault is None else NO_BOX
        rows.add_box(category, box, f"{file}#line={position}", fault)
        largest = max(largest, -1 if category is None else int(category))
    if not found:
        rows.note("label_file_filled", file, "the file is empty: its picture counts as one without boxes")
    return largest


def _parse(line: str) -> tuple[str | None, str | None, Numbers]:
    """Class number, fault, and x centre, y centre, width, height in fractions of the picture."""
    fields = line.split()
    numbers = [number(text) for text in fields[1:]]
    if not (fields[0].isascii() and fields[0].isdecimal()) or int(fields[0][:9]) > LARGEST_CLASS:
        return None, f"line begins with {fields[0]!r:.40}, not with a class number", NO_BOX
    category = str(int(fields[0][:9]))
    if None in numbers:
        return category, f"line holds {fields[1:][numbers.index(None)]!r:.40}, not a number", NO_BOX
    if len(numbers) == 4:
        return category, None, (numbers[0], numbers[1], numbers[2], numbers[3])
    if len(numbers) >= 6 and len(numbers) % 2 == 0:
        return category, None, _around([value for value in numbers if value is not None])
    return category, f"line has {len(fields)} numbers; a box has 5, a polygon an odd number from 7 on", NO_BOX


def _around(numbers: list[float]) -> Numbers:
    xs, ys = numbers[0::2], numbers[1::2]
    width, height = max(xs) - min(xs), max(ys) - min(ys)
    return min(xs) + width / 2, min(ys) + height / 2, width, height


def _in_pixels(fractions: Numbers, size: tuple[int, int] | None) -> Numbers:
    if size is None:
        return NO_BOX
    x, y, w, h = (0.0 if value is None else value for value in fractions)
    width, height = size
    return (x - w / 2) * width, (y - h / 2) * height, w * width, h * height
