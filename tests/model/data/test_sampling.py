"""Which images an epoch shows and at which size, by hand-made cases and by counting."""

from __future__ import annotations

import numpy as np
import pytest

from model.data.image_set import ImageSet
from model.data.sampling import (
    batch_input_size,
    epoch_images,
    images_per_epoch,
    input_sizes,
    repeat_factors,
)


def image_set() -> ImageSet:
    """100 images: class a in all, b in 25, c in 4 (image 0 … 3), d as a crowd region only."""
    owners = [*range(100), *range(25), *range(4), 50]
    labels = [0] * 100 + [1] * 25 + [2] * 4 + [3]
    crowd = [False] * 129 + [True]
    paths = [f"{index}.jpg" for index in range(100)]
    boxes = [[1.0, 1.0, 5.0, 5.0]] * 130
    return ImageSet.from_arrays(("a", "b", "c", "d"), paths, [(9, 9)] * 100, owners, boxes, labels, is_crowd=crowd)


def test_repeat_factors_follow_the_rarest_class_of_an_image() -> None:
    factors = repeat_factors(image_set(), 0.36)
    assert factors[:4] == pytest.approx(3.0)  # sqrt(0.36 / 0.04)
    assert factors[4:25] == pytest.approx(1.2)  # sqrt(0.36 / 0.25)
    assert factors[25:] == pytest.approx(1.0)
    assert repeat_factors(image_set(), 0.04) == pytest.approx(1.0)


def test_images_without_boxes_come_once() -> None:
    empty = ImageSet.from_arrays(("a",), ["0.jpg", "1.jpg"], [(9, 9)] * 2)
    assert repeat_factors(empty, 0.5).tolist() == [1.0, 1.0]


@pytest.mark.parametrize("share", [-0.1, 1.5])
def test_a_share_out_of_range_is_named(share: float) -> None:
    with pytest.raises(ValueError, match=rf"class_balance must be in \(0, 1\], got {share}"):
        repeat_factors(image_set(), share)


def test_an_epoch_shows_each_image_as_often_as_its_factor_says() -> None:
    factors = repeat_factors(image_set(), 0.36)
    count = images_per_epoch(factors)
    assert count == 113  # 4 * 3 + 21 * 1.2 + 75, rounded up
    epochs = [epoch_images(factors, 7, epoch) for epoch in range(200)]
    shown = np.array([np.bincount(images.listed, minlength=100) for images in epochs])
    scaled = factors * count / factors.sum()
    assert (shown >= np.floor(scaled)).all() and (shown <= np.ceil(scaled)).all()
    assert shown.sum(axis=1).tolist() == [count] * 200
    np.testing.assert_allclose(shown.mean(axis=0), scaled, atol=0.15)  # 4 standard deviations of a mean of 200 coins
    assert all(sorted(images.order.tolist()) == list(range(count)) for images in epochs)


def test_an_epoch_follows_from_seed_and_number() -> None:
    factors = repeat_factors(image_set(), 0.36)
    first, again, other = (epoch_images(factors, seed, 3) for seed in (7, 7, 8))
    assert first.listed.tolist() == again.listed.tolist() and first.order.tolist() == again.order.tolist()
    assert first.order.tolist() != other.order.tolist()
    assert epoch_images(factors, 7, 4).listed.tolist() != first.listed.tolist()


def test_equal_factors_are_a_plain_shuffle() -> None:
    images = epoch_images(np.ones(11), 5, 2)
    assert images.listed.tolist() == list(range(11))
    assert images.order.tolist() == np.random.default_rng([2, 5, 2]).permutation(11).tolist()


@pytest.mark.parametrize(
    ("size", "spread", "expected"),
    [
        (320, 0.0, (320,)),
        (320, 0.09, (320,)),
        (320, 0.1, (288, 320, 352)),
        (320, 0.25, (256, 288, 320, 352, 384)),
        (64, 0.5, (32, 64, 96)),
    ],
)
def test_input_sizes_are_multiples_of_32_around_the_size(size: int, spread: float, expected: tuple[int, ...]) -> None:
    assert input_sizes(size, spread) == expected


def test_a_spread_out_of_range_is_named() -> None:
    with pytest.raises(ValueError, match=r"multi_scale must be from 0 to 0.5, got 0.6"):
        input_sizes(320, 0.6)


def test_every_few_batches_have_each_size_once_in_random_order() -> None:
    sizes = input_sizes(320, 0.25)
    drawn = [batch_input_size(sizes, 3, 1, batch) for batch in range(20)]
    assert all(sorted(drawn[start : start + 5]) == list(sizes) for start in range(0, 20, 5))
    assert len({tuple(drawn[start : start + 5]) for start in range(0, 20, 5)}) > 1
    assert drawn != [batch_input_size(sizes, 3, 2, batch) for batch in range(20)]
    assert drawn != [batch_input_size(sizes, 4, 1, batch) for batch in range(20)]
