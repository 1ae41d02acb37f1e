"""`nasline register`: the accepted engine goes to the registry, and the alias champion moves."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

from pipeline_tasks import champion, initial_checkpoint, pinned_files, verdict
from pipeline_tasks.execution import StepContext
from pipeline_tasks.keys import parameters_digest
from pipeline_tasks.tracking import registry
from pipeline_tasks.validate_data import is_absent
from pipeline_tasks.workspace import write_json

log = logging.getLogger(__name__)

REGISTRATION = "registration.json"


def register(context: StepContext) -> dict[str, Any]:
    """Register the engine with its verdict, or publish why it was not.

    The verdict is read here again: nothing else can promote an engine.
    """
    judged = json.loads((context.inputs["gate"] / verdict.FILE).read_text(encoding="utf-8"))
    shutil.copyfile(context.inputs["gate"] / verdict.FILE, context.output / verdict.FILE)
    if not judged["passed"]:
        log.warning("not registered, because the gate %s", judged["sentence"])
        write_json(context.output / REGISTRATION, {"registered": False, "because": judged["sentence"]})
        return {"registered": 0, "because": judged["sentence"]}
    bundle = _bundle(context)
    registration = registry.register_bundle(
        context.workspace,
        context.parameters.start.model_name,
        bundle,
        context.tracker.run_id,
        _tags(context, judged, bundle),
        promote=context.parameters.register_.promote,
    )
    shutil.rmtree(bundle)
    write_json(context.output / REGISTRATION, {"registered": True, **registration})
    named = {"model": registration["model"], "version": registration["version"]}
    return {"registered": 1, "verdict": judged["sentence"], **named}


def _bundle(context: StepContext) -> Path:
    """Everything a user, the next comparison and the next retraining need, in one folder."""
    bundle = context.state / registry.BUNDLE
    shutil.rmtree(bundle, ignore_errors=True)
    for name, source in (("engine", "engine"), ("gate", "gate"), ("student", "student"), ("teacher", "teacher")):
        shutil.copytree(context.inputs[source], bundle / name)
    datasets = {role: entry["digest"] for role, entry in context.run["datasets"].items() if entry}
    lineage = {
        "run": context.run["run"],
        "datasets": datasets,
        "parameters": parameters_digest(context.parameters),
        initial_checkpoint.INPUT: initial_checkpoint.pinned_digest(context.run),
        pinned_files.EXTRA_TEACHERS: pinned_files.extra_teachers(context.run),
        "seen_images": _seen_images(context),
    }
    write_json(bundle / champion.LINEAGE_FILE, lineage)
    return bundle


def _seen_images(context: StepContext) -> list[str]:
    """Content digests of all images that were trained, chosen or pseudo-labelled on: all but the test split."""
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    seen: set[str] = set()
    for role in ("target", "pretrain", "unlabeled"):
        folder = context.inputs[role]
        if is_absent(folder):
            continue
        table = pq.read_table(folder / "images.parquet", columns=["split", "sha256"])
        if role == "target":
            table = table.filter(pc.not_equal(table["split"], "test"))
        seen.update(digest for digest in table["sha256"].to_pylist() if digest)
    descends = context.parameters.start.from_champion or context.parameters.teach.source != "train"
    if descends and context.champion:
        ancestor = json.loads((context.champion / champion.LINEAGE_FILE).read_text(encoding="utf-8"))
        seen.update(ancestor["seen_images"])
    return sorted(seen)


def _tags(context: StepContext, judged: dict[str, Any], bundle: Path) -> dict[str, str]:
    accuracy = json.loads((context.inputs["gate"] / "accuracy.json").read_text(encoding="utf-8"))
    latency = json.loads((context.inputs["gate"] / "latency.json").read_text(encoding="utf-8"))["int8"]
    return {
        registry.ENGINE_TAG: registry.bundle_digest(bundle / "engine"),
        "nasline.run": context.run["run"],
        "nasline.verdict": judged["sentence"],
        "nasline.variant": context.parameters.start.student_variant,
        "nasline.int8_map50_95": f"{accuracy['int8']['map50_95']:.4f}",
        "nasline.latency_p50_ms": f"{latency['p50_ms']:.3f} on {latency['device']['device']}",
    }
