"""`nasline register`: the accepted engine goes to the registry, and the alias champion moves."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

from pipeline_tasks import (
    champion,
    champion_data,
    initial_checkpoint,
    lineage_tags,
    pinned_files,
    seen_images,
    verdict,
    version_page,
)
from pipeline_tasks.dataset_statistics import statistics_of
from pipeline_tasks.execution import StepContext
from pipeline_tasks.keys import parameters_digest
from pipeline_tasks.tracking import registration, registry
from pipeline_tasks.workspace import write_json

log = logging.getLogger(__name__)

Measured = tuple[dict[str, Any], dict[str, Any], dict[str, Any]]
"""Verdict, accuracy and latency, as the gate wrote them."""
REGISTRATION = "registration.json"
LINEAGE_VERSION = 3
"""1 had no perceptual hashes and no schema_version, 2 no statistics of the target set."""


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
    bundle, best = _bundle(context, judged)
    measured = _measured(context.inputs["gate"])
    registered = registration.register_bundle(
        context.workspace,
        context.parameters.start.model_name,
        bundle,
        context.tracker.run_id,
        {**_tags(context, measured, bundle), registry.BEST_TAG: best},
        description=version_page.description(*measured),
        promote=context.parameters.register_.promote,
    )
    shutil.rmtree(bundle)
    write_json(context.output / REGISTRATION, {"registered": True, **registered})
    named = {"model": registered["model"], "version": registered["version"]}
    return {"registered": 1, "verdict": judged["sentence"], **named}


def _bundle(context: StepContext, judged: dict[str, Any]) -> tuple[Path, str]:
    """Everything a user, the next comparison and the next retraining need, in one folder; and the best of the line."""
    bundle = context.state / registry.BUNDLE
    shutil.rmtree(bundle, ignore_errors=True)
    for name, source in (("engine", "engine"), ("gate", "gate"), ("student", "student"), ("teacher", "teacher")):
        shutil.copytree(context.inputs[source], bundle / name)
    datasets = {role: entry["digest"] for role, entry in context.run["datasets"].items() if entry}
    lineage = {
        "schema_version": LINEAGE_VERSION,
        "run": context.run["run"],
        "datasets": datasets,
        "parameters": parameters_digest(context.parameters),
        initial_checkpoint.INPUT: initial_checkpoint.pinned_digest(context.run),
        pinned_files.EXTRA_TEACHERS: pinned_files.extra_teachers(context.run),
        champion_data.STATISTICS: _statistics(context.inputs["target"]),
        **seen_images.seen_by_run(context).to_json(),
    }
    write_json(bundle / seen_images.LINEAGE_FILE, lineage)
    return bundle, champion.carry_best_of_line(context, judged, bundle)


def _statistics(target: Path) -> dict[str, Any]:
    from model.data.tables import read_dataset

    dataset = read_dataset(target)
    return statistics_of(dataset.images, dataset.boxes, dataset.metadata.class_names).to_json()


def _tags(context: StepContext, measured: Measured, bundle: Path) -> dict[str, str]:
    engine = json.loads((bundle / "engine" / "engine.json").read_text(encoding="utf-8"))
    return {
        registry.ENGINE_TAG: registry.bundle_digest(bundle / "engine"),
        "nasline.run": context.run["run"],
        "nasline.variant": context.parameters.start.student_variant,
        **version_page.tags(*measured),
        **lineage_tags.tags(engine, context.run["datasets"]),
    }


def _measured(gate_folder: Path) -> Measured:
    verdict_, accuracy, latency = (
        json.loads((gate_folder / name).read_text(encoding="utf-8"))
        for name in (verdict.FILE, "accuracy.json", "latency.json")
    )
    return verdict_, accuracy, latency
