"""Batches of random input sizes, and epochs in which rare classes come more often."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from model import processes
from model.data.augmentation import AugmentationConfig
from model.data.image_set import ImageSet
from model.data.loader import Batch, TrainingLoader
from model.data.sampling import batch_input_size, input_sizes
from model.preprocessing import Preprocessing

SIZE, BOX_XYWH = 128, (40, 20, 50, 70)  # pixels of pictures of 160 x 160
LIVELY = AugmentationConfig(mosaic_probability=0.5, mixup_probability=0.3)


def open_image(path: str) -> NDArray[np.uint8]:
    """Black, with a white box; how white tells which picture it is."""
    x, y, width, height = BOX_XYWH
    picture = np.zeros((160, 160, 3), np.uint8)
    picture[y : y + height, x : x + width] = 255 - int(path.removesuffix(".jpg"))
    return picture


def image_set(count: int = 12) -> ImageSet:
    """Class b in the first picture only, class a in all others."""
    labels = [1] + [0] * (count - 1)
    paths, boxes = [f"{index}.jpg" for index in range(count)], [BOX_XYWH] * count
    return ImageSet.from_arrays(("a", "b"), paths, [(160, 160)] * count, range(count), boxes, labels)


def loader(augmentation: AugmentationConfig = LIVELY, batch_size: int = 2, **options: Any) -> TrainingLoader:
    return TrainingLoader(image_set(), open_image, Preprocessing(SIZE), batch_size, augmentation, 5, **options)


def assert_equal(first: list[Batch], second: list[Batch]) -> None:
    assert len(first) == len(second)
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one.images, other.images)
        for name in ("boxes_xyxy", "labels", "weights", "mask"):
            assert torch.equal(getattr(one.targets, name), getattr(other.targets, name))
        assert one.image_ids.tolist() == other.image_ids.tolist()


def test_each_batch_has_its_size_and_its_boxes_lie_on_their_objects() -> None:
    batches = list(loader(AugmentationConfig.none(), multi_scale=0.5).epoch(3))
    sizes = [batch.images.shape[-1] for batch in batches]
    assert sizes == [batch_input_size(input_sizes(SIZE, 0.5), 5, 3, number) for number in range(6)]
    assert len(set(sizes)) > 3
    for batch, size in zip(batches, sizes, strict=True):
        assert batch.images.shape == (2, 3, size, size)
        left, top, width, height = (value * size / 160 for value in BOX_XYWH)
        expected = torch.tensor([left, top, left + width, top + height])
        torch.testing.assert_close(batch.targets.boxes_xyxy[:, 0], expected.expand(2, 4), atol=1e-4, rtol=0)
        rows = torch.arange(size) + 0.5
        inside = ((rows > top) & (rows < top + height))[:, None] & ((rows > left) & (rows < left + width))
        bright = batch.images[0, 0] > 120
        assert (bright != inside).float().mean() < 2.5 / size  # a rim of half a pixel, blurred by the resize


@pytest.mark.parametrize("options", [{"multi_scale": 0.5}, {"class_balance": 0.9}])
def test_batches_do_not_depend_on_workers_or_on_where_an_epoch_is_resumed(options: dict[str, float]) -> None:
    whole = list(loader(**options).epoch(1))
    assert_equal(list(loader(**options, workers=2, cache_megabytes=1).epoch(1)), whole)
    assert_equal(list(loader(**options).epoch(1, start_batch=2)), whole[2:])


def test_the_closing_epochs_have_the_input_size_and_no_mixup() -> None:
    lively = replace(AugmentationConfig.none(), mosaic_probability=1.0, mixup_probability=1.0)
    closing = list(loader(lively, multi_scale=0.5).epoch(0, mosaic_enabled=False))
    plain = list(loader(AugmentationConfig.none()).epoch(0))
    assert {batch.images.shape[-1] for batch in closing} == {SIZE}
    assert [batch.targets.mask.sum().item() for batch in closing] == [2] * 6
    assert [batch.image_ids.tolist() for batch in closing] == [batch.image_ids.tolist() for batch in plain]


def test_all_processes_draw_the_same_size(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = [batch.images.shape[-1] for batch in loader(multi_scale=0.5).epoch(0)]
    monkeypatch.setattr(processes, "count", lambda: 2)
    for rank in (0, 1):
        monkeypatch.setattr(processes, "rank", lambda rank=rank: rank)
        assert [batch.images.shape[-1] for batch in loader(multi_scale=0.5).epoch(0)] == alone


def test_a_rare_class_comes_more_often_and_is_augmented_anew_each_time() -> None:
    balanced = loader(replace(AugmentationConfig.none(), translation=0.2), batch_size=1, class_balance=0.75)
    assert balanced.batches_per_epoch == 14  # sqrt(0.75 / (1 / 12)) = 3 and 11 * 1
    batches = list(balanced.epoch(0))
    counts = Counter(int(batch.image_ids[0]) for batch in batches)
    assert counts == {0: 3, **dict.fromkeys(range(1, 12), 1)}
    shown = [batch.targets.boxes_xyxy[0, 0].tolist() for batch in batches if batch.image_ids[0] == 0]
    assert len({tuple(box) for box in shown}) == 3


def test_partners_in_a_mosaic_are_balanced_too() -> None:
    mosaics = replace(AugmentationConfig.none(), mosaic_probability=1.0)

    def share_of_b(**options: float) -> float:
        batches = [batch for epoch in range(30) for batch in loader(mosaics, batch_size=12, **options).epoch(epoch)]
        labels = torch.cat([batch.targets.labels[batch.targets.mask] for batch in batches])
        return labels.float().mean().item()

    assert share_of_b() == pytest.approx(1 / 12, abs=0.03)
    assert share_of_b(class_balance=0.75) == pytest.approx(3 / 14, abs=0.03)
