"""Training augmentation: every output pixel comes from one interpolation of a network-sized source.

A sample is made of one image, or of four for a mosaic. Fitting, tile placement, scale, rotation, shift and
flip of a source are one 2x3 matrix, so each source is warped once, straight into the output. Differences to
the YOLO-NAS reference recipe, on purpose: the second image of a mixup is augmented like the first, boxes are
clipped to width and height in that order, and saturation and value change by factors, so that grey pictures
stay grey.

Legend: S input size in pixels, N boxes. Coordinates are pixel edges: a picture spans 0 … width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields

import cv2
import numpy as np
from numpy.typing import NDArray

from model.data.painting import Matrix, paint
from model.preprocessing import Preprocessing


@dataclass(frozen=True)
class AugmentationConfig:
    """What may happen to a training image.  The defaults suit small target sets of natural pictures."""

    mosaic_probability: float = 0.5  # four images around a random centre
    mixup_probability: float = 0.0  # blend with a second augmented image
    mixup_concentration: float = 32.0  # blend ratio ~ Beta(c, c); large means near one half
    minimum_scale: float = 0.5
    maximum_scale: float = 1.5
    translation: float = 0.1  # largest shift as a fraction of the input size
    rotation_degrees: float = 0.0  # largest angle; boxes become the hull of the turned box
    horizontal_flip_probability: float = 0.5  # 0 where left and right matter: digits, text, cards
    vertical_flip_probability: float = 0.0  # for views from above and microscopes
    hsv_probability: float = 0.5
    hue_degrees: float = 10.0  # largest change on the circle of 360 degrees
    saturation: float = 0.4  # factor 1 - s … 1 + s
    value: float = 0.3  # factor 1 - v … 1 + v
    minimum_box_side: float = 2.0  # pixels; smaller boxes are dropped after the warp
    minimum_visible_fraction: float = 0.1  # of a box's area inside the output
    maximum_aspect_ratio: float = 20.0

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            fraction = item.name.endswith(("_probability", "_fraction")) or item.name in (
                "saturation",
                "value",
            )
            if not math.isfinite(value) or value < 0 or (fraction and value > 1):
                limits = "between 0 and 1" if fraction else "at least 0"
                raise ValueError(f"augmentation.{item.name} must be {limits}, got {value}")
        if not 0 < self.minimum_scale <= self.maximum_scale:
            raise ValueError(
                "augmentation.minimum_scale must be positive and at most maximum_scale, got "
                f"{self.minimum_scale} and {self.maximum_scale}"
            )
        if self.mixup_concentration <= 0:
            raise ValueError(f"augmentation.mixup_concentration must be positive, got {self.mixup_concentration}")

    @classmethod
    def none(cls) -> AugmentationConfig:
        """Only the fitting that evaluation does too."""
        return cls(
            mosaic_probability=0.0,
            minimum_scale=1.0,
            maximum_scale=1.0,
            translation=0.0,
            horizontal_flip_probability=0.0,
            hsv_probability=0.0,
            minimum_box_side=0.0,
            minimum_visible_fraction=0.0,
            maximum_aspect_ratio=1e9,
        )


@dataclass(frozen=True)
class Sample:
    """A picture with its boxes in its own pixels, edge coordinates."""

    image: NDArray[np.uint8]  # (height, width, 3) RGB
    boxes_xyxy: NDArray[np.float32]  # (N, 4)
    labels: NDArray[np.int64]  # (N,)
    weights: NDArray[np.float32]  # (N,)


Load = Callable[[int], Sample]


def augment(
    index: int,
    image_count: int,
    load: Load,
    preprocessing: Preprocessing,
    config: AugmentationConfig,
    random: np.random.Generator,
    mosaic_enabled: bool = True,
) -> Sample:
    """One training sample of size (S, S) around image ``index``.

    ``load`` gives the sources, ``random`` makes every choice, further images among 0 … image_count - 1
    included: equal generators give equal samples.
    """
    mosaic_probability = config.mosaic_probability if mosaic_enabled else 0.0
    sample = _compose(index, image_count, load, preprocessing, config, random, mosaic_probability)
    if random.random() >= config.mixup_probability:
        return sample
    other = int(random.integers(image_count))
    ratio = float(random.beta(config.mixup_concentration, config.mixup_concentration))
    return mixup(sample, _compose(other, image_count, load, preprocessing, config, random, mosaic_probability), ratio)


def _compose(
    index: int,
    image_count: int,
    load: Load,
    preprocessing: Preprocessing,
    config: AugmentationConfig,
    random: np.random.Generator,
    mosaic_probability: float,
) -> Sample:
    """A single image or a mosaic, warped once and with its colours changed; not yet mixed up."""
    if random.random() < mosaic_probability:
        sources = [load(index), *(load(int(other)) for other in random.integers(image_count, size=3))]
        centre_xy = random.uniform(0.5, 1.5, size=2) * preprocessing.input_size
        placements = mosaic_placements([source.image.shape[:2] for source in sources], preprocessing, centre_xy)
        middle = float(preprocessing.input_size)
    else:
        sources = [load(index)]
        placements = [fit_placement(sources[0].image.shape[:2], preprocessing)]
        middle = preprocessing.input_size / 2
    change = draw_affine(config, preprocessing.input_size, middle, random)
    sample = warp(sources, [_chain(change, placement) for placement in placements], preprocessing, config)
    if random.random() >= config.hsv_probability:
        return sample
    gains = random.uniform(-1, 1, size=3) * (config.hue_degrees, config.saturation, config.value)
    return Sample(change_colours(sample.image, *gains), sample.boxes_xyxy, sample.labels, sample.weights)


def fit_placement(shape: tuple[int, ...], preprocessing: Preprocessing) -> Matrix:
    """Where evaluation puts a picture of (height, width)."""
    height, width = shape
    box = preprocessing.letterbox(width, height)
    return np.array([[box.scale, 0.0, box.left], [0.0, box.scale, box.top]])


def mosaic_placements(
    shapes: list[tuple[int, ...]], preprocessing: Preprocessing, centre_xy: NDArray[np.float64]
) -> list[Matrix]:
    """Four fitted pictures that touch the centre with their inner corners, on a plane of (2S, 2S).

    Order: top left, top right, bottom left, bottom right (mosaic of YOLOv4, arXiv:2004.10934, section 3.3).
    """
    placements = []
    for position, (height, width) in enumerate(shapes):
        scale = preprocessing.input_size / max(height, width)
        left = centre_xy[0] - (width * scale if position % 2 == 0 else 0.0)
        top = centre_xy[1] - (height * scale if position < 2 else 0.0)
        placements.append(np.array([[scale, 0.0, left], [0.0, scale, top]]))
    return placements


def draw_affine(config: AugmentationConfig, size: int, middle: float, random: np.random.Generator) -> Matrix:
    """Scale, rotation and flip about (middle, middle), which moves to the output's centre plus a random
    shift.
    """
    scale = random.uniform(config.minimum_scale, config.maximum_scale)
    angle = math.radians(random.uniform(-config.rotation_degrees, config.rotation_degrees))
    shift = random.uniform(-config.translation, config.translation, size=2) * size
    flip_x = -1.0 if random.random() < config.horizontal_flip_probability else 1.0
    flip_y = -1.0 if random.random() < config.vertical_flip_probability else 1.0
    cosine, sine = scale * math.cos(angle), scale * math.sin(angle)
    rows = ((flip_x * cosine, -flip_x * sine), (flip_y * sine, flip_y * cosine))
    return np.array([(a, b, size / 2 + by - (a + b) * middle) for (a, b), by in zip(rows, shift.tolist(), strict=True)])


def _chain(outer: Matrix, inner: Matrix) -> Matrix:
    """The matrix that applies ``inner`` first."""
    first, second = inner.tolist()  # plain numbers: for six of them numpy's calls take far longer
    rows = [[a * x + b * y for x, y in zip(first, second, strict=True)] for a, b, _ in outer.tolist()]
    chained = np.array(rows)
    chained[:, 2] += outer[:, 2]
    return chained


def warp(
    sources: list[Sample], matrices: list[Matrix], preprocessing: Preprocessing, config: AugmentationConfig
) -> Sample:
    """Each source through its matrix onto one padded canvas (S, S), with the boxes that remain."""
    size = preprocessing.input_size
    image = np.full((size, size, 3), preprocessing.pad_value, np.uint8)
    painted = [paint(image, source.image, matrix) for source, matrix in zip(sources, matrices, strict=True)]
    # the boxes of all sources at once: an image has few, and every call to numpy takes longer than its arithmetic
    of_box = np.repeat(np.stack(painted), [len(source.labels) for source in sources], axis=0)
    moved_xyxy = warp_boxes(np.concatenate([source.boxes_xyxy for source in sources]), of_box)
    clipped_xyxy, keep = clip_and_filter(moved_xyxy, size, size, config)
    return Sample(
        image,
        clipped_xyxy[keep].astype(np.float32),
        np.concatenate([source.labels for source in sources])[keep],
        np.concatenate([source.weights for source in sources])[keep],
    )


def warp_boxes(boxes_xyxy: NDArray[np.float32], matrix: Matrix) -> NDArray[np.float64]:
    """The axis-parallel hull of each box after the matrix, (N, 4), not clipped; (N, 2, 3) gives each box its own."""
    corners = boxes_xyxy[:, [0, 1, 2, 1, 2, 3, 0, 3]].reshape(-1, 4, 2) @ matrix[..., :2].swapaxes(-1, -2)
    corners += matrix[..., None, :, 2]
    return np.concatenate([corners.min(axis=1), corners.max(axis=1)], axis=1)


def clip_and_filter(
    boxes_xyxy: NDArray[np.float64], width: int, height: int, config: AugmentationConfig
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Boxes clipped to the picture (N, 4), and which of them are still worth learning (N,)."""
    clipped = np.clip(boxes_xyxy, 0, (width, height, width, height))
    before, after = (boxes[:, 2:] - boxes[:, :2] for boxes in (boxes_xyxy, clipped))
    shorter, longer = after.min(axis=1, initial=np.inf), after.max(axis=1, initial=0)
    keep = (
        (shorter > config.minimum_box_side)
        & (after.prod(axis=1) > config.minimum_visible_fraction * before.prod(axis=1))
        & (longer < config.maximum_aspect_ratio * shorter)
    )
    return clipped, keep


def change_colours(image: NDArray[np.uint8], hue_degrees: float, saturation: float, value: float) -> NDArray[np.uint8]:
    """Hue turned by degrees, saturation and value multiplied by 1 + the given change."""
    steps = np.arange(256, dtype=np.float64)
    hue = (steps + hue_degrees / 2) % 180  # OpenCV stores half degrees
    tables = [hue, np.clip(steps * (1 + saturation), 0, 255), np.clip(steps * (1 + value), 0, 255)]
    planes = cv2.split(cv2.cvtColor(image, cv2.COLOR_RGB2HSV))  # one table for all three takes half as long again
    changed = [cv2.LUT(plane, table.astype(np.uint8)) for plane, table in zip(planes, tables, strict=True)]
    return cv2.cvtColor(cv2.merge(changed), cv2.COLOR_HSV2RGB).astype(np.uint8, copy=False)


def mixup(first: Sample, second: Sample, ratio: float) -> Sample:
    """``ratio`` of the first picture over the second, boxes of both (mixup, arXiv:1710.09412; for detection
    arXiv:1902.04103)."""
    blended = cv2.addWeighted(first.image, ratio, second.image, 1 - ratio, 0)
    return Sample(
        blended.astype(np.uint8, copy=False),
        np.concatenate([first.boxes_xyxy, second.boxes_xyxy]),
        np.concatenate([first.labels, second.labels]),
        np.concatenate([first.weights, second.weights]),
    )
