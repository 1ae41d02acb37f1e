"""Runs and registered versions as the chain leaves them, without running it: a few small files and rows."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlflow.tracking import MlflowClient

from pipeline_tasks.tracking.mirror import Tracker
from pipeline_tasks.workspace import Workspace

ACCEPTED = "accepted: all 2 rules passed"
REJECTED = "rejected: INT8 mAP50-95: 0.1 misses the limit 0.2 (test split)"
RECORD = {
    "min_ms": 1.25, "p50_ms": 1.5, "p90_ms": 1.75, "p99_ms": 2.0, "precision": "int8", "runtime": "openvino",
    "runtime_version": "2026.4.1-abc", "input_size": 64, "batch": 1, "threads": 2, "repeats": 20,
    "device": {"device": "Some CPU"}, "noisy": False,
}  # fmt: skip
LINEAGE = {
    "weights": ["random initialisation"],
    "annotations": ["CC0-1.0"],
    "images": {"target 1234abcd": {"CC BY 4.0": 79, "unknown": 3}},
}


@dataclass
class Registry:
    """A model in a registry, whose versions have the bundle's files that the commands read."""

    client: MlflowClient
    folder: Path
    name: str
    versions: list[str] = field(default_factory=list)

    def add(self, passed: bool = True, ours: bool = True, run_id: str | None = None) -> str:
        """Register a version that the gate accepted or, which only another hand could do, one it rejected."""
        if not self.versions:
            self.client.create_registered_model(self.name)
        place = self.folder / f"{self.name}-{len(self.versions) + 1}"
        bundle = place / "artifacts" / "bundle"
        verdict = {"passed": passed, "sentence": ACCEPTED if passed else REJECTED}
        latency = {"int8": RECORD, "float": {**RECORD, "precision": "float32", "p50_ms": 3.0}}
        files = {"gate/verdict.json": verdict, "gate/latency.json": latency, "engine/engine.json": {"lineage": LINEAGE}}
        for file, content in files.items():
            (bundle / file).parent.mkdir(parents=True, exist_ok=True)
            (bundle / file).write_text(json.dumps(content))
        tags = {"nasline.engine_digest": "0" * 64, "nasline.run": "one", "nasline.variant": "s"} if ours else {}
        number = str(self.client.create_model_version(self.name, place.as_uri(), run_id=run_id, tags=tags).version)
        self.versions.append(number)
        return number

    @property
    def champion(self) -> str | None:
        """The version the alias stands at."""
        alias = self.client.get_registered_model(self.name).aliases.get("champion")
        return None if alias is None else str(alias)

    def log(self) -> list[dict[str, Any]]:
        """What was written down of each move, the oldest first."""
        tags = self.client.get_registered_model(self.name).tags
        return [json.loads(tags[tag]) for tag in sorted(tags) if tag.startswith("nasline.champion.")]


def write_run(workspace: Workspace, run: str, mean_precision: float, epochs: int = 3, version: str = "") -> None:
    """A run with a training and a gate; `version` was registered from it, without one the gate rejected it."""
    frozen: dict[str, Any] = {
        "run": run,
        "created_ms": 1_700_000_000_000 + epochs,
        "parameters": {
            "start": {
                "dataset": "/data/cells",
                "student_variant": "s",
                "teacher_variant": "m",
                "experiment": "cells",
                "image_size": 640,
                "model_name": "cells",
            },
            "distill": {"epochs": epochs},
        },
        "datasets": {"target": {"path": "/data/cells", "digest": "abcdef0123.dir", "dvc_revision": None}},
        "champion": None,
        "code_version": "0.1.0",
        "steps": {},
    }
    workspace.run_directory(run).mkdir(parents=True)
    workspace.write_run(run, frozen)
    rows = ({"epoch": epoch, "loss": 4.0 / epoch, "map50_95": 0.1 * epoch} for epoch in range(1, 1 + epochs))
    curve = [json.dumps(row) for row in rows]
    gate = {"passed": int(bool(version)), "verdict": ACCEPTED if version else REJECTED, "int8_map50_95": mean_precision}
    _publish(workspace, run, "distill", {"steps": 10 * epochs}, "\n".join(curve))
    _publish(workspace, run, "gate", gate)
    if version:
        name, _, number = version.rpartition(" v")
        _publish(workspace, run, "register", {"registered": 1, "verdict": ACCEPTED, "model": name, "version": number})


def _publish(workspace: Workspace, run: str, step: str, summary: dict[str, Any], curve: str = "") -> None:
    folder = workspace.step_directory(step, f"key-of-{run}")
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text(json.dumps({"key": folder.name, "summary": summary}))
    if curve:
        (folder / "metrics.jsonl").write_text(curve + "\n")
    workspace.record_step(run, step, folder.name)


def mirror(workspace: Workspace, run: str) -> None:
    """Send a run to MLflow as its steps do when they have ended."""
    from pipeline_tasks.execution import outcome

    for step, key in workspace.read_run(run)["steps"].items():
        published = workspace.published(step, key)
        assert published is not None
        tracker = Tracker(workspace, run, step)
        tracker.record.metrics_file = published.directory / "metrics.jsonl"
        if step == "distill":
            tracker.record.system_file = _samples(workspace, run)
        tracker.record.summary, tracker.record.status = published.manifest["summary"], "FINISHED"
        if step == "register" or (step == "gate" and not tracker.record.summary["passed"]):
            tracker.record.outcome = outcome(step, tracker.record.summary)
        assert tracker.deliver() is not None


def _samples(workspace: Workspace, run: str) -> Path:
    """Two samples of the machine, and the beginning of a third that is being written."""
    path = workspace.run_directory(run) / "tracking" / "system" / "distill.jsonl"
    samples = [{"time_ms": 1000 + 10000 * i, "cpu_utilization_percentage": load} for i, load in enumerate((40.5, 60))]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(sample) + "\n" for sample in samples) + '{"time_ms": 21000, "cpu')
    return path
