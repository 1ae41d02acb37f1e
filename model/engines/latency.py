"""Latency as it is measured on the machine that runs this, with what is needed to judge and repeat it.

Engines that are compared take turns in random order in one process: what else the machine does, and how warm it is,
then meets all of them alike. The record holds the minimum, percentiles and CPU time; averages hide what disturbed.
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

import numpy as np
from numpy.typing import NDArray

from model.engines import Engine

DEFAULT_SPREAD_LIMIT = 0.5
ORDER_SEED = 0


@dataclass(frozen=True)
class DeviceFacts:
    """The device and its state while measuring; None where the machine does not tell.

    clock_mhz is what the kernel reports for the first core; load is the mean number of runnable processes of the last
    minute, before the measurement began.
    """

    device: str
    kind: str
    cores: int
    instruction_sets: tuple[str, ...]
    clock_mhz: float | None
    clock_governor: str | None
    load: float


@dataclass(frozen=True)
class LatencyRecord:
    """Time of one call of an engine on one batch, measured on the named device.

    spread: (p90 - min) / min. noisy: the spread was above ``spread_limit`` twice, so the figures are not to be relied
    on. cpu_ms and cpu_min_ms: median and minimum processor time of the process, over all threads.
    """

    name: str
    device: DeviceFacts
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
    spread: float
    spread_limit: float
    noisy: bool
    repetitions: int
    measured: bool = True

    def to_json(self) -> dict[str, object]:
        """The fields as a JSON-ready dictionary."""
        return asdict(self)


@dataclass(frozen=True)
class Timings:
    """Wall and processor time of every counted call, in milliseconds."""

    wall_ms: NDArray[np.float64]
    cpu_ms: NDArray[np.float64]

    @property
    def spread(self) -> float:
        """How far the slow calls are from the fastest one, as a share of it."""
        fastest = float(self.wall_ms.min())
        return (float(np.percentile(self.wall_ms, 90)) - fastest) / fastest


def measure_latency(
    engines: Mapping[str, Engine],
    images: NDArray[np.uint8],
    *,
    warmup_seconds: float = 1.0,
    repeats: int = 100,
    spread_limit: float = DEFAULT_SPREAD_LIMIT,
) -> dict[str, LatencyRecord]:
    """Measure engines against each other on one batch, uint8 (B, 3, S, S): inference alone, without the processing.

    When a spread is above the limit everything is measured once more and the quieter of the two is kept; a record that
    is still above it is marked ``noisy`` (see ``require_quiet``).
    """
    facts = device_facts()
    calls = {name: functools.partial(engine.run, images) for name, engine in engines.items()}
    timings = measure_interleaved(calls, warmup_seconds=warmup_seconds, repeats=repeats)
    repetitions = 1
    if _worst(timings) > spread_limit:
        again = measure_interleaved(calls, warmup_seconds=warmup_seconds, repeats=repeats)
        timings = min(timings, again, key=_worst)
        repetitions = 2
    return {
        name: _record(name, engine, timings, facts, images, warmup_seconds, spread_limit, repetitions)
        for name, engine in engines.items()
    }


def measure_interleaved(
    calls: Mapping[str, Callable[[], object]], *, warmup_seconds: float, repeats: int
) -> dict[str, Timings]:
    """Time calls that take turns, in a fresh random order each round, after a warm-up of every one of them."""
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
    order = list(calls)
    shuffle = random.Random(ORDER_SEED).shuffle
    for _ in range(repeats):
        shuffle(order)
        for name in order:
            cpu_start, start = time.process_time(), time.perf_counter()
            calls[name]()
            wall[name].append(1e3 * (time.perf_counter() - start))
            cpu[name].append(1e3 * (time.process_time() - cpu_start))
    return {name: Timings(np.array(wall[name]), np.array(cpu[name])) for name in calls}


def require_quiet(records: Iterable[LatencyRecord]) -> None:
    """Raise ValueError for a noisy record: it must not be averaged away or judged by."""
    for record in records:
        if record.noisy:
            raise ValueError(
                f"the latency of {record.name} spreads by {record.spread:.0%} over its minimum on "
                f"{record.device.device}, limit {record.spread_limit:.0%}, also when repeated; stop what else runs "
                f"there (load {record.device.load:.1f} on {record.device.cores} cores) or raise the limit"
            )


def device_facts() -> DeviceFacts:
    """The CPU this process runs on."""
    facts = _processor_facts(Path("/proc/cpuinfo"))
    flags = set(facts.get("flags", "").split())
    clock = facts.get("cpu MHz")
    return DeviceFacts(
        device=facts.get("model name") or platform.processor() or platform.machine(),
        kind="cpu",
        cores=len(os.sched_getaffinity(0)),
        instruction_sets=tuple(
            sorted(flags & {"avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8"})
        ),
        clock_mhz=float(clock) if clock else None,
        clock_governor=_read(Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")),
        load=os.getloadavg()[0],
    )


def _record(
    name: str,
    engine: Engine,
    timings: Mapping[str, Timings],
    facts: DeviceFacts,
    images: NDArray[np.uint8],
    warmup_seconds: float,
    spread_limit: float,
    repetitions: int,
) -> LatencyRecord:
    own = timings[name]
    minimum, p50, p90, p99 = (float(np.percentile(own.wall_ms, percent)) for percent in (0, 50, 90, 99))
    return LatencyRecord(
        name=name,
        device=facts,
        runtime=engine.name,
        runtime_version=engine.runtime_version,
        precision=engine.precision,
        threads=engine.threads,
        batch=images.shape[0],
        input_size=images.shape[2],
        includes_preprocessing=False,
        includes_postprocessing=False,
        warmup_seconds=warmup_seconds,
        repeats=len(own.wall_ms),
        interleaved_with=tuple(other for other in timings if other != name),
        min_ms=minimum,
        p50_ms=p50,
        p90_ms=p90,
        p99_ms=p99,
        cpu_ms=float(np.median(own.cpu_ms)),
        cpu_min_ms=float(own.cpu_ms.min()),
        spread=own.spread,
        spread_limit=spread_limit,
        noisy=own.spread > spread_limit,
        repetitions=repetitions,
    )


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
