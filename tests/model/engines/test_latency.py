"""Latency: order, counts, percentiles and refusals with calls whose duration is known."""

from __future__ import annotations

import json
import time
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from model.engines import EngineOutput, latency
from model.engines.gpu_facts import GpuFacts, parse_gpu_facts
from model.engines.latency import Timings, device_facts, measure_interleaved, measure_latency, require_quiet


class SleepingEngine:
    """Takes a known time; ``disturbed`` calls take twenty times as long."""

    name, runtime_version, precision, threads = "sleeping", "1.2", "int8", 2
    fixed_batch: int | None = None

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
    told = json.loads(json.dumps(fast.to_json()))
    assert told["device"]["device"] == told["device_after"]["device"] == device_facts().device
    assert told["device"]["gpu"] is None and told["gpu_p50_ms"] is None
    assert told["attempt_spreads"] == [fast.spread]
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


@pytest.mark.parametrize("attempts", [1, 2, 3])
def test_noise_is_measured_again_and_then_refused(attempts: int) -> None:
    engine = SleepingEngine(0.001, disturb_every=4)
    (record,) = measure_latency(
        {"noisy": engine}, IMAGES, warmup_seconds=0.0, repeats=20, spread_limit=0.5, attempts=attempts
    ).values()
    assert record.repetitions == attempts and record.noisy
    assert engine.calls == 21 * attempts
    assert len(record.attempt_spreads) == attempts and record.spread == min(record.attempt_spreads)
    with pytest.raises(ValueError, match=f"latency of noisy spreads by .* in the quietest of {attempts} attempts"):
        require_quiet([record])
    require_quiet([replace(record, noisy=False)])


class Clock:
    """In place of the module `time`: only sleeping takes time, however busy the machine is."""

    def __init__(self) -> None:
        self.now = 0.0

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def perf_counter(self) -> float:
        return self.now

    process_time = time.process_time


def test_a_quiet_attempt_ends_the_noise_and_nothing_is_averaged(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(latency, "time", clock)
    monkeypatch.setattr(time, "sleep", clock.sleep)
    engine = SleepingEngine(0.004, disturb_every=4)

    def run(images: NDArray[np.uint8]) -> EngineOutput:
        engine._disturb_every = 4 if engine.calls < 13 else 0  # the first attempt: one call to warm up and twelve timed
        return SleepingEngine.run(engine, images)

    engine.run = run  # type: ignore[method-assign]
    (record,) = measure_latency(
        {"one": engine}, IMAGES, warmup_seconds=0.0, repeats=12, spread_limit=10.0, attempts=5
    ).values()
    assert (record.repetitions, record.noisy) == (2, False)
    assert record.attempt_spreads[0] > 10.0 > record.attempt_spreads[1] == record.spread


def test_engines_of_different_sizes_are_measured_together() -> None:
    engines = {"small": SleepingEngine(0.001), "large": SleepingEngine(0.001)}
    images = {"small": IMAGES, "large": np.zeros((2, 3, 64, 64), np.uint8)}
    records = measure_latency(engines, images, warmup_seconds=0.0, repeats=3, spread_limit=LAX)
    assert [(record.input_size, record.batch) for record in records.values()] == [(32, 1), (64, 2)]


class FixedBatchEngine(SleepingEngine):
    """Computes full batches only, as a file with a fixed batch does."""

    def __init__(self, batch: int) -> None:
        super().__init__(0.0)
        self.fixed_batch, self.given = batch, set[tuple[int, ...]]()

    def run(self, images: NDArray[np.uint8]) -> EngineOutput:
        self.given.add(images.shape)
        return super().run(images)


@pytest.mark.parametrize("given", [1, 3, 9])
def test_a_fixed_batch_is_measured_full_and_recorded(given: int) -> None:
    engines = {"free": SleepingEngine(0.0), "four": FixedBatchEngine(4)}
    images = np.zeros((given, 3, 32, 32), np.uint8)
    records = measure_latency(engines, images, warmup_seconds=0.0, repeats=3, spread_limit=LAX)
    assert (records["free"].batch, records["four"].batch) == (given, 4)
    assert engines["four"].given == {(4, 3, 32, 32)}  # type: ignore[attr-defined]


class GpuEngine(SleepingEngine):
    """Tells how long each call was on the GPU: a quarter of what it took in all."""

    device_ms: float | None = None

    def run(self, images: NDArray[np.uint8]) -> EngineOutput:
        output = super().run(images)
        self.device_ms = 0.25 + self.calls
        return output


def test_a_gpu_record_holds_its_state_before_and_after_and_its_own_times(monkeypatch: pytest.MonkeyPatch) -> None:
    states = iter([gpu(1590.0, 40.0), gpu(900.0, 75.0)])
    monkeypatch.setattr(latency, "current_gpu", lambda: next(states))
    (record,) = measure_latency(
        {"one": GpuEngine(0.001)}, IMAGES, warmup_seconds=0.0, repeats=3, spread_limit=LAX, kind="gpu"
    ).values()
    assert (record.device.device, record.device.kind, record.device.cores >= 1) == ("Tesla T4", "gpu", True)
    assert record.device.gpu and record.device_after.gpu
    assert (record.device.gpu.clock_mhz, record.device_after.gpu.clock_mhz) == (1590.0, 900.0)
    assert record.device_after.gpu.temperature_celsius == 75.0
    assert (record.gpu_min_ms, record.gpu_p50_ms) == (2.25, 3.25)  # the call to warm up is not among them
    assert record.gpu_p99_ms == pytest.approx(4.23)


def gpu(clock_mhz: float, temperature: float) -> GpuFacts:
    line = f"Tesla T4, GPU-1, 535.1, 7.5, P0, 15360, {clock_mhz}, 1590, 5001, {temperature}, 68.1, 70, 99"
    return parse_gpu_facts(line)


def test_no_attempt_is_refused() -> None:
    with pytest.raises(ValueError, match="latency_attempts must be at least 1, got 0"):
        measure_latency({"a": SleepingEngine(0.0)}, IMAGES, attempts=0)


@pytest.mark.parametrize(("repeats", "warmup", "names"), [(1, 0.0, "a"), (5, -1.0, "a"), (5, 0.0, "")])
def test_measurements_that_mean_nothing_are_refused(repeats: int, warmup: float, names: str) -> None:
    with pytest.raises(ValueError):
        measure_interleaved({name: lambda: None for name in names}, warmup_seconds=warmup, repeats=repeats)


def test_device_is_named() -> None:
    facts = device_facts()
    assert facts.device and facts.kind == "cpu" and facts.cores >= 1 and facts.load >= 0
