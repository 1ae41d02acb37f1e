"""Which format a folder is in: each format's evidence is looked for, in a fixed order."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from pipeline_tasks.data.readers.listing import Listing, list_folder
from pipeline_tasks.errors import DataError

FORMATS = ("objects365", "coco", "voc", "yolo", "coco-images", "images")
"""In the order in which they are tried: the most telling first."""
GLANCE_BYTES = 1 << 18
"""How much of an annotation file is looked at from its beginning and from its end: Objects365 has gigabytes."""
GLANCED_FILES = 20
GLANCED_JSON_FILES = 200
_OBJECTS365_FILE = re.compile(r"(zhiyuan_objv2|objects365).*\.json$", re.IGNORECASE)
_OBJECTS365_PICTURE = re.compile(rb'"file_name"\s*:\s*"[^"]*objects365_v\d')
_LABEL_LINE = re.compile(r"\s*\d+(\s+[-+.\deEnaif]+){4,}\s*$")
_MEMBER = {key: re.compile(rb'"%s"\s*:\s*\[' % key.encode()) for key in ("images", "annotations", "categories")}
_FIELDS = {"images": (b'"file_name"', b'"width"'), "annotations": (b'"bbox"', b'"image_id"')}
_NAMED_AS_COCO = re.compile(r"instances_.*\.json$|_annotations\.coco\.json$")
_NAMES = re.compile(rb"(?m)^(\xef\xbb\xbf)?names\s*:")
_OTHER_TASKS = re.compile(r"(captions|person_keypoints|panoptic|stuff|image_info|lvis)_")


@dataclass(frozen=True)
class Recognised:
    """The format of a folder, why it was taken for it, and what else it could be read as."""

    format: str
    reason: str  # a sentence
    others: tuple[str, ...] = ()


def recognise(folder: Path, allow_links: bool = False) -> Recognised:
    """Tell the format of a folder by looking at it; `DataError` when it is none of `FORMATS`."""
    return recognise_listing(list_folder(folder, allow_links))


def recognise_listing(listing: Listing) -> Recognised:
    """`recognise` for a folder that was listed already."""
    reasons = {name: reason for name in FORMATS if (reason := _EVIDENCE[name](listing))}
    if not reasons:
        raise DataError(
            f"{listing.folder} holds no dataset of a known format; looked for COCO or Objects365 JSON, Pascal VOC XML, "
            "YOLO labels and pictures; give the folder above or below, or name the format with --format"
        )
    chosen, *others = reasons
    plain = {"coco-images", "images"}
    rivals = tuple(name for name in others if not (name in plain or {chosen, name} == {"objects365", "coco"}))
    also = f"; it could be read as {' or '.join(rivals)} too (--format)" if rivals else ""
    return Recognised(chosen, f"{reasons[chosen]}{_roboflow(listing)}{also}", rivals)


def coco_files(listing: Listing) -> list[str]:
    """The detection annotation files: JSON with images, annotations and categories.

    Files that are named so belong to them even when they are damaged. Where some are named instances_*, files of
    COCO's other tasks are left aside.
    """
    names = {file: PurePosixPath(file).name for file in _json_files(listing)}
    found = [file for file in names if _NAMED_AS_COCO.match(names[file]) or _has_boxes(listing, file)]
    if any(names[file].startswith("instances_") for file in found):
        found = [file for file in found if not _OTHER_TASKS.match(names[file])]
    return found


def _has_boxes(listing: Listing, file: str) -> bool:
    return {"images", "annotations"} <= _members(listing, file)


def image_list_files(listing: Listing) -> list[str]:
    """JSON files in COCO layout that list images without annotations."""
    return [f for f in _json_files(listing) if _members(listing, f) & {"images", "annotations"} == {"images"}]


def _json_files(listing: Listing) -> list[str]:
    """Other formats have a JSON file for each picture; of so many only the topmost are looked at."""
    return sorted(sorted(listing.having(".json"), key=lambda file: (file.count("/"), file))[:GLANCED_JSON_FILES])


def label_files(listing: Listing) -> list[str]:
    """Text files that can be YOLO labels: below a folder labels/, or beside a picture of the same name."""
    stems = {str(PurePosixPath(picture).with_suffix("")) for picture in listing.pictures}
    return [
        file
        for file in listing.having(".txt")
        if "labels" in PurePosixPath(file).parts[:-1] or str(PurePosixPath(file).with_suffix("")) in stems
    ]


def yolo_description(listing: Listing) -> str | None:
    """The YAML file of a YOLO set: the topmost one that names classes."""
    files = sorted(listing.having(".yaml", ".yml"), key=lambda file: (file.count("/"), file))
    return next((file for file in files[:GLANCED_FILES] if _NAMES.search(_glance(listing, file))), None)


def _members(listing: Listing, file: str) -> set[str]:
    """What a file holds: by the keys that are seen, and by records, where the keys are too far from the ends."""
    text = _glance(listing, file)
    found = {key for key, pattern in _MEMBER.items() if pattern.search(text)}
    return found | {key for key, fields in _FIELDS.items() if all(field in text for field in fields)}


def _glance(listing: Listing, file: str) -> bytes:
    """The beginning and the end of a file."""
    try:
        with (listing.folder / file).open("rb") as content:
            beginning = content.read(GLANCE_BYTES)
            size = content.seek(0, 2)
            content.seek(max(len(beginning), size - GLANCE_BYTES))
            return beginning + b"\n" + content.read(GLANCE_BYTES)
    except OSError as error:
        raise DataError(f"{listing.folder / file} cannot be read ({error.strerror})") from error


def _objects365(listing: Listing) -> str | None:
    for file in coco_files(listing):
        if _OBJECTS365_FILE.search(PurePosixPath(file).name):
            return f"{file} has the name of an Objects365 annotation file"
        if _OBJECTS365_PICTURE.search(_glance(listing, file)):
            return f"{file} lists pictures named objects365_v…"
    return None


def _coco(listing: Listing) -> str | None:
    files = coco_files(listing)
    if not files:
        return None
    if any(_has_boxes(listing, file) for file in files):
        return f"{_some(files)} {'holds' if len(files) == 1 else 'hold'} images and annotations in COCO's layout"
    return f"{_some(files)} {'has' if len(files) == 1 else 'have'} the name of COCO annotation files"


def _voc(listing: Listing) -> str | None:
    files = listing.having(".xml")
    telling = [file for file in files[:GLANCED_FILES] if b"<annotation" in _glance(listing, file)]
    return f"{_some(files)} {'is' if len(files) == 1 else 'are'} Pascal VOC annotations" if telling else None


def _yolo(listing: Listing) -> str | None:
    description, labels = yolo_description(listing), label_files(listing)
    lines = [_glance(listing, file).decode("utf-8", "replace").split("\n", 1)[0] for file in labels[:GLANCED_FILES]]
    if not any(_LABEL_LINE.match(line) for line in lines) and not (description and labels):
        return None
    named = f"{description} names the classes" if description else "no YAML file names the classes"
    return f"{_some(labels)} {'has' if len(labels) == 1 else 'have'} the form of YOLO labels, and {named}"


def _image_list(listing: Listing) -> str | None:
    files = image_list_files(listing)
    return f"{_some(files)} lists images without annotations" if files and listing.pictures else None


def _pictures(listing: Listing) -> str | None:
    count = len(listing.pictures)
    return f"there are {count} pictures and no annotations" if count else None


def _roboflow(listing: Listing) -> str:
    names = {PurePosixPath(file).name for file in listing.files if file.count("/") <= 1}
    if names & {"README.roboflow.txt", "_annotations.coco.json"}:
        return "; it is a Roboflow export"
    return ""


def _some(files: list[str]) -> str:
    return files[0] if len(files) == 1 else f"{files[0]} and {len(files) - 1} more"


_EVIDENCE: dict[str, Callable[[Listing], str | None]] = {
    "objects365": _objects365,
    "coco": _coco,
    "voc": _voc,
    "yolo": _yolo,
    "coco-images": _image_list,
    "images": _pictures,
}
