"""Latency as it is measured on the machine that runs this, with what is needed to judge and repeat it.

Engines that are compared take turns in random order in one process: what else the machine does, and how warm it is,
then meets all of them alike. The record holds the minimum, percentiles and CPU time; averages hide what disturbed. On a
GPU the minimum is the burst of a cool chip; the percentiles tell what it holds.
"""

from __future__ import annotations

import functools
import os
import platform
import random
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from model.engines import Engine
from model.engines.gpu_facts import GpuFacts, current_gpu

DEFAULT_SPREAD_LIMIT = 0.5
ORDER_SEED = 0

DeviceKind = Literal["cpu", "gpu"]
Images = NDArray[np.uint8]


@dataclass(frozen=True)
class DeviceFacts:
    """The device and its state at one moment; None where the machine does not tell.

    device: name of the GPU, or of the processor. All but ``gpu`` tells of the processor and this process on it:
    clock_mhz is what the kernel reports for the first core; load is the mean number of runnable processes of the last
    minute.
    """

    device: str
    kind: DeviceKind
    cores: int
    instruction_sets: tuple[str, ...]
    clock_mhz: float | None
    clock_governor: str | None
    load: float
    gpu: GpuFacts | None = None


@dataclass(frozen=True)
class LatencyRecord:
    """Time of one call of an engine on one batch, measured on the named device.

    batch: images that the network really computes in the call, hence an engine's fixed batch where it has one.
    device and device_after: before and after the measurement. spread: (p90 - min) / min. noisy: the spread was above
    ``spread_limit`` in every attempt, so the figures are not to be relied on; attempt_spreads holds all of them, the
    figures are those of the quietest attempt. cpu_ms and cpu_min_ms: median and minimum processor time of the process,
    over all threads. gpu_*_ms: the network alone between two events on the GPU, without copies; None on a CPU. The wall
    times hold the copies to and from the GPU.
    """

    name: str
    device: DeviceFacts
    device_after: DeviceFacts
    runtime: str
    runtime_version: str
    precision: str
    threads: int
    batch: int
    input_size: int
    includes_preprocessing: bool
    includes_postprocessing: bool
    warmup_seconds: float
    repeats: int
    interleaved_with: tuple[str, ...]
    min_ms: float
    p50_ms: float
    p90_ms: float
    p99_ms: float
    cpu_ms: float
    cpu_min_ms: float
    gpu_min_ms: float | None
    gpu_p50_ms: float | None
    gpu_p90_ms: float | None
    gpu_p99_ms: float | None
    spread: float
    spread_limit: float
    noisy: bool
    repetitions: int
    attempt_spreads: tuple[float, ...]
    measured: bool = True

    def to_json(self) -> dict[str, object]:
        """The fields as a JSON-ready dictionary."""
        return asdict(self)


@dataclass(frozen=True)
class Timings:
    """Wall and processor time of every counted call, and its time on the GPU where calls tell it, in milliseconds."""

    wall_ms: NDArray[np.float64]
    cpu_ms: NDArray[np.float64]
    gpu_ms: NDArray[np.float64] | None = None

    @property
    def spread(self) -> float:
        """How far the slow calls are from the fastest one, as a share of it."""
        fastest = float(self.wall_ms.min())
        return (float(np.percentile(self.wall_ms, 90)) - fastest) / fastest


def measure_latency(
    engines: Mapping[str, Engine],
    images: Images | Mapping[str, Images],
    *,
    warmup_seconds: float = 1.0,
    repeats: int = 100,
    spread_limit: float = DEFAULT_SPREAD_LIMIT,
    attempts: int = 2,
    kind: DeviceKind = "cpu",
) -> dict[str, LatencyRecord]:
    """Measure engines against each other on one batch, uint8 (B, 3, S, S): inference alone, without the processing.

    images: one batch for all, or one for each by name where their input sizes differ. An engine with a fixed batch is
    called with exactly that many, the given ones repeated or cut: filled up it would work as long and look slow for
    the fewer images, in parts it would be several calls. When a spread is above the limit
    everything is measured again, ``attempts`` times at most, and the quietest measurement is kept; a record that is
    still above it is marked ``noisy`` (see ``require_quiet``). kind: which device to describe. Raises
    MissingRuntimeError for a GPU that cannot be described.
    """
    if attempts < 1:
        raise ValueError(f"latency_attempts must be at least 1, got {attempts}")
    given = images if isinstance(images, Mapping) else dict.fromkeys(engines, images)
    batches = {name: _whole_batch(given[name], engine.fixed_batch) for name, engine in engines.items()}
    calls = {name: functools.partial(_run, engine, batches[name]) for name, engine in engines.items()}
    before = device_facts(kind)
    tried: list[dict[str, Timings]] = []
    while not tried or (len(tried) < attempts and _worst(tried[-1]) > spread_limit):
        tried.append(measure_interleaved(calls, warmup_seconds=warmup_seconds, repeats=repeats))
    measurement = _Measurement(tried, before, device_facts(kind), warmup_seconds, spread_limit)
    return {name: measurement.record(name, engine, batches[name]) for name, engine in engines.items()}


def measure_interleaved(
    calls: Mapping[str, Callable[[], object]], *, warmup_seconds: float, repeats: int
) -> dict[str, Timings]:
    """Time calls that take turns, in a fresh random order each round, after a warm-up of every one of them.

    A call may return its milliseconds on the GPU as a float.
    """
    if repeats < 2:
        raise ValueError(f"gate.latency_repeats must be at least 2, got {repeats}")
    if warmup_seconds < 0:
        raise ValueError(f"latency.warmup_seconds must not be negative, got {warmup_seconds:g}")
    if not calls:
        raise ValueError("there is no engine to measure")
    for call in calls.values():
        _warm_up(call, warmup_seconds)
    wall: dict[str, list[float]] = {name: [] for name in calls}
    cpu: dict[str, list[float]] = {name: [] for name in calls}
    gpu: dict[str, list[object]] = {name: [] for name in calls}
    order = list(calls)
    shuffle = random.Random(ORDER_SEED).shuffle
    for _ in range(repeats):
        shuffle(order)
        for name in order:
            cpu_start, start = time.process_time(), time.perf_counter()
            told = calls[name]()
            wall[name].append(1e3 * (time.perf_counter() - start))
            cpu[name].append(1e3 * (time.process_time() - cpu_start))
            gpu[name].append(told)
    return {name: Timings(np.array(wall[name]), np.array(cpu[name]), _gpu_times(gpu[name])) for name in calls}


def require_quiet(records: Iterable[LatencyRecord]) -> None:
    """Raise ValueError for a noisy record: it must not be averaged away or judged by."""
    for record in records:
        if record.noisy:
            raise ValueError(
                f"the latency of {record.name} spreads by {record.spread:.0%} over its minimum on "
                f"{record.device.device}, limit {record.spread_limit:.0%}, in the quietest of {record.repetitions} "
                f"attempts; stop what else runs there (load {record.device.load:.1f} on {record.device.cores} cores) "
                "or raise the limit"
            )


def device_facts(kind: DeviceKind = "cpu") -> DeviceFacts:
    """The CPU this process runs on, or the GPU that CUDA gives it; MissingRuntimeError where there is none."""
    facts = _processor_facts(Path("/proc/cpuinfo"))
    flags = set(facts.get("flags", "").split())
    clock = facts.get("cpu MHz")
    gpu = current_gpu() if kind == "gpu" else None
    return DeviceFacts(
        device=gpu.name if gpu else facts.get("model name") or platform.processor() or platform.machine(),
        kind=kind,
        cores=len(os.sched_getaffinity(0)),
        instruction_sets=tuple(
            sorted(flags & {"avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8"})
        ),
        clock_mhz=float(clock) if clock else None,
        clock_governor=_read(Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")),
        load=os.getloadavg()[0],
        gpu=gpu,
    )


@dataclass(frozen=True)
class _Measurement:
    """All attempts, and what held during them."""

    tried: list[dict[str, Timings]]
    before: DeviceFacts
    after: DeviceFacts
    warmup_seconds: float
    spread_limit: float

    def record(self, name: str, engine: Engine, images: Images) -> LatencyRecord:
        timings = min(self.tried, key=_worst)
        own = timings[name]
        minimum, p50, p90, p99 = percentiles(own.wall_ms)
        gpu_minimum, gpu_p50, gpu_p90, gpu_p99 = (None,) * 4 if own.gpu_ms is None else percentiles(own.gpu_ms)
        return LatencyRecord(
            name=name,
            device=self.before,
            device_after=self.after,
            runtime=engine.name,
            runtime_version=engine.runtime_version,
            precision=engine.precision,
            threads=engine.threads,
            batch=images.shape[0],
            input_size=images.shape[2],
            includes_preprocessing=False,
            includes_postprocessing=False,
            warmup_seconds=self.warmup_seconds,
            repeats=len(own.wall_ms),
            interleaved_with=tuple(other for other in timings if other != name),
            min_ms=minimum,
            p50_ms=p50,
            p90_ms=p90,
            p99_ms=p99,
            cpu_ms=float(np.median(own.cpu_ms)),
            cpu_min_ms=float(own.cpu_ms.min()),
            gpu_min_ms=gpu_minimum,
            gpu_p50_ms=gpu_p50,
            gpu_p90_ms=gpu_p90,
            gpu_p99_ms=gpu_p99,
            spread=own.spread,
            spread_limit=self.spread_limit,
            noisy=own.spread > self.spread_limit,
            repetitions=len(self.tried),
            attempt_spreads=tuple(attempt[name].spread for attempt in self.tried),
        )


def percentiles(times_ms: NDArray[np.float64]) -> tuple[float, float, float, float]:
    """Minimum, median, and what 90 and 99 of 100 stay below."""
    minimum, p50, p90, p99 = (float(np.percentile(times_ms, percent)) for percent in (0, 50, 90, 99))
    return minimum, p50, p90, p99


def _whole_batch(images: Images, fixed_batch: int | None) -> Images:
    """As many images as every call computes, the given ones in turn; those given where it may be any number."""
    return images if fixed_batch is None else np.resize(images, (fixed_batch, *images.shape[1:]))


def _run(engine: Engine, images: Images) -> float | None:
    """One call; gives its time on the GPU where the engine measures it."""
    engine.run(images)
    told: float | None = getattr(engine, "device_ms", None)
    return told


def _gpu_times(told: list[object]) -> NDArray[np.float64] | None:
    times = [value for value in told if isinstance(value, float)]
    return np.array(times) if len(times) == len(told) else None


def _warm_up(call: Callable[[], object], seconds: float) -> None:
    end = time.perf_counter() + seconds
    call()
    while time.perf_counter() < end:
        call()


def _worst(timings: Mapping[str, Timings]) -> float:
    return max(timing.spread for timing in timings.values())


def _processor_facts(path: Path) -> dict[str, str]:
    """Facts of the first core."""
    text = _read(path) or ""
    lines = text.split("\n\n")[0].splitlines()
    pairs = (line.partition(":") for line in lines)
    return {key.strip(): value.strip() for key, _, value in pairs}


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        return None
