"""Putting a picture through a 2x3 matrix onto a canvas, bilinearly, and only the pixels that it covers.

A picture that is not turned is stretched by ``cv2.resize`` instead of warped: three times as fast, as it interpolates
along one axis after the other. For that its edges have to lie on whole pixels of the canvas; they are moved there by
half a pixel at most, and the matrix that says so is given back, so that boxes move exactly as the pixels did.
Coordinates are pixel edges: a picture spans 0 … width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]  # (2, 3) maps edge coordinates of a source to edge coordinates of the output

_FLIPS = {(True, False): 1, (False, True): 0, (True, True): -1}  # mirrored along columns, rows -> what OpenCV calls it


def paint(canvas: NDArray[np.uint8], picture: NDArray[np.uint8], matrix: Matrix) -> Matrix:
    """Paint ``picture`` (height, width, 3) into ``canvas`` (S, S, 3), in place; gives the matrix that was followed."""
    (a, b, left), (c, d, top) = matrix.tolist()
    if max(abs(b), abs(c)) > 1e-9:
        _paint_turned(canvas, picture, matrix)
        return matrix
    height, width = picture.shape[:2]
    columns, rows = _Stretch.fitting(a, left, width, canvas.shape[1]), _Stretch.fitting(d, top, height, canvas.shape[0])
    if columns is None or rows is None:  # nothing of it is visible
        return matrix
    size = (columns.length, rows.length)
    patch = cv2.resize(picture[rows.source, columns.source], size, interpolation=cv2.INTER_LINEAR)
    patch, region = patch[rows.kept, columns.kept], canvas[rows.visible, columns.visible]
    if (mirrored := (columns.mirrored, rows.mirrored)) in _FLIPS:
        cv2.flip(patch, _FLIPS[mirrored], region)
    else:
        region[:] = patch
    return np.array([(columns.factor, 0.0, columns.shift), (0.0, rows.factor, rows.shift)])


@dataclass(frozen=True)
class _Stretch:
    """One axis of a stretched picture: ``source`` of it becomes ``length`` pixels, of which those ``kept`` are
    ``visible`` on the canvas; a position x of the picture comes to ``factor`` * x + ``shift``.
    """

    source: slice
    length: int
    mirrored: bool
    kept: slice
    visible: slice
    factor: float
    shift: float

    @classmethod
    def fitting(cls, factor: float, shift: float, side: int, size: int) -> _Stretch | None:
        """For a picture of ``side`` pixels on a canvas of ``size``; None where nothing of it is visible."""
        near, far = sorted((shift, shift + factor * side))
        first, last = max(0, round(near)), min(size, round(far))
        if first >= last:
            return None
        shown = sorted(((first - shift) / factor, (last - shift) / factor))
        cut = (round(near) < 0, round(far) > size)  # by the canvas
        cut_begin, cut_end = cut if factor > 0 else cut[::-1]
        # where it is cut, one pixel more, which the interpolation looks at
        begin = max(0, math.floor(shown[0]) - 1) if cut_begin else 0
        end = min(side, math.ceil(shown[1]) + 1) if cut_end else side
        low, high = sorted((round(shift + factor * begin), round(shift + factor * end)))
        exact = math.copysign((high - low) / (end - begin), factor)
        return cls(
            source=slice(begin, end),
            length=high - low,
            mirrored=factor < 0,
            kept=slice(first - low, last - low) if factor > 0 else slice(high - last, high - first),
            visible=slice(first, last),
            factor=exact,
            shift=(low if factor > 0 else high) - exact * begin,
        )


def _paint_turned(canvas: NDArray[np.uint8], picture: NDArray[np.uint8], matrix: Matrix) -> None:
    size = canvas.shape[0]
    rows = matrix.tolist()
    (left, right), (top, bottom) = (_span(row, picture.shape, size) for row in rows)
    if left >= right or top >= bottom:
        return
    # OpenCV counts pixel centres, which lie half a pixel inside the edges
    centres = np.array(
        [(a, b, c + (a + b - 1) / 2 - first) for (a, b, c), first in zip(rows, (left, top), strict=True)]
    )
    extent = (right - left, bottom - top)
    warped = cv2.warpAffine(picture, centres, extent, None, cv2.INTER_LINEAR, cv2.BORDER_REPLICATE)
    # pixels whose centre lies inside, so that tiles which touch leave no seam: bilinear borders would fade out
    inside = cv2.warpAffine(np.full(picture.shape[:2], 255, np.uint8), centres, extent, None, cv2.INTER_NEAREST)
    cv2.copyTo(warped, inside, canvas[top:bottom, left:right])


def _span(row: list[float], shape: tuple[int, ...], size: int) -> tuple[int, int]:
    """First pixel of the output that a picture of (height, width) covers along one axis, and the one after the last.

    ``row`` of the matrix belongs to that axis.
    """
    by_width, by_height = row[0] * shape[1], row[1] * shape[0]
    corners = (row[2], row[2] + by_width, row[2] + by_height, row[2] + by_width + by_height)
    return max(0, round(min(corners))), min(size, round(max(corners)))
