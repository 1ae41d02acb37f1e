"""The perceptual hash: what it survives, what it tells apart, and the search."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from model.data.images import read_image
from model.data.near_duplicates import (
    COMPARED_AT_ONCE,
    NEAR_BITS,
    hash_text,
    hashes_from_text,
    nearest,
    perceptual_hash,
)

PAIRS = (("IMG_8434", "IMG_8436"), ("IMG_3156", "IMG_3157"), ("IMG_3154", "IMG_3155"))
"""The aquarium's near-duplicates across its splits: one second apart, the fish have moved."""


def hash_of(path: Path) -> int:
    return perceptual_hash(read_image(path))


@pytest.fixture(scope="module")
def photograph(shared: Path) -> NDArray[np.uint8]:
    return read_image(shared / "data/aquarium/images/IMG_8434.jpg")


@pytest.mark.parametrize("pair", PAIRS)
def test_frames_of_one_scene_are_near(shared: Path, pair: tuple[str, str]) -> None:
    first, second = (hash_of(shared / f"data/aquarium/images/{name}.jpg") for name in pair)
    assert 0 < (first ^ second).bit_count() <= NEAR_BITS


def test_unrelated_photographs_are_not_near(shared: Path) -> None:
    """The sets have nothing in common: of all pairs across them none may be near, by a margin."""
    sets = [sorted((shared / f"data/{name}/images").glob("*.jpg"))[::12] for name in ("aquarium", "bccd")]
    sets.append(sorted((shared / "data/pretrain_general/images").rglob("*.jpg"))[::12])
    hashes = [np.array([hash_of(path) for path in paths], np.uint64) for paths in sets]
    assert all(len(one) > 25 for one in hashes)
    for index, one in enumerate(hashes):
        others = np.concatenate(hashes[:index] + hashes[index + 1 :])
        assert nearest(one, others).bits.min() >= NEAR_BITS + 4


@pytest.mark.parametrize("quality", [95, 30])
@pytest.mark.parametrize("scale", [0.4, 1.0, 1.5])
def test_another_size_and_quality_are_near(photograph: NDArray[np.uint8], quality: int, scale: float) -> None:
    copy = cv2.resize(photograph, None, fx=scale, fy=scale, interpolation=cv2.INTER_LINEAR)
    _, content = cv2.imencode(".jpg", copy, [cv2.IMWRITE_JPEG_QUALITY, quality])
    again = np.asarray(cv2.imdecode(content, cv2.IMREAD_COLOR), np.uint8)
    assert (perceptual_hash(again) ^ perceptual_hash(photograph)).bit_count() <= 4


def test_grey_is_the_same_as_colour_that_is_grey(photograph: NDArray[np.uint8]) -> None:
    grey = photograph[:, :, 1].copy()
    assert perceptual_hash(grey) == perceptual_hash(np.repeat(grey[:, :, None], 3, axis=2))


def test_half_of_the_bits_are_set(photograph: NDArray[np.uint8]) -> None:
    assert perceptual_hash(photograph).bit_count() == 32
    assert perceptual_hash(np.full((40, 60, 3), 7, np.uint8)) == 0
    assert perceptual_hash(photograph[:3, :5]) < 2**64  # tiny pictures have a hash too


def test_search_equals_counting_one_by_one() -> None:
    random = np.random.default_rng(0)
    hashes, among = (random.integers(0, 2**64, count, np.uint64) for count in (7, 50))
    found = nearest(hashes, among)
    counted = np.array([[(int(a) ^ int(b)).bit_count() for b in among] for a in hashes])
    np.testing.assert_array_equal(found.bits, counted.min(axis=1))
    np.testing.assert_array_equal(found.row, counted.argmin(axis=1))


def test_search_in_parts_gives_the_same() -> None:
    among = np.random.default_rng(1).integers(0, 2**64, COMPARED_AT_ONCE // 2, np.uint64)
    found = nearest(among[[5, 3, 8]] ^ np.uint64(1), among)  # two at a time
    assert (found.bits.tolist(), found.row.tolist()) == ([1, 1, 1], [5, 3, 8])


def test_nothing_is_near_to_nothing() -> None:
    found = nearest(np.array([1], np.uint64), np.array([], np.uint64))
    assert (found.bits.tolist(), found.row.tolist()) == ([65], [-1])
    assert len(nearest(np.array([], np.uint64), np.array([1], np.uint64)).bits) == 0


def test_text_and_back() -> None:
    values = [0, 1, 2**64 - 1]
    assert hashes_from_text([hash_text(value) for value in values]).tolist() == values
    assert hash_text(255) == "00000000000000ff"
