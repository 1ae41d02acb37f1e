"""Latency: order, counts, percentiles and refusals with calls whose duration is known."""

from __future__ import annotations

import json
import time
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from model.engines import EngineOutput
from model.engines.latency import Timings, device_facts, measure_interleaved, measure_latency, require_quiet


class SleepingEngine:
    """Takes a known time; ``disturbed`` calls take twenty times as long."""

    name, runtime_version, precision, threads = "sleeping", "1.2", "int8", 2

    def __init__(self, seconds: float, disturb_every: int = 0) -> None:
        self._seconds, self._disturb_every, self.calls = seconds, disturb_every, 0

    def run(self, images: NDArray[np.uint8]) -> EngineOutput:
        self.calls += 1
        disturbed = self._disturb_every and self.calls % self._disturb_every == 0
        time.sleep(self._seconds * (20 if disturbed else 1))
        return np.zeros((1, 1, 4), np.float32), np.zeros((1, 1, 1), np.float32)


IMAGES = np.zeros((1, 3, 32, 32), np.uint8)
LAX = 1000.0  # other processes may delay a call here; where noise is not the subject it must not matter


def test_record_tells_what_was_measured() -> None:
    engines = {"fast": SleepingEngine(0.002), "slow": SleepingEngine(0.006)}
    records = measure_latency(engines, IMAGES, warmup_seconds=0.0, repeats=10, spread_limit=LAX)
    fast, slow = records["fast"], records["slow"]
    assert 2.0 <= fast.min_ms <= fast.p50_ms <= fast.p90_ms <= fast.p99_ms
    assert slow.min_ms >= 6.0
    assert fast.cpu_min_ms <= fast.cpu_ms < 2.0  # asleep, hence hardly any processor time
    assert (fast.runtime, fast.runtime_version, fast.precision, fast.threads) == ("sleeping", "1.2", "int8", 2)
    assert (fast.batch, fast.input_size, fast.repeats, fast.repetitions) == (1, 32, 10, 1)
    assert fast.interleaved_with == ("slow",) and fast.measured and not fast.noisy
    assert not fast.includes_preprocessing and not fast.includes_postprocessing
    assert json.loads(json.dumps(fast.to_json()))["device"]["device"] == device_facts().device
    assert engines["fast"].calls == engines["slow"].calls == 11  # one call each to warm up


def test_calls_take_turns_in_changing_order() -> None:
    order: list[str] = []
    calls = {name: (lambda name=name: order.append(name)) for name in ("a", "b")}
    measure_interleaved(calls, warmup_seconds=0.0, repeats=40)  # type: ignore[arg-type]
    rounds = ["".join(order[index : index + 2]) for index in range(2, len(order), 2)]
    assert set(rounds) == {"ab", "ba"} and len(rounds) == 40


def test_warm_up_lasts_as_asked() -> None:
    engine = SleepingEngine(0.01)
    start = time.perf_counter()
    measure_interleaved({"one": lambda: engine.run(IMAGES)}, warmup_seconds=0.1, repeats=2)
    assert time.perf_counter() - start >= 0.12
    assert engine.calls >= 4


def test_spread_is_that_of_the_slow_calls() -> None:
    wall = np.array([10.0] * 8 + [15.0] * 3)
    assert Timings(wall, wall).spread == pytest.approx(0.5)


def test_noise_is_measured_again_and_then_refused() -> None:
    engine = SleepingEngine(0.001, disturb_every=4)
    records = measure_latency({"noisy": engine}, IMAGES, warmup_seconds=0.0, repeats=20, spread_limit=0.5)
    assert records["noisy"].repetitions == 2 and records["noisy"].noisy
    assert engine.calls == 42
    with pytest.raises(ValueError, match="latency of noisy spreads by"):
        require_quiet(records.values())
    require_quiet([replace(records["noisy"], noisy=False)])


@pytest.mark.parametrize(("repeats", "warmup", "names"), [(1, 0.0, "a"), (5, -1.0, "a"), (5, 0.0, "")])
def test_measurements_that_mean_nothing_are_refused(repeats: int, warmup: float, names: str) -> None:
    with pytest.raises(ValueError):
        measure_interleaved({name: lambda: None for name in names}, warmup_seconds=warmup, repeats=repeats)


def test_device_is_named() -> None:
    facts = device_facts()
    assert facts.device and facts.kind == "cpu" and facts.cores >= 1 and facts.load >= 0
