"""What is known of a pipeline run, wherever it was read: from the workspace's files or from MLflow.

Names are those of MLflow's table: parameters `section.field`, final numbers `STEP/NAME`, curves per step.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline_tasks.tracking.metric_lines import metric_name
from pipeline_tasks.tracking.mirror import flatten
from pipeline_tasks.workspace import Published, Workspace

Curves = dict[str, list[tuple[int, float]]]
"""Metric name to (epoch, value)."""


@dataclass(frozen=True)
class RunFacts:
    """One pipeline run.

    state: `running`, `finished`, `failed`, `killed` or, where only the workspace was asked, `finished` or `unfinished`.
    datasets: content digest by role. verdict: the gate's sentence. registered: `NAME vN`. curves: by step reference.
    """

    run: str
    started_ms: int
    state: str
    parameters: dict[str, str]
    metrics: dict[str, float]
    datasets: dict[str, str]
    verdict: str | None
    registered: str | None
    curves: dict[str, Curves] = field(default_factory=dict)

    @property
    def data(self) -> str:
        """The target set: its folder's name and the beginning of its digest."""
        folder = Path(self.parameters.get("start.dataset") or "?").name
        return f"{folder} {self.datasets.get('target', '')[:6]}".rstrip()

    @property
    def variants(self) -> str:
        """Student and teacher."""
        student, teacher = (self.parameters.get(f"start.{role}_variant", "?") for role in ("student", "teacher"))
        return f"{student} < {teacher}"


def in_workspace(workspace: Workspace, run: str, with_curves: bool = True) -> RunFacts:
    """A run as the workspace's files tell it; without its curves only manifests are read, also of an object store.

    Raises:
        UsageError: the run was never started there.
        DataError: its run.json is damaged.
    """
    frozen = workspace.read_run(run)
    published = dict(_published(workspace, frozen, with_curves))
    summaries = {name: entry.manifest["summary"] for name, entry in published.items()}
    verdict, registered = _outcome(summaries)
    return RunFacts(
        run=run,
        started_ms=frozen["created_ms"],
        state="finished" if verdict and (registered or verdict.startswith("rejected")) else "unfinished",
        parameters={name: str(value) for name, value in flatten(frozen["parameters"]).items()},
        metrics={name: value for step, summary in summaries.items() for name, value in _numbers(step, summary)},
        datasets={role: entry["digest"] for role, entry in frozen["datasets"].items() if entry},
        verdict=verdict,
        registered=registered,
        curves={
            name: curves for name, entry in published.items() if with_curves and (curves := _curves(entry.directory))
        },
    )


def _published(workspace: Workspace, frozen: dict[str, Any], whole: bool) -> Iterator[tuple[str, Published]]:
    for name, key in frozen["steps"].items():
        step = name.split("/")[0]
        found = workspace.published(step, key) if whole else workspace.find(step, key)
        if found is not None:
            yield name, found


def _numbers(step: str, summary: dict[str, Any]) -> Iterator[tuple[str, float]]:
    for name, value in flatten(summary).items():
        if isinstance(value, int | float):
            yield metric_name(f"{step.replace('/', '_')}/{name}"), float(value)


def _outcome(summaries: dict[str, dict[str, Any]]) -> tuple[str | None, str | None]:
    """The gate's sentence, and what was registered."""
    gate, register = summaries.get("gate", {}), summaries.get("register", {})
    registered = f"{register['model']} v{register['version']}" if register.get("registered") else None
    return gate.get("verdict"), registered


def _curves(folder: Path) -> Curves:
    path = folder / "metrics.jsonl"
    if not path.exists():
        return {}
    curves: Curves = {}
    for line in map(json.loads, path.read_text(encoding="utf-8").splitlines()):
        for name, value in line.items():
            if name != "epoch" and isinstance(value, int | float) and not isinstance(value, bool):
                curves.setdefault(metric_name(name), []).append((int(line["epoch"]), float(value)))
    return curves
