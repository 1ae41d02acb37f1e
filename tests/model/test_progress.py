"""What a training tells while it runs."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

import pytest
from noise_training import CONFIG, falling_score, run

from model import progress
from model.progress import EpochProgress, duration


class Clock:
    """Seconds that pass only when told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(progress.time, "monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def test_a_long_epoch_tells_losses_speed_and_time_left_now_and_then(
    clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="model"), EpochProgress("epoch 1/2", 0, 100, 100, batch_size=8) as told:
        for _ in range(10):
            clock.now += 100
            told.step({"loss": 1.5, "loss_iou": 0.25})
    assert caplog.messages == ["epoch 1/2 batch 6/100 loss 1.500 loss_iou 0.250 0.1 images/s 5:23:20 left"]


def test_a_short_epoch_and_a_quiet_process_tell_nothing(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="model"):
        for quiet, seconds in ((False, 1), (True, 1000)):
            with EpochProgress("epoch 1/2", 0, 100, 100, batch_size=8, quiet=quiet) as told:
                for _ in range(5):
                    clock.now += seconds
                    told.step({"loss": 1.5})
    assert caplog.messages == []


def test_speed_counts_the_steps_of_this_process(clock: Clock) -> None:
    told = EpochProgress("epoch 1/2", done=50, batches=100, steps_after=0, batch_size=8)
    assert (told.images_per_second, told.seconds_per_step) == (0, 0)
    for _ in range(4):
        clock.now += 0.5
        told.step({})
    clock.now += 100  # the evaluation is no part of it
    assert (told.images_per_second, told.seconds_per_step) == (16, 0.5)


def test_on_a_terminal_there_is_a_bar(
    clock: Clock, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with caplog.at_level(logging.INFO, logger="model"), EpochProgress("epoch 1/2", 0, 2, 2, batch_size=8) as told:
        for _ in range(2):
            clock.now += 1000
            told.step({"loss": 1.5})
        assert told._bar is not None and told._bar.n == 2
        assert told._bar.postfix == "loss 1.500 0.0 images/s 33:20 left"
    assert caplog.messages == []


def test_each_epoch_has_one_line_with_all_that_counts(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="model"):
        run(tmp_path, evaluate=falling_score())
    lines = [message for message in caplog.messages if message.startswith("epoch ")]
    assert [line.split()[1] for line in lines] == ["1/3", "2/3", "3/3"]
    for word in ("step 8", "learning_rate ", "loss ", "loss_error ", "map50_95 0.3", "images/s ", " left"):
        assert word in lines[1], word
    assert lines[2].endswith(" 0:00 left")


def test_time_left_counts_the_evaluations_to_come(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    seconds = iter(range(0, 1000, 100))  # each evaluation takes from one reading of the clock to the next
    monkeypatch.setattr("model.training.time.perf_counter", lambda: next(seconds))
    scores: Any = falling_score()
    with caplog.at_level(logging.INFO, logger="model"):
        run(tmp_path, CONFIG, evaluate=scores)
    lines = [message for message in caplog.messages if message.startswith("epoch ")]
    assert [line.rsplit(" ", 2)[1] for line in lines] == ["3:20", "1:40", "0:00"]  # steps take no time on this clock


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (3599, "59:59"), (36061, "10:01:01")])
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text
