"""Pictures for `make demo`: handwritten digits and, for pretraining, geometric shapes, on textured backgrounds.

    python demo/digits.py OUT [--seed N]

Writes three COCO folders below OUT within seconds and without a network:

| folder | content |
|---|---|
| target/ | digits, classes "0" ... "9", splits train, val, test |
| pretrain/ | shapes, other classes and no digit, splits train, val |
| unlabeled/ | digits with images.json; its true boxes are kept apart in hidden_truth.json |

The digits are the 1797 scans of 8x8 pixels that scikit-learn ships (UCI Optical Recognition of Handwritten
Digits). No scan is used in two splits or folders, so nothing can be recognised by heart. Equal seeds give equal
bytes.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

SIDE = 128  # pixels of every picture
LARGEST_COUNT = 6  # objects in a picture
EMPTY_SHARE = 0.08  # pictures without objects
GAP = 3  # pixels between two boxes, and to the border
LEAST_CONTRAST = 70.0  # grey levels between ink and background
DIGIT_NAMES = tuple("0123456789")
SHAPE_NAMES = ("arrow", "circle", "crescent", "cross", "ring", "square", "star", "triangle")
UCI_LICENCE = {
    "id": 1,
    "name": "CC BY 4.0",
    "url": "https://creativecommons.org/licenses/by/4.0/",
}
GENERATED_LICENCE = {
    "id": 2,
    "name": "CC0-1.0",
    "url": "https://creativecommons.org/publicdomain/zero/1.0/",
}
DIGIT_SOURCE = "Digits: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI, 1998"

Alpha = NDArray[np.float32]  # (height, width) in [0, 1]: how much ink covers each pixel
Image = NDArray[np.float32]  # (SIDE, SIDE, 3) RGB, 0 to 255
Draw = Callable[[np.random.Generator, int], Alpha]  # ink of the object with this source index


@dataclass(frozen=True)
class Sizes:
    """Pictures per split."""

    target_train: int = 320
    target_val: int = 80
    target_test: int = 120
    pretrain_train: int = 400
    pretrain_val: int = 60
    unlabeled: int = 320


@dataclass(frozen=True)
class Source:
    """What the pictures of a split may show: which sources, of which class, and how they are drawn."""

    indices: NDArray[np.int64]
    labels: NDArray[np.int64]  # of every source, not only of `indices`
    draw: Draw
    licence: dict[str, Any]


def generate(output_directory: Path, seed: int = 0, sizes: Sizes | None = None) -> None:
    """Write the three folders below `output_directory`, which appears only when it is complete.

    Raises:
        ValueError: when the directory is already there and not empty.
    """
    if output_directory.exists() and any(output_directory.iterdir()):
        raise ValueError(f"{output_directory} is not empty; remove it or choose another folder")
    partial = output_directory.with_name(output_directory.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    sizes = sizes or Sizes()
    digits = _digit_sources(seed)
    shapes = Source(np.arange(len(SHAPE_NAMES)), np.arange(len(SHAPE_NAMES)), draw_shape, GENERATED_LICENCE)
    _write_splits(
        partial / "target",
        DIGIT_NAMES,
        {
            "train": (digits["train"], sizes.target_train),
            "val": (digits["val"], sizes.target_val),
            "test": (digits["test"], sizes.target_test),
        },
        seed,
    )
    _write_splits(
        partial / "pretrain",
        SHAPE_NAMES,
        {"train": (shapes, sizes.pretrain_train), "val": (shapes, sizes.pretrain_val)},
        seed + 1,
    )
    _write_unlabeled(partial / "unlabeled", digits["unlabeled"], sizes.unlabeled, seed + 2)
    os.replace(partial, output_directory)


# pictures ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Placed:
    """One object of a picture: where its ink is, to the pixel."""

    source: int
    box_xywh: tuple[float, float, float, float]


def make_picture(source: Source, random: np.random.Generator) -> tuple[NDArray[np.uint8], list[Placed]]:
    """A textured background with up to LARGEST_COUNT objects that do not touch; RGB uint8 (SIDE, SIDE, 3)."""
    image = texture(random)
    count = 0 if random.random() < EMPTY_SHARE else int(random.integers(1, LARGEST_COUNT + 1))
    free = np.ones((SIDE, SIDE), dtype=bool)
    placed = []
    for index in random.choice(source.indices, size=count):
        alpha = _cropped_to_ink(source.draw(random, int(index)))
        corner = _find_place(free, alpha.shape, random)
        if corner is not None:
            placed.append(Placed(int(index), _paint(image, alpha, corner, random)))
            left, top = corner
            height, width = alpha.shape
            free[max(0, top - GAP) : top + height + GAP, max(0, left - GAP) : left + width + GAP] = False
    noise = random.normal(0.0, random.uniform(1.0, 6.0), image.shape)
    return np.clip(np.rint(image + noise), 0, 255).astype(np.uint8), placed


def ink(alpha: Alpha) -> NDArray[np.bool_]:
    """The pixels that count as covered: at least half."""
    return alpha >= 0.5


def _cropped_to_ink(alpha: Alpha) -> Alpha:
    """The part of the drawing around its ink, with one more pixel on each side for the soft edge."""
    rows, columns = np.flatnonzero(ink(alpha).any(axis=1)), np.flatnonzero(ink(alpha).any(axis=0))
    padded = np.pad(alpha, 1)
    return padded[rows[0] : rows[-1] + 3, columns[0] : columns[-1] + 3]


def _find_place(free: NDArray[np.bool_], shape: tuple[int, ...], random: np.random.Generator) -> tuple[int, int] | None:
    """A left top corner at which nothing is in the way, None if many trials found none."""
    height, width = shape
    for _ in range(40):
        left = int(random.integers(GAP, SIDE - GAP - width + 1))
        top = int(random.integers(GAP, SIDE - GAP - height + 1))
        if free[top : top + height, left : left + width].all():
            return left, top
    return None


def _paint(
    image: Image, alpha: Alpha, corner: tuple[int, int], random: np.random.Generator
) -> tuple[float, float, float, float]:
    """Blend the object into the image in a colour that stands out there; its box, tight around the ink."""
    left, top = corner
    height, width = alpha.shape
    below = image[top : top + height, left : left + width]
    colour = _contrasting_colour(below.mean(axis=(0, 1)), random)
    below += alpha[:, :, None] * (colour - below)
    rows, columns = np.flatnonzero(ink(alpha).any(axis=1)), np.flatnonzero(ink(alpha).any(axis=0))
    x, y = float(left + columns[0]), float(top + rows[0])
    return x, y, float(columns[-1] - columns[0] + 1), float(rows[-1] - rows[0] + 1)


def _contrasting_colour(background: NDArray[np.float32], random: np.random.Generator) -> NDArray[np.float32]:
    while True:
        colour = random.uniform(0, 255, 3).astype(np.float32)
        if abs(_brightness(colour) - _brightness(background)) >= LEAST_CONTRAST:
            return colour


def _brightness(colour: NDArray[np.float32]) -> float:
    return float(colour @ np.array([0.299, 0.587, 0.114], np.float32))


# objects -------------------------------------------------------------------------------------------------


def digit_drawer() -> Draw:
    """Draws a scan of scikit-learn's digits with smooth strokes, 20 to 56 pixels high, turned by at most 15 degrees."""
    from sklearn.datasets import load_digits

    scans = np.pad(load_digits().images.astype(np.float32) / 16.0, ((0, 0), (2, 2), (2, 2)))

    def draw(random: np.random.Generator, index: int) -> Alpha:
        scale = random.uniform(20.0, 56.0) / 8.0
        stretch = random.uniform(0.85, 1.15)
        side = math.ceil(12 * 1.2 * scale)
        turn = _affine(random.uniform(-15.0, 15.0), scale * stretch, scale, 12.0, side)
        grey = cv2.warpAffine(scans[index], turn, (side, side), flags=cv2.INTER_CUBIC)
        return np.asarray(np.clip((grey - 0.25) / 0.3, 0.0, 1.0), np.float32)  # steeper: a crisp stroke

    return draw


def draw_shape(random: np.random.Generator, index: int) -> Alpha:
    """Draw one of SHAPE_NAMES, 20 to 56 pixels large, at any angle, filled or as a thick outline."""
    size, stretch = random.uniform(20.0, 56.0), random.uniform(0.8, 1.25)
    side, fine = math.ceil(1.5 * size * max(1.0, stretch)), 4
    canvas = np.zeros((side * fine, side * fine), np.uint8)
    turn = _affine(random.uniform(0, 360), size * stretch / 2 * fine, size / 2 * fine, 0.0, side * fine)
    outline = random.random() < 0.5
    for polygon, value in zip(_polygons(SHAPE_NAMES[index]), (255, 0), strict=False):
        corners = np.rint((polygon @ turn[:, :2].T + turn[:, 2]) * 16).astype(np.int32)
        if outline and SHAPE_NAMES[index] in ("square", "star", "triangle"):
            cv2.polylines(canvas, [corners], True, value, thickness=round(0.14 * size * fine), shift=4)
        else:
            cv2.fillPoly(canvas, [corners], value, shift=4)
    return cv2.resize(canvas, (side, side), interpolation=cv2.INTER_AREA).astype(np.float32) / 255.0


def _affine(degrees: float, scale_x: float, scale_y: float, source_side: float, side: int) -> NDArray[np.float64]:
    """(2, 3) matrix: scale, turn, and move the middle of the source to the middle of a canvas."""
    cosine, sine = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    linear = np.array([[cosine, -sine], [sine, cosine]]) @ np.diag([scale_x, scale_y])
    middle = np.full(2, (source_side - 1) / 2 if source_side else 0.0)
    return np.column_stack([linear, (side - 1) / 2 - linear @ middle])


def _polygons(name: str) -> list[NDArray[np.float64]]:
    """Corners within the unit circle; a second polygon is a hole."""
    if name == "circle":
        return [_regular(48)]
    if name == "ring":
        return [_regular(48), 0.6 * _regular(48)]
    if name == "crescent":
        return [_regular(48), 0.8 * _regular(48) + [0.42, 0.0]]
    if name == "star":
        return [_regular(10) * np.where(np.arange(10) % 2, 0.45, 1.0)[:, None]]
    if name == "cross":
        quarter = np.array([[0.28, 1.0], [0.28, 0.28], [1.0, 0.28]])
        turn = np.array([[0.0, -1.0], [1.0, 0.0]])
        return [0.95 * np.concatenate([quarter @ np.linalg.matrix_power(turn, count) for count in range(4)])]
    if name == "arrow":
        corners = [[-1, -0.25], [0.1, -0.25], [0.1, -0.7], [1, 0], [0.1, 0.7], [0.1, 0.25], [-1, 0.25]]
        return [np.array(corners)]
    return [_regular({"square": 4, "triangle": 3}[name])]


def _regular(corners: int) -> NDArray[np.float64]:
    angles = 2 * np.pi * np.arange(corners) / corners
    return np.column_stack([np.cos(angles), np.sin(angles)])


# backgrounds ---------------------------------------------------------------------------------------------


def texture(random: np.random.Generator) -> Image:
    """Clouds, stripes, checks or a gradient between two related colours."""
    first = random.uniform(20, 235, 3)
    second = np.clip(first + random.uniform(-60, 60, 3), 0, 255)
    pattern = (_clouds, _stripes, _checks, _gradient)[int(random.integers(4))](random)
    pattern = 0.7 * pattern + 0.3 * _clouds(random)
    return (first + pattern[:, :, None] * (second - first)).astype(np.float32)


def _clouds(random: np.random.Generator) -> NDArray[np.float32]:
    total = np.zeros((SIDE, SIDE), np.float32)
    for cells in (3, 6, 12, 32):
        noise = random.random((cells, cells)).astype(np.float32)
        smooth = cv2.resize(noise, (SIDE, SIDE), interpolation=cv2.INTER_CUBIC)
        total += np.asarray(smooth, np.float32) / np.float32(cells**0.5)
    return np.asarray((total - total.min()) / np.ptp(total), np.float32)


def _stripes(random: np.random.Generator) -> NDArray[np.float32]:
    return (0.5 + 0.5 * np.sin(_ramp(random, random.uniform(4.0, 40.0)))).astype(np.float32)


def _checks(random: np.random.Generator) -> NDArray[np.float32]:
    periods = random.uniform(3.0, 14.0, 2)
    waves = np.sin(_ramp(random, periods[0])) * np.sin(_ramp(random, periods[1]))
    return (waves > 0).astype(np.float32)


def _gradient(random: np.random.Generator) -> NDArray[np.float32]:
    ramp = _ramp(random, 1.0)
    return np.asarray((ramp - ramp.min()) / np.ptp(ramp), np.float32)


def _ramp(random: np.random.Generator, periods: float) -> NDArray[np.float64]:
    """A plane that rises by `periods` turns over the picture, in a random direction, from a random phase."""
    angle, phase = random.uniform(0, 2 * np.pi, 2)
    y, x = np.mgrid[0:SIDE, 0:SIDE] / SIDE
    ramp: NDArray[np.float64] = 2 * np.pi * periods * (np.cos(angle) * x + np.sin(angle) * y) + phase
    return ramp


# files ---------------------------------------------------------------------------------------------------


def _digit_sources(seed: int) -> dict[str, Source]:
    """Every scan in exactly one of four shares, each share with the same mix of digits."""
    from sklearn.datasets import load_digits

    labels = load_digits().target.astype(np.int64)
    random = np.random.default_rng([seed, len(labels)])
    shares: dict[str, list[NDArray[np.int64]]] = {"train": [], "val": [], "test": [], "unlabeled": []}
    for label in range(10):
        scans = random.permutation(np.flatnonzero(labels == label))
        parts = np.split(scans, (np.array([0.4, 0.5, 0.65]) * len(scans)).astype(int))
        for share, part in zip(shares.values(), parts, strict=True):
            share.append(part)
    draw = digit_drawer()
    return {name: Source(np.concatenate(share), labels, draw, UCI_LICENCE) for name, share in shares.items()}


def _write_splits(folder: Path, names: Sequence[str], splits: dict[str, tuple[Source, int]], seed: int) -> None:
    (folder / "annotations").mkdir(parents=True)
    first_id = 1
    for split, (source, count) in splits.items():
        truth = _write_pictures(folder / "images", split, names, source, count, seed, first_id)
        _write_json(folder / "annotations" / f"instances_{split}.json", truth)
        first_id += count


def _write_unlabeled(folder: Path, source: Source, count: int, seed: int) -> None:
    truth = _write_pictures(folder / "images", "unlabeled", DIGIT_NAMES, source, count, seed, 1)
    _write_json(folder / "hidden_truth.json", truth)
    without_truth = {key: truth[key] for key in ("info", "licenses", "images")}
    _write_json(folder / "images.json", without_truth)


def _write_pictures(
    folder: Path, split: str, names: Sequence[str], source: Source, count: int, seed: int, first_id: int
) -> dict[str, Any]:
    """Write `count` pictures; their COCO annotations, with the category ids counted from 1."""
    folder.mkdir(parents=True, exist_ok=True)
    images, annotations = [], []
    for image_id in range(first_id, first_id + count):
        pixels, placed = make_picture(source, np.random.default_rng([seed, image_id]))
        name = f"{split}_{image_id:05d}.jpg"
        cv2.imwrite(str(folder / name), pixels[:, :, ::-1], [cv2.IMWRITE_JPEG_QUALITY, 92])
        licence = source.licence["id"] if placed else GENERATED_LICENCE["id"]
        images.append({"id": image_id, "file_name": name, "width": SIDE, "height": SIDE, "license": licence})
        annotations += list(_annotations(image_id, placed, source.labels))
    return {
        "info": {"description": DIGIT_SOURCE, "version": "1.0", "license": GENERATED_LICENCE["name"]},
        "licenses": [UCI_LICENCE, GENERATED_LICENCE],
        "images": images,
        "annotations": annotations,
        "categories": [{"id": index, "name": name} for index, name in enumerate(names, start=1)],
    }


def _annotations(image_id: int, placed: Sequence[Placed], labels: NDArray[np.int64]) -> Iterator[dict[str, Any]]:
    for number, item in enumerate(placed):
        yield {
            "id": image_id * 10 + number,
            "image_id": image_id,
            "category_id": int(labels[item.source]) + 1,
            "bbox": list(item.box_xywh),
            "area": item.box_xywh[2] * item.box_xywh[3],
            "iscrowd": 0,
            "source": item.source,
        }


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value) + "\n", encoding="utf-8")


def main() -> None:
    """Read the command line and generate."""
    parser = argparse.ArgumentParser(description="Generate the pictures of the demo.")
    parser.add_argument("output", type=Path, help="folder to create")
    parser.add_argument("--seed", type=int, default=0, help="seed of every random draw")
    options = parser.parse_args()
    try:
        generate(options.output, options.seed)
    except ValueError as error:
        parser.error(str(error))
    sizes = ", ".join(f"{path.name}/ {len(list(path.glob('images/*')))}" for path in sorted(options.output.iterdir()))
    print(f"{options.output}: {sizes} pictures")


if __name__ == "__main__":
    main()
