"""COCO annotation files wherever they lie: annotations/instances_*.json, Roboflow's train/_annotations.coco.json, …"""

from __future__ import annotations

from collections.abc import Sequence

from pipeline_tasks.data.coco import assemble, category_differences, check_not_empty, read_coco_folder
from pipeline_tasks.data.coco_files import AnnotationFile, read_file
from pipeline_tasks.data.raw import SPLITS, UNSPLIT, RawDataset
from pipeline_tasks.data.readers.listing import Listing
from pipeline_tasks.data.readers.recognition import coco_files
from pipeline_tasks.data.split_names import split_of_file
from pipeline_tasks.errors import DataError

REQUIRED = ("images", "annotations", "categories")


def read(listing: Listing, root_name: str, required_splits: Sequence[str], name: str) -> RawDataset:
    """See `Reader.read`. The layout of docs/data_formats.md is read as strictly as it always was."""
    if required_splits and _is_standard(listing):
        return read_coco_folder(listing.folder, root_name, required_splits, name)
    files = read_files(listing, required_splits)
    pictures = pictures_of(listing)
    return assemble(
        files, pictures, all_categories(listing, files), root_name, required_splits, name,
        "split by annotation file", tuple(category_differences(files)),
    )  # fmt: skip


def read_files(listing: Listing, required_splits: Sequence[str]) -> list[AnnotationFile]:
    """Every annotation file; with `required_splits` only these and the other known splits, each once and filled."""
    splits: dict[str, str] = {}
    for relative in coco_files(listing):
        split = split_of_file(relative) or UNSPLIT
        if split in splits:
            raise DataError(
                f"{listing.folder}: {splits[split]} and {relative} are both of the split {split}; keep one of them, or "
                "let their names or folders tell train, val and test"
            )
        splits[split] = relative
    if not splits:
        raise DataError(f"{listing.folder} has no JSON file with images and annotations in COCO's layout")
    order = sorted(splits, key=lambda split: (*SPLITS, UNSPLIT).index(split))
    files = [read_file(listing.folder, splits[split], split, REQUIRED) for split in order]
    for split, file in zip(order, files, strict=True):
        if split in required_splits:
            check_not_empty(listing.folder, file, split)
    if required_splits:
        for difference in category_differences(files):
            where = listing.folder / difference.file
            raise DataError(f"{where}: {difference.detail}; all splits need the same categories")
    return files


def all_categories(listing: Listing, files: Sequence[AnnotationFile]) -> dict[str, int]:
    """Names and ids of the classes of all files: they are matched by name; an id that is taken gets the next free."""
    categories: dict[str, int] = {}
    for file in files:
        for identifier, class_name in file.categories.items():
            if class_name not in categories:
                taken, wanted = categories.values(), int(identifier)
                categories[class_name] = wanted if wanted not in taken else max(taken) + 1
    if not categories:
        raise DataError(f"{listing.folder / files[0].name}: 'categories' is empty; at least one class is needed")
    return categories


def pictures_of(listing: Listing) -> Sequence[str]:
    """Where there is a folder images/, pictures elsewhere (previews, masks) do not belong to the set."""
    return [picture for picture in listing.pictures if picture.startswith("images/")] or listing.pictures


def _is_standard(listing: Listing) -> bool:
    """Whether the folder is laid out as docs/data_formats.md says."""
    in_images = any(picture.startswith("images/") for picture in listing.pictures)
    return in_images and any(f"annotations/instances_{split}.json" in listing.known for split in SPLITS)
