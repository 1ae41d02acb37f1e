"""Gradient accumulation: k batches of B images teach what one batch of k * B images does."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from noise_training import CONFIG, Batches, compute_loss, run
from torch import Tensor, nn

import model
from model.batch_source import BatchGroups
from model.data.loader import Batch
from model.freezing import eval_mode
from model.loss import DetectionLoss, Targets, global_normalizer, recorded_normalizers
from model.training import train
from model.training_step import ComputeLoss, Learner

BOXES = (3, 0, 1, 5, 2, 1)  # of each of the six pictures: every part of a batch has another normaliser


def pictures(indices: list[int]) -> Batch:
    """Some of six pictures of noise with random boxes, padded to the fullest of those asked for."""
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (6, 3, 64, 64), dtype=np.uint8)
    corners = np.sort(random.uniform(0, 64, (6, 5, 2, 2)), axis=2).reshape(6, 5, 4)
    labels = random.integers(0, 2, (6, 5))
    width = max(1, max(BOXES[index] for index in indices))
    mask = np.arange(width) < np.array([BOXES[index] for index in indices])[:, None]
    targets = Targets(
        torch.from_numpy(corners[indices, :width] * mask[..., None]).double(),
        torch.from_numpy(labels[indices, :width] * mask),
        torch.from_numpy(mask.astype(np.float64)),
        torch.from_numpy(mask),
    )
    return Batch(torch.from_numpy(images[indices]), targets, np.array(indices))


def detection(
    trained: nn.Module, images: Tensor, targets: Targets, progress: float
) -> tuple[Tensor, dict[str, Tensor]]:
    (boxes_xyxy, scores), raw = trained(images.double())
    parts = DetectionLoss(2)(raw, boxes_xyxy, scores, targets)
    return parts.total, {"classification": parts.classification, "iou": parts.iou, "distribution": parts.distribution}


def gradients(compute: ComputeLoss, batches: list[Batch]) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Gradients of all parameters in float64 and the losses, with norms that stand still."""
    torch.manual_seed(0)
    detector = model.build("pico", 2).double()
    options: dict[str, Any] = {"weight_decay": 0.0, "ema_decay": 0.0, "gradient_clip_norm": 0.0}
    learner = Learner(detector, compute, **options, precision="float32", device=torch.device("cpu"))
    learner.train_mode()
    eval_mode(detector, ["backbone", "neck", "heads"])
    losses = learner.step(batches, learning_rate=1e-3, update=1)
    return {n: p.grad for n, p in detector.named_parameters() if p.grad is not None}, losses


@pytest.mark.parametrize("parts", [[[0, 1], [2, 3], [4, 5]], [[0, 1, 2, 3], [4, 5]], [[1], [0, 2, 3, 4, 5]]])
def test_gradients_and_losses_equal_those_of_the_whole_batch(parts: list[list[int]]) -> None:
    whole, losses_of_whole = gradients(detection, [pictures([0, 1, 2, 3, 4, 5])])
    joint, losses = gradients(detection, [pictures(part) for part in parts])
    assert whole.keys() == joint.keys()
    for name, gradient in whole.items():
        torch.testing.assert_close(joint[name], gradient, rtol=1e-9, atol=1e-12)  # float64, another order of sums
    assert losses == pytest.approx(losses_of_whole, rel=1e-6)  # told in float32


def test_batches_without_any_object_divide_by_one_all_together() -> None:
    whole, _ = gradients(detection, [pictures([1, 1])])
    joint, _ = gradients(detection, [pictures([1]), pictures([1])])
    for name, gradient in whole.items():
        torch.testing.assert_close(joint[name], gradient, rtol=1e-9, atol=1e-12)


def test_a_loss_without_a_normaliser_is_averaged() -> None:
    def brightness(
        trained: nn.Module, images: Tensor, targets: Targets, progress: float
    ) -> tuple[Tensor, dict[str, Tensor]]:
        (_, scores), _ = trained(images.double())
        return scores.mean(), {}

    whole, losses_of_whole = gradients(brightness, [pictures([0, 1, 2, 3])])
    joint, losses = gradients(brightness, [pictures([0, 1]), pictures([2, 3])])
    for name, gradient in whole.items():
        torch.testing.assert_close(joint[name], gradient, rtol=1e-9, atol=1e-12)
    assert losses == pytest.approx(losses_of_whole, rel=1e-6)


def test_normalisers_are_recorded_in_order_and_only_inside_the_block() -> None:
    with recorded_normalizers() as sums:
        global_normalizer(torch.tensor(0.25))
        global_normalizer(torch.tensor(7.5))
    global_normalizer(torch.tensor(3.0))
    assert [value.item() for value in sums] == [0.25, 7.5]


class Halves:
    """The batches of ``noise_training``, each in two parts."""

    batches_per_epoch = 8

    def epoch(self, epoch: int, start_batch: int = 0, mosaic_enabled: bool = True) -> Iterator[Batch]:
        whole = Batches().epoch(epoch, start_batch // 2, mosaic_enabled)
        parts = (part for batch in whole for part in (_rows(batch, slice(0, 1)), _rows(batch, slice(1, 2))))
        for place, part in enumerate(parts, start=start_batch - start_batch % 2):
            if place >= start_batch:
                yield part


def _rows(batch: Batch, rows: slice) -> Batch:
    targets = batch.targets
    parts = (targets.boxes_xyxy[rows], targets.labels[rows], targets.weights[rows], targets.mask[rows])
    return Batch(batch.images[rows], Targets(*parts), batch.image_ids[rows])


def plain_network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 16, 1, stride=2), nn.ReLU(), nn.Conv2d(16, 4, 3))


def test_a_training_in_halves_follows_the_one_in_whole_batches(tmp_path: Path) -> None:
    whole = train(plain_network(), Batches(), compute_loss, CONFIG, tmp_path / "whole")
    config = replace(CONFIG, accumulate_steps=2, batch_size=1)
    halves = train(plain_network(), Halves(), compute_loss, config, tmp_path / "halves")
    assert [row["step"] for row in halves.history] == [row["step"] for row in whole.history] == [4, 8, 12]
    assert halves.images_per_step == whole.images_per_step == 2
    for mine, other in zip(halves.history, whole.history, strict=True):
        assert mine == pytest.approx(other, rel=1e-3)  # float32; AdamW magnifies differences of small gradients


def test_more_batches_than_an_epoch_has_are_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    result = run(tmp_path, replace(CONFIG, accumulate_steps=9))
    assert (result.total_steps, result.images_per_step) == (3, 8)
    told = "accumulate_steps 9 is more than the 4 batches of an epoch, which are used instead; lower it, or batch_size"
    assert [record.getMessage() for record in caplog.records if record.levelname == "WARNING"] == [told]


def test_resumed_in_mid_epoch_it_equals_the_unbroken_one(tmp_path: Path) -> None:
    config = replace(CONFIG, accumulate_steps=2)
    whole = run(tmp_path / "whole", config)
    answers = iter([False, False, True])
    with pytest.raises(Exception, match="after step 3 of 6"):
        run(tmp_path / "broken", config, should_stop=lambda: next(answers))
    assert run(tmp_path / "broken", config).history == whole.history


def test_groups_leave_the_rest_of_an_epoch_out_unless_it_is_all_there_is() -> None:
    groups = BatchGroups(Batches(), 3)
    assert (groups.size, groups.groups_per_epoch) == (3, 1)
    assert [[int(b.targets.labels[0, 0]) for b in group] for group in groups.epoch(0)] == [[0, 1, 2]]
    assert [[int(b.targets.labels[0, 0]) for b in group] for group in BatchGroups(Batches(), 2).epoch(0, 1)] == [[2, 3]]
    assert (BatchGroups(Batches(), 9).size, BatchGroups(Batches(), 9).groups_per_epoch) == (4, 1)
