"""What a run will take, told by its first task: in the log, in the result and, where Airflow can be reached, as the
task's note. It refuses when the disk is short; nothing else about an estimate ends a run.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING
from urllib.parse import quote

from pipeline_tasks.airflow_rest import URL, AirflowRest
from pipeline_tasks.errors import StepError, TemporaryError

if TYPE_CHECKING:
    from pipeline_tasks.estimate import Estimate
    from pipeline_tasks.params import Parameters
    from pipeline_tasks.workspace import Workspace

log = logging.getLogger(__name__)

NOTE_LETTERS = 1000
"""Airflow's limit."""
LEAST_STEPS = 3
"""The first two are not measured."""
IDLE_SHARE = 0.9
"""Of a GPU's memory that must be free: what trains there now must neither be disturbed nor run out of it."""
TASK = ("AIRFLOW_CTX_DAG_ID", "AIRFLOW_CTX_DAG_RUN_ID", "AIRFLOW_CTX_TASK_ID")


def tell(workspace: Workspace, parameters: Parameters, environment: Mapping[str, str] = os.environ) -> str:
    """Log the estimate and make it the note of the Airflow task that this process works for; returns it, "" for none.

    Raises:
        TemporaryError: the disk is short, or told to stop.
    """
    found = _estimate(workspace, parameters)
    if found is None:
        return ""
    text = note(found)
    for line in text.splitlines():
        log.info("%s", line)
    _set_note(text, environment)
    found.require_disk()
    return text


def _estimate(workspace: Workspace, parameters: Parameters) -> Estimate | None:
    from pipeline_tasks import plan
    from pipeline_tasks.estimate import estimate

    steps = parameters.start.estimate_steps
    if steps is None:
        return None
    try:
        planned = plan.plan(workspace, parameters)
        probed = max(steps, LEAST_STEPS) if steps and _idle(parameters.start.device) else 0
        return estimate(workspace, parameters, planned, probed)
    except TemporaryError:
        raise
    except (StepError, ValueError, RuntimeError, OSError) as error:  # the steps themselves will tell what is wrong
        log.warning("no estimate: %s", " ".join(str(error).split()))
        return None


def _idle(device: str) -> bool:
    """Whether a probe may use the device: always a CPU, a GPU while nobody else does."""
    if not device.startswith("cuda"):
        return True
    import torch

    if not torch.cuda.is_available():
        log.info("this machine has no GPU, so the estimate is without a probe")
        return False
    free, total = torch.cuda.mem_get_info(device)
    if free < IDLE_SHARE * total:
        log.info("%s is in use, so the estimate is without a probe; `nasline plan` makes one", device)
    return bool(free >= IDLE_SHARE * total)


def note(found: Estimate) -> str:
    """The estimate in few lines, no more than Airflow takes; the last ones, time and disk, are always there."""
    from pipeline_tasks.estimate import size_text

    probed = f"from {found.probe_steps} optimiser steps on {found.device}" if found.probe_steps else "without a probe"
    lines = [f"estimate, {probed}; not a promise"]
    for step in found.steps:
        known = {
            "{:,} images": step.images or None,
            "{:,} steps": step.steps or None,
            "{:.2f} h": step.hours or None,
        }
        parts = [form.format(value) for form, value in known.items() if value is not None]
        parts += [f"{size_text(step.memory_bytes)} memory"] if step.memory_bytes else []
        parts += [f"{size_text(step.disk_bytes)} disk"] if step.disk_bytes else []
        lines += [f"{step.reference}: {', '.join(parts)}"] if parts else []
    unknown = [step.reference for step in found.steps if step.hours is None]
    without = f", without {', '.join(unknown)}" if unknown else ""
    foot = [f"together about {found.hours:.2f} h{without}"] if found.probe_steps else []
    needed, free = size_text(found.disk_bytes), size_text(found.free_bytes)
    short = " TOO LITTLE" if found.disk_bytes > found.free_bytes else ""
    end = "\n".join(["", *foot, f"disk: about {needed} with a reserve, {free} free{short}"])
    return ("\n".join(lines)[: max(NOTE_LETTERS - len(end), 0)] + end)[:NOTE_LETTERS]


def _set_note(text: str, environment: Mapping[str, str]) -> None:
    """The task's own supervisor has no call for it in Airflow 3.3, so it takes the REST API."""
    if not environment.get(URL) or not all(environment.get(name) for name in TASK):
        return
    dag, run, task = (quote(environment[name], safe="") for name in TASK)
    try:
        place = f"/dags/{dag}/dagRuns/{run}/taskInstances/{task}?update_mask=note"
        AirflowRest(environment).call("PATCH", place, {"note": text})
    except StepError as error:
        log.warning("the estimate is no note of the task: %s", error)
