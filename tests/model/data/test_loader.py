"""Batches: complete, repeatable, and the same for any number of workers."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from model import processes
from model.data.augmentation import AugmentationConfig
from model.data.image_set import ImageSet
from model.data.loader import Batch, TrainingLoader, evaluation_batches
from model.preprocessing import Preprocessing

PREPROCESSING = Preprocessing(64)
LIVELY = AugmentationConfig(mosaic_probability=0.5, mixup_probability=0.3, rotation_degrees=5.0)
SIZES = [(80 + 3 * index, 50 + 2 * (index % 5)) for index in range(11)]


def image_set(count: int = 11) -> ImageSet:
    """Image i has i % 3 boxes; the last box of each image that has two is a crowd."""
    owners = np.repeat(np.arange(count), np.arange(count) % 3)
    second = np.append(False, owners[1:] == owners[:-1])
    boxes = np.stack([owners + 2.0, owners * 0 + 5.0 + 9 * second, owners * 0 + 30.0, owners * 0 + 20.0], axis=1)
    paths = [f"target/{index}.jpg" for index in range(count)]
    scores = np.where(owners % 2, 0.7, 1.0)
    return ImageSet.from_arrays(
        ("a", "b"), paths, SIZES[:count], owners, boxes, owners % 2, scores=scores, is_crowd=second
    )


class Pictures:
    """Opens made-up pictures, and counts how often."""

    def __init__(self) -> None:
        self.opened: Counter[str] = Counter()

    def __call__(self, path: str) -> NDArray[np.uint8]:
        self.opened[path] += 1
        index = int(path.removeprefix("target/").removesuffix(".jpg"))
        width, height = SIZES[index]
        return np.random.default_rng(index).integers(0, 256, (height, width, 3), dtype=np.uint8)


def loader(count: int = 11, batch_size: int = 3, seed: int = 5, **options: int) -> TrainingLoader:
    return TrainingLoader(image_set(count), Pictures(), PREPROCESSING, batch_size, LIVELY, seed, **options)


def assert_equal(first: list[Batch], second: list[Batch]) -> None:
    assert len(first) == len(second)
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one.images, other.images)
        for name in ("boxes_xyxy", "labels", "weights", "mask"):
            assert torch.equal(getattr(one.targets, name), getattr(other.targets, name))
        np.testing.assert_array_equal(one.image_ids, other.image_ids)


@pytest.mark.parametrize(
    "options", [{"workers": 1}, {"workers": 2}, {"cache_megabytes": 1}, {"workers": 2, "cache_megabytes": 1}]
)
def test_batches_do_not_depend_on_workers_or_cache(options: dict[str, int]) -> None:
    plain, other = loader(), loader(**options)
    for epoch in (0, 1):
        assert_equal(list(plain.epoch(epoch)), list(other.epoch(epoch)))


@pytest.mark.parametrize("workers", [0, 2])
def test_epoch_can_be_resumed_at_any_batch(workers: int) -> None:
    whole = list(loader().epoch(4))
    resumed = loader(workers=workers)
    broken_off = resumed.epoch(4)
    next(broken_off)
    assert_equal(list(resumed.epoch(4, start_batch=1)), whole[1:])
    assert list(resumed.epoch(4, start_batch=resumed.batches_per_epoch)) == []


def test_seeds_and_epochs_differ() -> None:
    first, epoch, seed = list(loader().epoch(0)), list(loader().epoch(1)), list(loader(seed=6).epoch(0))
    assert not torch.equal(first[0].images, epoch[0].images)
    assert not torch.equal(first[0].images, seed[0].images)
    assert first[0].image_ids.tolist() != epoch[0].image_ids.tolist()


def test_workers_leave_the_training_random_state_alone() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    list(loader(workers=1).epoch(0))
    assert torch.equal(torch.get_rng_state(), before)


def test_each_image_comes_at_most_once_and_the_rest_is_left_out() -> None:
    batches = list(loader().epoch(0))
    ids = np.concatenate([batch.image_ids for batch in batches])
    assert [len(batch) for batch in batches] == [3, 3, 3]
    assert len(set(ids.tolist())) == 9


def test_set_smaller_than_a_batch_is_one_batch() -> None:
    small = loader(count=2, batch_size=8)
    assert small.batches_per_epoch == 1
    assert [len(batch) for batch in small.epoch(0)] == [2]


def test_plain_batch_is_preprocessing_without_crowds() -> None:
    images = image_set()
    plain = TrainingLoader(images, Pictures(), PREPROCESSING, 11, AugmentationConfig.none(), seed=0)
    batch = next(plain.epoch(0))
    assert batch.images.dtype == torch.uint8
    assert batch.targets.mask.shape == (11, 1)
    for row, image_id in enumerate(batch.image_ids):
        expected, letterbox = PREPROCESSING.apply(Pictures()(images.path(image_id)))
        np.testing.assert_array_equal(batch.images[row].numpy(), expected)
        boxes = images.boxes(image_id)
        labelled = ~boxes.is_crowd
        mask = batch.targets.mask[row]
        found = batch.targets.boxes_xyxy[row][mask].numpy()
        # float32 coordinates below 64 pixels
        np.testing.assert_allclose(found, letterbox.to_input(boxes.boxes_xyxy[labelled]), atol=1e-5)
        assert batch.targets.labels[row][mask].tolist() == boxes.labels[labelled].tolist()
        np.testing.assert_array_equal(batch.targets.weights[row][mask].numpy(), boxes.weights[labelled])


def test_mosaic_can_be_switched_off_for_an_epoch() -> None:
    mosaics = replace(AugmentationConfig.none(), mosaic_probability=1.0)
    images = image_set()
    batches = TrainingLoader(images, Pictures(), PREPROCESSING, 11, mosaics, seed=0)
    plain = TrainingLoader(images, Pictures(), PREPROCESSING, 11, AugmentationConfig.none(), seed=0)
    assert torch.equal(next(batches.epoch(0, mosaic_enabled=False)).images, next(plain.epoch(0)).images)
    assert not torch.equal(next(batches.epoch(0)).images, next(plain.epoch(0)).images)


def test_batch_without_any_box_has_one_masked_row() -> None:
    pictures = ImageSet.from_arrays(("a",), ["target/0.jpg", "target/1.jpg"], SIZES[:2])
    batch = next(TrainingLoader(pictures, Pictures(), PREPROCESSING, 2, LIVELY, seed=0).epoch(0))
    assert batch.targets.boxes_xyxy.shape == (2, 1, 4)
    assert not batch.targets.mask.any()


def test_cache_opens_each_picture_once_and_obeys_its_budget() -> None:
    pictures, images = Pictures(), image_set()
    cached = TrainingLoader(images, pictures, PREPROCESSING, 3, LIVELY, 0, cache_megabytes=1)
    for epoch in range(3):
        list(cached.epoch(epoch))
    assert max(pictures.opened.values()) == 1
    plain = Pictures()
    for epoch in range(3):
        list(TrainingLoader(images, plain, PREPROCESSING, 3, LIVELY, 0).epoch(epoch))
    assert max(plain.opened.values()) > 1


def test_processes_share_each_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes together see the pictures that one process sees, augmented alike; a batch need not be even."""
    alone = list(loader(batch_size=5).epoch(2))
    monkeypatch.setattr(processes, "count", lambda: 2)
    for rank in (0, 1):
        monkeypatch.setattr(processes, "rank", lambda rank=rank: rank)
        share = list(loader(batch_size=5).epoch(2))
        assert [len(batch) for batch in share] == [3 - rank] * 2
        for batch, whole in zip(share, alone, strict=True):
            assert torch.equal(batch.images, whole.images[rank::2])
            assert batch.image_ids.tolist() == whole.image_ids[rank::2].tolist()


def test_batch_too_small_for_the_processes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "count", lambda: 4)
    with pytest.raises(ValueError, match=r"batch_size 3 .* leave nothing for some of 4 training processes"):
        loader(batch_size=3)


@pytest.mark.parametrize("workers", [0, 1])
def test_picture_of_another_size_is_named(workers: int) -> None:
    images = ImageSet.from_arrays(("a",), ["target/0.jpg"], [(70, 50)])
    wrong = TrainingLoader(images, Pictures(), PREPROCESSING, 1, LIVELY, 0, workers=workers)
    with pytest.raises(ValueError, match=r"^image target/0\.jpg is 80x50 pixels, the dataset says 70x50"):
        next(wrong.epoch(0))


class Unreadable(Exception):
    """Stands for the pipeline's own error."""


def refuse(path: str) -> NDArray[np.uint8]:
    raise Unreadable(f"{path} is gone")


@pytest.mark.parametrize("workers", [0, 1])
def test_error_of_open_image_comes_out_unchanged(workers: int) -> None:
    broken = TrainingLoader(image_set(), refuse, PREPROCESSING, 3, LIVELY, 0, workers=workers)
    with pytest.raises(Unreadable, match=r"^target/\d+\.jpg is gone$"):
        next(broken.epoch(0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "loader.batch_size must be at least 1, got 0"),
        ({"seed": -1}, "loader.seed must be at least 0, got -1"),
        ({"count": 0}, "a training set of 0 images leave nothing"),
    ],
)
def test_settings_out_of_range_are_named(options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        loader(**options)


@pytest.mark.parametrize(("batch_size", "threads"), [(4, 1), (3, 2), (50, 1)])
def test_evaluation_sees_every_image_once_in_order(batch_size: int, threads: int) -> None:
    images = image_set()
    seen = 0
    for pictures, letterboxes, indices in evaluation_batches(images, Pictures(), PREPROCESSING, batch_size, threads):
        assert pictures.shape[0] == len(letterboxes) == len(indices) <= batch_size
        for picture, letterbox, index in zip(pictures, letterboxes, indices, strict=True):
            expected, where = PREPROCESSING.apply(Pictures()(images.path(index)))
            np.testing.assert_array_equal(picture, expected)
            assert (letterbox, index) == (where, seen)
            seen += 1
    assert seen == len(images)


def test_evaluation_of_an_empty_set_gives_nothing() -> None:
    assert list(evaluation_batches(image_set(0), Pictures(), PREPROCESSING, 4)) == []
