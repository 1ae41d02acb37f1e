"""Is this machine the gate's target? A number measured on another device must not pass for the target's."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from pipeline_tasks.errors import ConfigurationError

if TYPE_CHECKING:
    from model.engines.gpu_facts import GpuFacts
    from pipeline_tasks.gate_parameters import Target

log = logging.getLogger(__name__)

T4_WORD, T4_CAPABILITY, T4_MULTIPROCESSORS = "T4", "7.5", 40
"""NVIDIA T4: TU104, 40 streaming multiprocessors, SM 7.5. The name is a word of its own: a T4G or T400 is no T4."""
ROUTE = (
    "in Airflow the task gate.t4 waits in the queue t4 for a worker on a machine with a T4 (docs/deploy.md says how to "
    "add one); by hand run `nasline gate` there, in the same workspace"
)


def require_target(target: Target) -> None:
    """Raise ConfigurationError unless the gate's target is the device at hand; any CPU is a `cpu`."""
    if target == "cpu":
        return
    from model.engines import MissingRuntimeError
    from model.engines.gpu_facts import current_gpu

    try:
        facts = current_gpu()
    except MissingRuntimeError as error:
        route = f"; {ROUTE}" if target == "t4" else ""
        raise ConfigurationError(f"gate.target is {target}, but {error}{route}") from None
    if target == "t4" and (differences := differences_from_t4(facts)):
        raise ConfigurationError(f"gate.target is t4, but the device here is no T4: {', '.join(differences)}; {ROUTE}")
    log.info("the target %s is here: %s, driver %s", target, facts.name, facts.driver)


def differences_from_t4(facts: GpuFacts) -> list[str]:
    """What tells a GPU from a T4, each in words; empty for a T4. What the driver does not tell is a difference too."""
    differences = []
    if T4_WORD not in facts.name.split():
        differences.append(f"its name is {facts.name!r}")
    if facts.compute_capability != T4_CAPABILITY:
        differences.append(f"its compute capability is {facts.compute_capability}, not {T4_CAPABILITY}")
    if facts.multiprocessors != T4_MULTIPROCESSORS:
        differences.append(f"it has {facts.multiprocessors} multiprocessors, not {T4_MULTIPROCESSORS}")
    return differences
