"""Pixels lie where the matrix that is given back says."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from model.data.augmentation import mosaic_placements
from model.data.painting import Matrix, paint
from model.preprocessing import Preprocessing

SIZE = 96


def slopes(height: int, width: int) -> NDArray[np.uint8]:
    """Red tells the column, green the row, two grey levels a pixel; blue is full."""
    rows, columns = np.mgrid[0:height, 0:width]
    return np.stack([2 * columns, 2 * rows, np.full_like(rows, 255)], axis=2).astype(np.uint8)


def drawn(seed: int) -> tuple[NDArray[np.uint8], Matrix]:
    """A picture, and a matrix that mirrors, zooms and shifts it, often half off the canvas."""
    random = np.random.default_rng(seed)
    picture = slopes(*random.integers(3, 120, 2))
    factors = np.exp(random.uniform(np.log(0.02), np.log(60), 2)) * random.choice([-1, 1], 2)
    centre = random.uniform(-0.3, 1.3, 2) * SIZE
    shifts = centre - factors * np.array(picture.shape[1::-1]) / 2
    return picture, np.array([(factors[0], 0.0, shifts[0]), (0.0, factors[1], shifts[1])])


def painted(picture: NDArray[np.uint8], matrix: Matrix) -> tuple[NDArray[np.uint8], Matrix]:
    canvas = np.zeros((SIZE, SIZE, 3), np.uint8)
    return canvas, paint(canvas, picture, matrix)


def edges(picture: NDArray[np.uint8], matrix: Matrix) -> NDArray[np.float64]:
    """left, top, right, bottom of the whole picture on the canvas."""
    height, width = picture.shape[:2]
    corners = np.array([(0, 0), (width, height)]) @ matrix[:, :2].T + matrix[:, 2]
    return np.concatenate([corners.min(axis=0), corners.max(axis=0)])


@pytest.mark.parametrize("seed", range(200))
def test_every_pixel_shows_the_place_that_the_matrix_names(seed: int) -> None:
    picture, matrix = drawn(seed)
    canvas, followed = painted(picture, matrix)
    covered = canvas[:, :, 2] > 0
    left, top, right, bottom = np.clip(edges(picture, followed), 0, SIZE).round().astype(int)
    expected = np.zeros_like(covered)
    expected[top:bottom, left:right] = True
    np.testing.assert_array_equal(covered, expected)
    rows, columns = np.nonzero(covered)
    for axis, places in ((0, columns), (1, rows)):
        shown = (places + 0.5 - followed[axis, 2]) / followed[axis, axis] - 0.5  # in the picture, pixel centres
        wanted = 2 * np.clip(shown, 0, picture.shape[1 - axis] - 1)
        assert np.abs(canvas[rows, columns, axis] - wanted).max(initial=0) <= 1  # grey level


@pytest.mark.parametrize("seed", range(200))
def test_what_is_visible_moves_by_half_a_pixel_at_most(seed: int) -> None:
    picture, matrix = drawn(seed)
    _, followed = painted(picture, matrix)
    for axis in (0, 1):
        near, far = np.clip(edges(picture, matrix)[[axis, axis + 2]], 0, SIZE)
        if far - near < 1:
            continue
        places = (np.array([near, far]) - matrix[axis, 2]) / matrix[axis, axis]
        moved = places * followed[axis, axis] + followed[axis, 2]
        assert np.abs(moved - (near, far)).max() <= 0.5 + 1e-9


def test_a_cut_picture_is_interpolated_across_the_canvas_edge() -> None:
    """As a warp of the whole picture does it: nothing is repeated at the cut."""
    rough = np.random.default_rng(0).integers(0, 256, (80, 80, 3), dtype=np.uint8)
    matrix = np.array([(2.0, 0.0, -40.0), (0.0, 2.0, -30.0)])
    canvas, followed = painted(rough, matrix)
    np.testing.assert_array_equal(followed, matrix)
    centres = matrix + np.array([0, 0, 0.5])  # OpenCV counts pixel centres
    whole = cv2.warpAffine(rough, centres, (SIZE, SIZE), flags=cv2.INTER_LINEAR)
    assert np.abs(canvas.astype(int) - whole.astype(int)).max() <= 1


def test_a_picture_of_the_right_size_is_copied() -> None:
    rough = np.random.default_rng(0).integers(0, 256, (40, SIZE, 3), dtype=np.uint8)
    canvas, _ = painted(rough, np.array([(1.0, 0.0, 0.0), (0.0, 1.0, 28.0)]))
    np.testing.assert_array_equal(canvas[28:68], rough)
    assert not canvas[:28].any() and not canvas[68:].any()


@pytest.mark.parametrize("shift", [(-200.0, 0.0), (0.0, 96.0), (-20.4, 0.0)])
def test_a_picture_beside_the_canvas_leaves_it_alone(shift: tuple[float, float]) -> None:
    matrix = np.array([(1.0, 0.0, shift[0]), (0.0, 1.0, shift[1])])
    canvas, followed = painted(slopes(20, 20), matrix)
    assert not canvas.any()
    np.testing.assert_array_equal(followed, matrix)


def test_a_turned_picture_follows_its_matrix() -> None:
    matrix = np.array([(0.8, -0.6, 50.3), (0.6, 0.8, 5.7)])
    canvas, followed = painted(slopes(50, 50), matrix)
    np.testing.assert_array_equal(followed, matrix)
    inside = np.array([30.0, 20.0])  # of the picture, an edge coordinate
    column, row = (matrix[:, :2] @ inside + matrix[:, 2]).astype(int)
    place = np.linalg.solve(matrix[:, :2], (column + 0.5, row + 0.5) - matrix[:, 2]) - 0.5
    assert np.abs(canvas[row, column, :2] - 2 * place).max() <= 1.5


@pytest.mark.parametrize("side", [24, 48, SIZE])
@pytest.mark.parametrize("degrees", [0.0, 5.0, -30.0])
def test_tiles_of_a_mosaic_touch_without_a_seam(side: int, degrees: float) -> None:
    preprocessing, white = Preprocessing(SIZE), np.full((side, side, 3), 255, np.uint8)
    placements = mosaic_placements([white.shape[:2]] * 4, preprocessing, np.array([SIZE + 3.3, SIZE - 5.7]))
    a, b = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    turn = np.array([(a, -b, SIZE / 2 - (a - b) * SIZE), (b, a, SIZE / 2 - (a + b) * SIZE)])
    canvas = np.full((SIZE, SIZE, 3), 114, np.uint8)
    for placement in placements:
        paint(canvas, white, np.column_stack([turn[:, :2] @ placement[:, :2], turn @ [*placement[:, 2], 1]]))
    assert (canvas == 255).all()
