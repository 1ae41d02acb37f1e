"""Boxes drawn into pictures, readable without a plotting library."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

Colour = tuple[int, int, int]  # red, green, blue, 0 … 255
GOLDEN_RATIO = 0.618033988749895  # steps of it spread any number of hues evenly


def class_colour(label: int) -> Colour:
    """The same colour for the same class index, always; neighbours differ clearly."""
    red, green, blue = colorsys.hsv_to_rgb((label * GOLDEN_RATIO + 0.02) % 1.0, 0.85, 0.55 if label % 2 else 0.95)
    return round(red * 255), round(green * 255), round(blue * 255)


def draw_boxes(
    image: NDArray[np.uint8],
    boxes_xyxy: NDArray[np.floating[Any]],
    labels: Sequence[int] | NDArray[np.int64],
    class_names: Sequence[str],
    scores: NDArray[np.floating[Any]] | None = None,
    thickness: int | None = None,
    tags: bool = True,
) -> NDArray[np.uint8]:
    """A copy of an RGB picture with each box in its class's colour; on a filled tag its name and score.

    ``boxes_xyxy`` (N, 4) in pixels of the picture, best first: the best lie on top.  ``thickness`` in pixels; by
    default it grows with the picture.  Letters outside Latin-1's basic set appear as question marks.
    """
    canvas = np.ascontiguousarray(image).copy()
    line = thickness or max(1, round(max(image.shape[:2]) / 400))
    corners = np.rint(boxes_xyxy).astype(int).tolist()
    for position in reversed(range(len(corners))):
        label = int(labels[position])
        left, top, right, bottom = corners[position]
        cv2.rectangle(canvas, (left, top), (right, bottom), class_colour(label), line)
        if tags:
            text = class_names[label] if scores is None else f"{class_names[label]} {scores[position]:.2f}"
            _draw_tag(canvas, text, left, top, class_colour(label))
    return canvas


def _draw_tag(canvas: NDArray[np.uint8], text: str, left: int, top: int, colour: Colour) -> None:
    """A filled tag above the corner, pushed inside the picture where it would leave it."""
    height, width = canvas.shape[:2]
    scale = float(np.clip(max(height, width) / 1600, 0.36, 1.5))
    weight = max(1, round(scale * 1.5))
    (text_width, text_height), baseline = cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, scale, weight)
    tag_height = text_height + baseline + 2
    left = max(0, min(left, width - text_width - 4))
    top = max(0, top - tag_height)
    cv2.rectangle(canvas, (left, top), (left + text_width + 4, top + tag_height), colour, cv2.FILLED)
    luminance = 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2]
    ink = (0, 0, 0) if luminance > 130 else (255, 255, 255)
    place = (left + 2, top + text_height + 2)
    cv2.putText(canvas, text, place, cv2.FONT_HERSHEY_SIMPLEX, scale, ink, weight, cv2.LINE_AA)
