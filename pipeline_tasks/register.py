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
from pipeline_tasks.dataset_statistics import BOX_COLUMNS, statistics_of
from pipeline_tasks.errors import DataError
from pipeline_tasks.execution import StepContext
from pipeline_tasks.export import FLOAT_FILE, INT8_FILE
from pipeline_tasks.keys import parameters_digest
from pipeline_tasks.tracking import registration, registry
from pipeline_tasks.tracking.champions import Compared
from pipeline_tasks.workspace import MANIFEST, write_json

log = logging.getLogger(__name__)

Measured = tuple[dict[str, Any], dict[str, Any], dict[str, Any]]
"""Verdict, accuracy and latency, as the gate wrote them."""
REGISTRATION = "registration.json"
BUILD_FILE = "build.json"
"""What a runtime wrote about the engine it built, beside it."""
LINEAGE_VERSION = 4
"""1 had no perceptual hashes and no schema_version, 2 no statistics of the target set, 3 no `images_unknown_of`."""


def register(context: StepContext) -> dict[str, Any]:
    """Register the engine with its verdict, or publish why it was not.

    The verdict is read here again: nothing else can promote an engine.

    Raises:
        DataError: the gate's files contradict each other, or it judged another engine.
    """
    judged = _judged(context.inputs["gate"])
    shutil.copyfile(context.inputs["gate"] / verdict.FILE, context.output / verdict.FILE)
    if not judged["passed"]:
        log.warning("not registered, because the gate %s", judged["sentence"])
        write_json(context.output / REGISTRATION, {"registered": False, "because": judged["sentence"]})
        return {"registered": 0, "because": judged["sentence"]}
    _require_judged_engine(context)
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
        compared=_compared(context),
    )
    shutil.rmtree(bundle)
    write_json(context.output / REGISTRATION, {"registered": True, **registered})
    told: dict[str, Any] = {"registered": 1, "verdict": judged["sentence"]}
    return told | {name: registered[name] for name in ("model", "version", "not_champion") if name in registered}


def _compared(context: StepContext) -> Compared | None:
    """The champion that the run pinned; nothing where the gate was told to compare with none."""
    if context.parameters.gate.champion_margin is None:
        return None
    pinned = context.run["champion"]
    return Compared(pinned["version"] if pinned else None)


def _judged(gate_folder: Path) -> dict[str, Any]:
    """The verdict, which must be the one that the gate told its manifest and follow from its rules."""
    file = gate_folder / verdict.FILE
    judged: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    summary = _manifest(gate_folder)["summary"]
    follows = judged["passed"] == all(rule["passed"] for rule in judged["rules"])
    if not follows or (judged["passed"], judged["sentence"]) != (bool(summary["passed"]), summary["verdict"]):
        raise DataError(
            f"{file} contradicts {'the manifest beside it' if follows else 'its own rules'} ({judged['sentence']!r}; "
            f"told was {summary['verdict']!r}): remove the folder {gate_folder} and run the step gate again"
        )
    return judged


def _require_judged_engine(context: StepContext) -> None:
    """The engines that the gate built and measured must be made of the files that are registered."""
    engine, gate_folder = context.inputs["engine"], context.inputs["gate"]
    files = _manifest(engine.parent)["files"]
    for name, file in (("int8", INT8_FILE), ("float", FLOAT_FILE)):
        report = gate_folder / "target" / name / BUILD_FILE
        source, published = _source(report), files[f"{engine.name}/{file}"]["sha256"]
        if source != published:
            raise DataError(
                f"{report} does not name {engine / file} as what was built ({source[:12] or 'nothing'} is not "
                f"{published[:12]}): remove the folder {gate_folder} and run the step gate again"
            )


def _source(report: Path) -> str:
    """Digest of the file that an engine was built of; empty where its report is missing or does not tell."""
    try:
        content = json.loads(report.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return ""
    return str(content.get("source_sha256", "")) if isinstance(content, dict) else ""


def _manifest(published: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((published / MANIFEST).read_text(encoding="utf-8"))
    return content


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
    from model.data.tables import box_batches, read_dataset

    dataset = read_dataset(target)
    return statistics_of(dataset.images, box_batches(target, BOX_COLUMNS), dataset.metadata.class_names).to_json()


def _tags(context: StepContext, measured: Measured, bundle: Path) -> dict[str, str]:
    engine = json.loads((bundle / "engine" / "engine.json").read_text(encoding="utf-8"))
    return {
        registry.ENGINE_TAG: registry.bundle_digest(bundle / "engine"),
        registry.BUNDLE_TAG: registry.bundle_digest(bundle),
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
