"""Pictures of a training set: reduced while they are decoded where that is exact, kept where they come again."""

from __future__ import annotations

from collections import Counter

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from model.data.augmentation import AugmentationConfig
from model.data.image_set import ImageSet
from model.data.loader import PARTNERS_AMONG, TrainingLoader
from model.data.pictures import ReducedPictures, fitting_denominator
from model.preprocessing import Preprocessing

PREPROCESSING = Preprocessing(64)


class Files:
    """Pictures on no disk, each with a size of its own; counts what was opened and how."""

    def __init__(self, *sizes: tuple[int, int]) -> None:
        self.sizes, self.opened = sizes, Counter[tuple[str, int]]()

    def __call__(self, path: str) -> NDArray[np.uint8]:
        return self.reduced(path, 1)

    def reduced(self, path: str, denominator: int) -> NDArray[np.uint8]:
        self.opened[path, denominator] += 1
        width, height = self.sizes[int(path)]
        whole = np.random.default_rng(int(path)).integers(0, 256, (height, width, 3), dtype=np.uint8)
        smaller = (-(-width // denominator), -(-height // denominator))
        return cv2.resize(whole, smaller, interpolation=cv2.INTER_AREA).astype(np.uint8)


def image_set(*sizes: tuple[int, int]) -> ImageSet:
    """One box in each picture, in its lower right quarter; the first picture has a crowd beside it."""
    boxes = [(width / 2, height / 2, width / 4, height / 4) for width, height in sizes]
    owners = [*range(len(sizes)), 0]
    crowd = [False] * len(sizes) + [True]
    return ImageSet.from_arrays(
        ("a",),
        [str(i) for i in range(len(sizes))],
        sizes,
        owners,
        [*boxes, (0, 0, 9, 9)],
        [0] * len(owners),
        is_crowd=crowd,
    )


@pytest.mark.parametrize(
    ("size", "wanted", "denominator"),
    [
        ((640, 480), (320, 240), 2),
        ((640, 480), (321, 240), 1),  # a half is too few
        ((640, 480), (80, 60), 8),
        ((642, 480), (64, 48), 2),  # a quarter is no whole number of columns
        ((641, 480), (64, 48), 1),
        ((100, 50), (100, 50), 1),
    ],
)
def test_denominator_is_the_largest_that_is_exact_and_leaves_enough(size, wanted, denominator) -> None:
    assert fitting_denominator(size, wanted) == denominator


def test_reduced_pictures_have_the_size_and_the_boxes_of_whole_ones() -> None:
    sizes = (256, 128), (200, 100), (96, 64), (131, 200)
    files = Files(*sizes)
    whole = ReducedPictures(image_set(*sizes), files, PREPROCESSING, 0)
    reduced = ReducedPictures(image_set(*sizes), files, PREPROCESSING, 0, 0, files.reduced)
    for index in range(len(sizes)):
        one, other = whole.load(index), reduced.load(index)
        assert one.image.shape == other.image.shape
        np.testing.assert_array_equal(one.boxes_xyxy, other.boxes_xyxy)
        assert one.boxes_xyxy.shape == (1, 4)  # no crowd
        difference = np.abs(one.image.astype(int) - other.image).mean()
        assert difference == 0 or index < 2  # 96x64 and 131x200 were read as ever
    assert {key[1] for key in files.opened if key[0] in "01"} == {1, 2, 4}


def test_reduced_picture_of_another_size_is_named_with_its_whole_size() -> None:
    files = Files((256, 130))
    pictures = ReducedPictures(image_set((256, 128)), files, PREPROCESSING, 0, 0, files.reduced)
    with pytest.raises(ValueError, match=r"^image 0 is 256x130 pixels, the dataset says 256x128"):
        pictures.load(0)


def test_pictures_renewed_longest_ago_are_dropped() -> None:
    files = Files((64, 64), (64, 64), (64, 64))
    pictures = ReducedPictures(image_set(*files.sizes), files, PREPROCESSING, 0, kept=2)
    for index, renew in ((0, True), (1, True), (0, False), (2, True), (1, True), (0, True), (1, False)):
        pictures.load(index, renew)
    assert files.opened == {("0", 1): 2, ("1", 1): 1, ("2", 1): 1}


def test_mosaics_and_mixups_decode_each_picture_once_an_epoch() -> None:
    count = PARTNERS_AMONG + 70
    files = Files(*[(32, 32)] * count)
    lively = AugmentationConfig(mosaic_probability=1.0, mixup_probability=0.5)
    loader = TrainingLoader(image_set(*files.sizes), files, PREPROCESSING, 6, lively, seed=0)
    batches = list(loader.epoch(0))
    assert len(batches) == count // 6
    assert set(files.opened.values()) == {1}


def test_partners_come_from_the_latest_images_of_the_order() -> None:
    """With the first image in a corner of each mosaic, all others that show are among the last 128 of the order."""
    count = 3 * PARTNERS_AMONG
    files = Files(*[(32, 32)] * count)
    mosaics = AugmentationConfig(mosaic_probability=1.0)
    loader = TrainingLoader(image_set(*files.sizes), files, PREPROCESSING, 8, mosaics, seed=3)
    order = np.concatenate([batch.image_ids for batch in loader.epoch(1)])
    files.opened.clear()
    resumed = TrainingLoader(image_set(*files.sizes), files, PREPROCESSING, 8, mosaics, seed=3)
    next(resumed.epoch(1, start_batch=20))
    shown = {int(path) for path, _ in files.opened}
    assert set(order[160:168].tolist()) <= shown <= set(order[168 - PARTNERS_AMONG : 168].tolist())
    assert len(shown) > 20
