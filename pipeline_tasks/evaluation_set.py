"""A labelled set to measure on, from a folder in any format as it stands or from a published dataset."""

from __future__ import annotations

import logging
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline_tasks.errors import DataError, ParameterError

if TYPE_CHECKING:
    from model.data.image_set import ImageSet, OpenImage
    from model.data.tables import Dataset
    from pipeline_tasks.data.raw import RawDataset

log = logging.getLogger(__name__)

ROOT = "images_of_the_set"
METADATA_FILE = "dataset.json"


@dataclass(frozen=True)
class EvaluationSet:
    """Images in the order of their original ids, which decides between equal scores as pycocotools does."""

    images: ImageSet
    open_image: OpenImage


def read_evaluation_set(folder: Path, split: str, pictures: Path | None = None) -> EvaluationSet:
    """One split of a folder in any format that is read, or of a published dataset whose pictures lie below `pictures`.

    Of a folder nothing is corrected or clipped: the numbers are those of its annotation file. Records that cannot be
    understood are left out with a warning.

    Raises:
        DataError: the folder cannot be understood, or the split is empty.
        ParameterError: a published dataset needs `pictures`, or it has no such split.
    """
    from pipeline_tasks.images import make_open_image

    published = (folder / METADATA_FILE).is_file()
    dataset = _published(folder, pictures) if published else _as_it_stands(folder, split)
    if split not in dataset.split_names:
        raise ParameterError(f"{folder} has no split {split!r}; it has {', '.join(dataset.split_names)}")
    open_image = make_open_image({dataset.metadata.roots[0]: pictures or folder})
    return EvaluationSet(_in_order_of_ids(dataset, split), open_image)


def _published(folder: Path, pictures: Path | None) -> Dataset:
    from model.data.tables import read_dataset

    dataset = read_dataset(folder)
    roots = dataset.metadata.roots
    if pictures is None or len(roots) != 1:
        where = "give --images with the folder that its pictures' paths (images/...) begin in"
        many = f"; it draws on {len(roots)} folders, evaluate them apart" if len(roots) != 1 else ""
        raise ParameterError(f"{folder} is a published dataset, which does not hold its pictures; {where}{many}")
    return dataset


def _as_it_stands(folder: Path, split: str) -> Dataset:
    from model.data.tables import read_dataset, write_dataset
    from pipeline_tasks.data.raw import SPLITS
    from pipeline_tasks.data.readers import open_reader

    if split not in SPLITS:
        raise ParameterError(f"--split must be one of {', '.join(SPLITS)}, got {split!r}")
    reader = open_reader(folder, allow_links=True)
    log.info("%s is read as %s: %s", folder, reader.recognised.format, reader.recognised.reason)
    raw = reader.read(ROOT, (split,))
    images, boxes = _usable(raw, split, folder)
    if not len(images):
        raise DataError(f"{folder}: no image of the split {split} can be used; `nasline validate_data` says why")
    with tempfile.TemporaryDirectory() as temporary:
        write_dataset(Path(temporary), images, boxes, raw.metadata)
        return read_dataset(Path(temporary))


def _usable(raw: RawDataset, split: str, folder: Path) -> tuple[pa.Table, pa.Table]:
    """The split's rows in the form of the dataset contract, without those that cannot be understood."""
    from model.data.tables import BOXES_SCHEMA, IMAGES_SCHEMA

    images = raw.images.filter(pc.equal(raw.images["split"], split))
    boxes = raw.boxes.filter(pc.equal(raw.boxes["split"], split))
    good_images = _with_sizes(images.filter(pc.is_null(images["fault"])), folder)
    good_boxes = boxes.filter(_is_usable(boxes, good_images["image_id"].combine_chunks()))
    lost = len(images) - len(good_images), len(boxes) - len(good_boxes)
    if any(lost):
        log.warning("%d images and %d boxes of the split %s cannot be understood and are left out", *lost, split)
    unread = {name: pa.nulls(len(good_images)) for name in ("sha256", "perceptual_hash")}
    constant = {"root": pa.array(np.zeros(len(good_images), np.int32)), **unread}
    columns = {
        name: constant.get(name, good_images[name] if name in good_images.column_names else None)
        for name in IMAGES_SCHEMA.names
    }
    human = {
        "area": pc.coalesce(good_boxes["area"], pc.multiply(good_boxes["w"], good_boxes["h"])),
        "score": pa.array(np.ones(len(good_boxes), np.float32)),
        "source": pa.array(["label"] * len(good_boxes), pa.string()),
    }
    rows = {name: human[name] if name in human else good_boxes[name] for name in BOXES_SCHEMA.names}
    return pa.table(columns), pa.table(rows)


def _with_sizes(images: pa.Table, folder: Path) -> pa.Table:
    """YOLO labels record no size, so the pictures are asked; those that cannot tell are left out."""
    from pipeline_tasks.data.picture_size import upright_size

    unknown = pc.or_(pc.is_null(images["width"]), pc.is_null(images["height"])).to_pylist()
    if not any(unknown):
        return images
    recorded = zip(*(images[name].to_pylist() for name in ("path", "width", "height")), strict=True)
    sizes = [
        (upright_size(folder, path) if asked else (width, height))
        for asked, (path, width, height) in zip(unknown, recorded, strict=True)
    ]
    for place, name in enumerate(("width", "height")):
        values = pa.array([None if size is None else size[place] for size in sizes], pa.int32())
        images = images.set_column(images.schema.get_field_index(name), name, values)
    return images.filter(pc.is_valid(images["width"]))


def _is_usable(boxes: pa.Table, image_ids: pa.Array) -> pa.ChunkedArray:
    """Boxes of a usable image and a known class, with four finite numbers."""
    usable = pc.and_(pc.is_null(boxes["fault"]), pc.is_in(boxes["image_id"], value_set=image_ids))
    usable = pc.and_(usable, pc.is_valid(boxes["category"]))
    for side in "xywh":
        usable = pc.and_(usable, pc.fill_null(pc.is_finite(boxes[side]), False))
    return usable


def _in_order_of_ids(dataset: Dataset, split: str) -> ImageSet:
    """Whole numbers by value, other ids as text."""
    rows = np.flatnonzero(pc.equal(dataset.images["split"], split).to_numpy(zero_copy_only=False))
    ids = dataset.images["original_id"].take(pa.array(rows)).to_pylist()
    whole = all(name.lstrip("-").isdecimal() for name in ids)
    return dataset.image_set().subset(rows[sorted(range(len(ids)), key=lambda i: int(ids[i]) if whole else ids[i])])
