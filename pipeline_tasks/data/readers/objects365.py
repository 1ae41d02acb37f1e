"""Objects365 as it ships: COCO layout, pictures in patch folders, class names with blanks and misspellings.

The two releases number the classes differently (v1 in lower case, in another order), so classes are told by name: a
name is turned into the official one of v2 whatever its case, its outer blanks or its spelling; the ids stay the file's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import pyarrow as pa
import pyarrow.compute as pc

from pipeline_tasks.data.coco import assemble, category_differences, licence_counts
from pipeline_tasks.data.coco_files import AnnotationFile
from pipeline_tasks.data.raw import Problem, RawDataset
from pipeline_tasks.data.readers.coco import all_categories, read_files
from pipeline_tasks.data.readers.listing import Listing
from pipeline_tasks.data.readers.objects365_classes import CORRECTED_SPELLINGS, OBJECTS365_CLASSES
from pipeline_tasks.errors import DataError

IMAGE_LICENCE = "Objects365: academic use, not to be distributed"
ANNOTATION_LICENCE = "CC BY 4.0"
_OFFICIAL = {name.lower(): name for name in OBJECTS365_CLASSES}
_OFFICIAL |= {corrected.lower(): name for name, corrected in CORRECTED_SPELLINGS.items()}
_ID = {name: identifier for identifier, name in enumerate(OBJECTS365_CLASSES, 1)}


def read(listing: Listing, root_name: str, required_splits: Sequence[str], name: str) -> RawDataset:
    """See `Reader.read`. Pictures are found by patch folder and name, wherever the patches were unpacked."""
    files = [_with_official_names(listing, file) for file in read_files(listing, required_splits)]
    files = [_found_in_patches(file, listing.pictures) for file in files]
    notes = (*category_differences(files), *(note for file in files for note in _class_notes(file)))
    raw = assemble(
        files, listing.pictures, all_categories(listing, files), root_name, required_splits, name,
        "split by annotation file", notes,
    )  # fmt: skip
    return _with_terms(raw)


def _with_official_names(listing: Listing, file: AnnotationFile) -> AnnotationFile:
    categories = {key: _OFFICIAL.get(given.strip().lower(), given.strip()) for key, given in file.categories.items()}
    if len(set(categories.values())) < len(categories):
        names = list(categories.values())
        twice = next(class_name for class_name in names if names.count(class_name) > 1)
        raise DataError(f"{listing.folder / file.name}: the class {twice!r} is listed twice, in other spellings")
    return replace(file, categories=categories)


def _class_notes(file: AnnotationFile) -> Iterator[Problem]:
    """Names that are not among the 365, and ids of another release."""
    unknown = [class_name for class_name in file.categories.values() if class_name not in _ID]
    if unknown:
        detail = f"{len(unknown)} classes are not among the 365 of Objects365 v2, the first is {unknown[0]!r}"
        yield Problem("objects365_class", file.name, "/categories", detail)
    for identifier, class_name in file.categories.items():
        if class_name in _ID and _ID[class_name] != int(identifier):
            detail = f"{class_name!r} has the id {identifier}, {_ID[class_name]} in v2; classes are matched by name"
            yield Problem("objects365_class", file.name, "/categories", detail)
            return


def _found_in_patches(file: AnnotationFile, pictures: Sequence[str]) -> AnnotationFile:
    """File names as paths of pictures, by their last two parts (patch8/NAME), else by a name that occurs once."""
    known = pa.array(pictures, pa.string())
    names = file.images["path"].combine_chunks()
    found = pc.if_else(pc.is_in(names, value_set=known), names, None)
    for parts in (2, 1):
        tails = _tails(known, parts)
        counts = pc.value_counts(tails)
        single = counts.field("values").filter(pc.equal(counts.field("counts"), 1))
        wanted = _tails(names, parts)
        rows = pc.index_in(wanted, value_set=tails, skip_nulls=True)
        found = pc.coalesce(found, pc.if_else(pc.is_in(wanted, value_set=single), known.take(rows), None))
    place = file.images.schema.get_field_index("path")
    return replace(file, images=file.images.set_column(place, "path", pc.coalesce(found, names)))


def _tails(paths: pa.Array, parts: int) -> pa.Array:
    """The last parts of each path."""
    return pc.replace_substring_regex(paths, rf"^.*?([^/]*(?:/[^/]*){{{parts - 1}}})$", r"\1")


def _with_terms(raw: RawDataset) -> RawDataset:
    """What the website says about licences, where the records say nothing."""
    official = pc.match_substring(raw.images["path"], "objects365_v")
    licence = pc.coalesce(raw.images["licence"], pc.if_else(official, IMAGE_LICENCE, pa.scalar(None, pa.string())))
    images = raw.images.set_column(raw.images.schema.get_field_index("licence"), "licence", licence)
    licences = {**raw.metadata.licences, "images": licence_counts(images["licence"])}
    if pc.any(official).as_py() and licences["annotations"] == "unknown":
        licences["annotations"] = ANNOTATION_LICENCE
    return replace(raw, images=images, metadata=replace(raw.metadata, licences=licences))
