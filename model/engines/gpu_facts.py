"""What ``nvidia-smi`` tells about a GPU: which one it is, and its clocks, temperature and power at this moment.

A latency is worth little without them: a T4 holds 70 W by lowering its clock, and does so after seconds of work.
"""

from __future__ import annotations

import subprocess
from dataclasses import asdict, dataclass, replace
from typing import Any

from model.engines import MissingRuntimeError
from model.engines.cuda import Cuda

COMMAND = "nvidia-smi"
TIMEOUT_SECONDS = 20
FIELDS = {
    "name": "name",
    "uuid": "uuid",
    "driver": "driver_version",
    "compute_capability": "compute_cap",
    "performance_state": "pstate",
    "memory_mib": "memory.total",
    "clock_mhz": "clocks.sm",
    "maximum_clock_mhz": "clocks.max.sm",
    "memory_clock_mhz": "clocks.mem",
    "temperature_celsius": "temperature.gpu",
    "power_watts": "power.draw",
    "power_limit_watts": "power.limit",
    "utilization_percent": "utilization.gpu",
}
"""Field of GpuFacts -> what it is called in a query; from memory_mib on they are numbers."""
TEXTS = 5
THROTTLE_FIELD = "clocks_throttle_reasons.active"
THROTTLE_REASONS = {
    0x001: "idle",
    0x002: "application clocks",
    0x004: "power cap",
    0x008: "hardware slowdown",
    0x010: "sync boost",
    0x020: "temperature (software)",
    0x040: "temperature (hardware)",
    0x080: "power brake",
    0x100: "display clocks",
}
"""Bits of NVML's nvmlClocksThrottleReasons."""


@dataclass(frozen=True)
class GpuFacts:
    """A GPU and its state while this was asked; None where the driver does not tell.

    clock_mhz is that of the multiprocessors, utilisation in percent. throttle_reasons: what holds the clock down, empty
    when nothing does; "idle" is no harm. multiprocessors come from CUDA (a T4 has 40).
    """

    name: str
    uuid: str | None
    driver: str | None
    compute_capability: str | None
    performance_state: str | None
    memory_mib: float | None
    clock_mhz: float | None
    maximum_clock_mhz: float | None
    memory_clock_mhz: float | None
    temperature_celsius: float | None
    power_watts: float | None
    power_limit_watts: float | None
    utilization_percent: float | None
    throttle_reasons: tuple[str, ...] | None = None
    multiprocessors: int | None = None

    def to_json(self) -> dict[str, Any]:
        """The fields as a JSON-ready dictionary."""
        return asdict(self)


def query_gpu(identifier: str = "0") -> GpuFacts:
    """Ask about one GPU, given by its index, UUID or PCI bus address.

    Raises MissingRuntimeError when there is no nvidia-smi or it reaches no GPU.
    """
    facts = parse_gpu_facts(_ask(identifier, ",".join(FIELDS.values())))
    try:
        reasons = parse_throttle_reasons(_ask(identifier, THROTTLE_FIELD))
    except MissingRuntimeError:  # a driver that has given the field another name
        reasons = None
    return replace(facts, throttle_reasons=reasons)


def current_gpu() -> GpuFacts:
    """The GPU that CUDA gives this process first, its multiprocessors counted; errors as ``query_gpu`` and ``Cuda``."""
    cuda = Cuda()
    return replace(query_gpu(cuda.bus_address()), multiprocessors=cuda.multiprocessors())


def parse_gpu_facts(line: str) -> GpuFacts:
    """One line of ``--format=csv,noheader,nounits`` for FIELDS; ValueError for another line."""
    values = [_told(value) for value in line.strip().split(",")]
    if len(values) != len(FIELDS) or not values[0]:
        raise ValueError(f"expected {len(FIELDS)} values of {COMMAND}, got {line.strip()!r}")
    numbers = [None if value is None else float(value) for value in values[TEXTS:]]
    facts: dict[str, Any] = dict(zip(FIELDS, [*values[:TEXTS], *numbers], strict=True))
    return GpuFacts(**facts)


def parse_throttle_reasons(text: str) -> tuple[str, ...] | None:
    """Names of the set bits; None when the driver does not tell."""
    value = _told(text)
    if value is None:
        return None
    bits = int(value, 16)
    known = tuple(name for bit, name in THROTTLE_REASONS.items() if bits & bit)
    unknown = bits & ~sum(THROTTLE_REASONS)
    return (*known, f"unknown ({unknown:#x})") if unknown else known


def _ask(identifier: str, fields: str) -> str:
    arguments = [COMMAND, f"--query-gpu={fields}", "--format=csv,noheader,nounits", f"--id={identifier}"]
    try:
        answer = subprocess.run(arguments, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=False)
    except FileNotFoundError:
        raise MissingRuntimeError(
            f"{COMMAND} was not found, so the GPU's driver, clocks, temperature and power are unknown; install the "
            "NVIDIA driver's utilities (in a container: start it with the GPU's utility capability)"
        ) from None
    except subprocess.TimeoutExpired:
        raise MissingRuntimeError(f"{COMMAND} did not answer within {TIMEOUT_SECONDS} s; restart the driver") from None
    if answer.returncode != 0:
        said = (answer.stdout + answer.stderr).strip().splitlines()
        raise MissingRuntimeError(f"{COMMAND} fails for GPU {identifier}: {said[-1] if said else 'it says nothing'}")
    return answer.stdout


def _told(value: str) -> str | None:
    """None for N/A, [N/A], [Not Supported], [Unknown Error] and the like."""
    value = value.strip()
    return None if not value or value.startswith("[") or value == "N/A" else value
