"""The largest batch that fits: found by trial, written down, kept."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from noise_training import CONFIG
from torch import Tensor, nn

import model
from model import batch_size, processes
from model.batch_size import (
    Trial,
    fits_in_memory,
    fitting_batch_size,
    largest_power_of_two,
    made_up_batch,
    recorded_or_tried,
    take_steps,
)
from model.loss import DetectionLoss, Targets


def compute_loss(
    trained: nn.Module, images: Tensor, targets: Targets, progress: float
) -> tuple[Tensor, dict[str, Tensor]]:
    (boxes_xyxy, scores), raw = trained(images)
    return DetectionLoss(2)(raw, boxes_xyxy, scores, targets).total, {}


def trial(**options: Any) -> Trial:
    return Trial(model.build("pico", 2), compute_loss, replace(CONFIG, **options), input_size=64, boxes=3)


@pytest.mark.parametrize(
    ("limit", "most", "expected"), [(40, 1000, 32), (64, 1000, 64), (1000, 20, 16), (1, 1000, 1), (0, 1000, 0)]
)
def test_the_largest_power_of_two_is_found_without_trying_what_is_twice_too_large(
    limit: int, most: int, expected: int
) -> None:
    tried: list[int] = []

    def fits(size: int) -> bool:
        tried.append(size)
        return size <= limit

    assert largest_power_of_two(fits, most) == expected
    assert max(tried) <= max(1, 2 * expected)


def test_the_result_is_written_down_and_not_tried_again(tmp_path: Path) -> None:
    assert recorded_or_tried(tmp_path / "state", trial(), 1000, lambda _, size: size <= 20) == 16
    assert json.loads((tmp_path / "state" / "batch_size.json").read_text()) == {"batch_size": 16}

    def never(_: Trial, size: int) -> bool:
        raise AssertionError("a second trial")

    assert recorded_or_tried(tmp_path / "state", trial(), 1000, never) == 16


def test_a_batch_is_shared_by_the_devices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "count", lambda: 4)
    assert recorded_or_tried(tmp_path, trial(), 100, lambda _, size: size <= 20) == 64  # 16 a device, 25 at most


def test_a_network_that_does_not_fit_at_all_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not even one image of 64 pixels with 3 boxes fits in the memory of cpu"):
        recorded_or_tried(tmp_path, trial(), 1000, lambda _, size: False)


def test_on_the_cpu_the_given_size_is_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="model"):
        assert fitting_batch_size(tmp_path, trial(batch_size=12), 1000) == 12
    assert caplog.messages == ["auto_batch_size needs a GPU; on the CPU batch_size 12 is kept"]
    assert list(tmp_path.iterdir()) == []


def test_a_trial_takes_real_steps_on_a_copy() -> None:
    tried = trial(accumulate_steps=3)
    before = {name: tensor.clone() for name, tensor in tried.network.state_dict().items()}
    take_steps(tried, 2)
    after = tried.network.state_dict()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []


def test_made_up_boxes_are_boxes_inside_the_input() -> None:
    batch = made_up_batch(trial(), 2)
    boxes_xyxy = batch.targets.boxes_xyxy
    assert batch.images.shape == (2, 3, 64, 64) and boxes_xyxy.shape == (2, 3, 4)
    assert (boxes_xyxy[..., 2:] > boxes_xyxy[..., :2]).all() and boxes_xyxy.min() >= 0 and boxes_xyxy.max() <= 64
    assert batch.targets.mask.all()


class Memory:
    """Stands for CUDA's memory statistics."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, free: int, reserved: int, peak: int) -> None:
        self.emptied = 0
        monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 2 * free))
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: reserved)
        monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: peak)
        monkeypatch.setattr(torch.cuda, "empty_cache", self.empty)

    def empty(self) -> None:
        self.emptied += 1


@pytest.mark.parametrize(("peak", "fits"), [(100, True), (108, True), (109, False)])
def test_a_tenth_of_the_free_memory_stays_unused(monkeypatch: pytest.MonkeyPatch, peak: int, fits: bool) -> None:
    memory = Memory(monkeypatch, free=100, reserved=20, peak=peak)
    monkeypatch.setattr(batch_size, "take_steps", lambda tried, size: None)
    assert fits_in_memory(trial(), 4) is fits
    assert memory.emptied == 1


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED")]
)
def test_running_out_of_memory_is_an_answer(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    memory = Memory(monkeypatch, free=100, reserved=0, peak=10)

    def fail(tried: Trial, size: int) -> None:
        raise error

    monkeypatch.setattr(batch_size, "take_steps", fail)
    assert not fits_in_memory(trial(), 4)
    assert memory.emptied == 1


def test_other_errors_come_out(monkeypatch: pytest.MonkeyPatch) -> None:
    Memory(monkeypatch, free=100, reserved=0, peak=10)

    def fail(tried: Trial, size: int) -> None:
        raise RuntimeError("shapes differ")

    monkeypatch.setattr(batch_size, "take_steps", fail)
    with pytest.raises(RuntimeError, match="shapes differ"):
        fits_in_memory(trial(), 4)


@pytest.mark.gpu
def test_on_a_gpu_the_size_found_trains_and_twice_the_size_does_not(tmp_path: Path) -> None:
    torch.cuda.set_per_process_memory_fraction(2**31 / torch.cuda.get_device_properties(0).total_memory)
    tried = Trial(model.build("s", 2).cuda(), compute_loss, replace(CONFIG, device="cuda"), input_size=320, boxes=20)
    size = fitting_batch_size(tmp_path, tried, 10**6)
    take_steps(tried, size)
    with pytest.raises(torch.OutOfMemoryError):
        take_steps(tried, 4 * size)
