"""What a step takes of its machine, sampled beside the work: processors, memory, disk, and GPUs where there are some.

A line of JSON per sample, under the names that MLflow's page "System metrics" shows. The lines are no part of the
step's output: they differ from try to try.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

log = logging.getLogger(__name__)

INTERVAL_VARIABLE = "NASLINE_SYSTEM_METRICS_SECONDS"
DEFAULT_SECONDS = 10.0
GPU_FIELDS = {
    "utilization.gpu": "utilization_percentage",
    "memory.used": "memory_usage_megabytes",
    "power.draw": "power_usage_watts",
}
GPU_SECONDS = 5.0


def interval() -> float:
    """Seconds between samples; 0 takes none. NASLINE_SYSTEM_METRICS_SECONDS, or 10."""
    text = os.environ.get(INTERVAL_VARIABLE, "")
    try:
        return max(0.0, float(text)) if text else DEFAULT_SECONDS
    except ValueError:
        log.warning("%s is %r, which is no number of seconds; it is %g", INTERVAL_VARIABLE, text, DEFAULT_SECONDS)
        return DEFAULT_SECONDS


@contextmanager
def sampled(path: Path, seconds: float) -> Iterator[None]:
    """Append a sample to `path` every so many seconds while the block runs; a step shorter than that leaves none."""
    if seconds <= 0 or not Path("/proc/stat").exists():
        yield
        return
    ended = threading.Event()
    sampler = threading.Thread(target=_sample_until, args=(ended, path, seconds), name="system metrics", daemon=True)
    sampler.start()
    try:
        yield
    finally:
        ended.set()
        sampler.join(GPU_SECONDS)


def _sample_until(ended: threading.Event, path: Path, seconds: float) -> None:
    busy, total = _processor_ticks()
    while not ended.wait(seconds):
        now_busy, now_total = _processor_ticks()
        share = (now_busy - busy) / max(1, now_total - total)
        busy, total = now_busy, now_total
        sample = {"time_ms": int(time.time() * 1000), "cpu_utilization_percentage": 100 * share, **_usage(path)}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({name: round(value, 2) for name, value in sample.items()}) + "\n")
        except OSError as error:  # a full disk ends the step in its own words
            log.debug("system metrics are not written any more: %s", error)
            return


def _usage(path: Path) -> dict[str, float]:
    memory = _kilobytes(Path("/proc/meminfo"))
    own = _kilobytes(Path("/proc/self/status"))
    used = memory["MemTotal"] - memory["MemAvailable"]
    disk = shutil.disk_usage(path.parent if path.parent.exists() else Path.cwd())
    return {
        "system_memory_usage_megabytes": used / 1000,
        "system_memory_usage_percentage": 100 * used / memory["MemTotal"],
        "step_memory_megabytes": own["VmRSS"] / 1000,
        "disk_available_megabytes": disk.free / 1e6,
        **_gpus(),
    }


def _processor_ticks() -> tuple[int, int]:
    """Clock ticks since boot that all processors worked, and all there were; waiting for a disk counts as idle."""
    ticks = [int(word) for word in Path("/proc/stat").read_text(encoding="ascii").split("\n", 1)[0].split()[1:9]]
    return sum(ticks) - ticks[3] - ticks[4], sum(ticks)


def _kilobytes(path: Path) -> dict[str, float]:
    """The lines `Name:  123 kB` of a file below /proc."""
    lines = (line.split() for line in path.read_text(encoding="ascii", errors="replace").splitlines())
    return {words[0].rstrip(":"): float(words[1]) for words in lines if len(words) == 3 and words[2] == "kB"}


def _gpus() -> dict[str, float]:
    """What nvidia-smi tells of each GPU; nothing where there is none."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return {}
    query = [command, f"--query-gpu=index,{','.join(GPU_FIELDS)}", "--format=csv,noheader,nounits"]
    try:
        told = subprocess.run(query, capture_output=True, text=True, timeout=GPU_SECONDS, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return {}
    return {name: value for line in told.splitlines() for name, value in parse_gpu(line).items()}


def parse_gpu(line: str) -> dict[str, float]:
    """`0, 35, 1024, 71.2` by MLflow's names; a value that the driver does not tell is left out."""
    index, *values = (word.strip() for word in line.split(","))
    named = zip(GPU_FIELDS.values(), values, strict=False)
    return {f"gpu_{index}_{name}": float(value) for name, value in named if value.replace(".", "", 1).isdigit()}
