"""Pictures with their boxes: small copies, and the boxes drawn over them as SVG, so that they stay sharp."""

from __future__ import annotations

import hashlib
import logging
from html import escape
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from model.data.images import decode_image
from pipeline_tasks.data.page.statistics import by_class
from pipeline_tasks.data.raw import RawDataset
from pipeline_tasks.data.sets import OpenSet, distinct, usable_boxes, usable_images
from pipeline_tasks.errors import DataError
from pipeline_tasks.images import read_content

log = logging.getLogger(__name__)

LONGEST_SIDE = 520
JPEG_QUALITY = 82
FOLDER = "pictures"
OF_EACH_CLASS = 2
COLOURS = 12
"""Hues that can be told apart; classes beyond that many share one, and their names tell them."""
LABELLED_BOXES = 40
"""Of more boxes than this the names are shown under the pointer only: they would hide the picture."""


def choose(raw: RawDataset, count: int) -> list[int]:
    """Image rows to show: of every class two, rare classes first, then any; always the same for the same set."""
    images, boxes = usable_images(raw), usable_boxes(raw)
    order = _shuffled(images)
    place = np.zeros(len(raw.images), np.int64)
    place[order] = np.arange(len(order))
    chosen: dict[int, None] = {}
    classes, owners = boxes["category"].to_numpy(), boxes["image_id"].to_numpy()
    counts = np.bincount(classes, minlength=len(raw.metadata.class_names))
    places = by_class(place[owners], classes, len(counts))
    for category in np.argsort(counts, kind="stable").tolist():
        first = distinct(places[category])[:OF_EACH_CLASS]
        chosen |= dict.fromkeys(order[first].tolist())
    chosen |= dict.fromkeys(order[:count].tolist())
    return list(chosen)[:count]


def _shuffled(images: pa.Table) -> NDArray[np.int64]:
    """Rows in the order of their names' digests."""
    digests = [hashlib.sha1(path.encode(), usedforsecurity=False).hexdigest() for path in images["path"].to_pylist()]
    rows: NDArray[np.int64] = images["image_id"].to_numpy()[np.argsort(np.array(digests), kind="stable")]
    return rows


def write_pictures(opened: OpenSet, rows: list[int], folder: Path) -> list[str]:
    """Write small copies below `folder` and return the HTML of each picture that can be decoded."""
    (folder / FOLDER).mkdir()
    boxes = usable_boxes(opened.raw)
    html, unreadable = [], []
    for number, row in enumerate(rows):
        image = opened.raw.images.slice(row, 1).to_pylist()[0]
        own = boxes.filter(pc.equal(boxes["image_id"], row))
        try:
            pixels = _decoded(opened.folder, image["path"])
        except DataError as error:
            unreadable.append(str(error))
            continue
        name = f"{FOLDER}/{number:04d}.jpg"
        _write_small(pixels, folder / name)
        html.append(_picture(name, pixels.shape[1], pixels.shape[0], image, own, opened.class_names))
    if unreadable:
        log.warning("%d pictures are left out of the page; the first: %s", len(unreadable), unreadable[0])
    return html


def _decoded(folder: Path, path: str) -> NDArray[np.uint8]:
    try:
        return decode_image(read_content(folder, path), f"{folder}/{path}")
    except ValueError as error:
        raise DataError(str(error)) from None


def _write_small(pixels: NDArray[np.uint8], path: Path) -> None:
    scale = min(1.0, LONGEST_SIDE / max(pixels.shape[:2]))
    size = (max(1, round(pixels.shape[1] * scale)), max(1, round(pixels.shape[0] * scale)))
    small = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)
    cv2.imwrite(str(path), cv2.cvtColor(small, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])


def _picture(
    name: str, width: int, height: int, image: dict[str, object], boxes: pa.Table, class_names: tuple[str, ...]
) -> str:
    drawn = "".join(
        _box(box, class_names, len(boxes) <= LABELLED_BOXES, max(width, height)) for box in boxes.to_pylist()
    )
    caption = f"{image['path']} · {image['split']} · {width} x {height} · {len(boxes)} boxes"
    return (
        f'<figure class="picture"><svg viewBox="0 0 {width} {height}">'
        f'<image href="{name}" width="{width}" height="{height}" preserveAspectRatio="none"/>{drawn}</svg>'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def _box(box: dict[str, float], class_names: tuple[str, ...], labelled: bool, longest: int) -> str:
    category = int(box["category"])
    colour, name = hue(category), escape(class_names[category])
    crowd = " (crowd)" if box["iscrowd"] else ""
    size = longest / 40
    text = f'<text x="{box["x"]:.1f}" y="{max(box["y"] - size / 5, size):.1f}" font-size="{size:.1f}">{name}</text>'
    title = f"<title>{name}{crowd} {box['w']:.0f} x {box['h']:.0f}</title>"
    shape = (
        f'<rect x="{box["x"]:.1f}" y="{box["y"]:.1f}" width="{max(box["w"], 0):.1f}" height="{max(box["h"], 0):.1f}"/>'
    )
    kind = "box crowd" if crowd else "box"
    return f'<g class="{kind}" style="--hue:{colour}">{title}{shape}{text if labelled else ""}</g>'


def hue(category: int) -> int:
    """Degrees on the colour circle; neighbours in the class list lie far apart."""
    return (category % COLOURS) * (360 // COLOURS) * 5 % 360
