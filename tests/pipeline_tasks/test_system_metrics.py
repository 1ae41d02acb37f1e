"""Samples of the machine beside a step's work."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from pipeline_tasks import system_metrics


def test_samples_are_taken_while_the_block_runs_and_not_after(tmp_path: Path) -> None:
    path = tmp_path / "system" / "distill.jsonl"
    with system_metrics.sampled(path, 0.05):
        end = time.monotonic() + 20
        while not _has_two_lines(path) and time.monotonic() < end:  # work, so that a processor is busy
            sum(range(1000))
    samples = [json.loads(line) for line in path.read_text().splitlines()]
    time.sleep(0.15)
    assert len(path.read_text().splitlines()) == len(samples) >= 2
    for sample in samples:
        assert 0 <= sample["cpu_utilization_percentage"] <= 100
        assert 10 < sample["step_memory_megabytes"] < sample["system_memory_usage_megabytes"]
        assert sample["disk_available_megabytes"] > 0
    assert samples[-1]["time_ms"] > samples[0]["time_ms"]


def _has_two_lines(path: Path) -> bool:
    return path.exists() and path.read_bytes().count(b"\n") >= 2


def test_a_short_step_or_a_zero_interval_leaves_nothing(tmp_path: Path) -> None:
    for seconds in (60.0, 0.0):
        with system_metrics.sampled(tmp_path / "none.jsonl", seconds):
            pass
    assert list(tmp_path.iterdir()) == []


def test_the_interval_is_the_environments(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    for text, seconds in (("", 10.0), ("2.5", 2.5), ("0", 0.0), ("-1", 0.0), ("often", 10.0)):
        monkeypatch.setenv(system_metrics.INTERVAL_VARIABLE, text)
        assert system_metrics.interval() == seconds
    assert "'often', which is no number of seconds" in caplog.text


def test_what_a_gpu_does_not_tell_is_left_out() -> None:
    assert system_metrics.parse_gpu("0, 35, 1024, 71.25") == {
        "gpu_0_utilization_percentage": 35.0, "gpu_0_memory_usage_megabytes": 1024.0, "gpu_0_power_usage_watts": 71.25
    }  # fmt: skip
    assert system_metrics.parse_gpu("1, 0, 3, [N/A]") == {
        "gpu_1_utilization_percentage": 0.0, "gpu_1_memory_usage_megabytes": 3.0
    }  # fmt: skip
