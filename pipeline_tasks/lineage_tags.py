"""What a registered version descends from, as tags and as words: data sets, and the licences of three kinds apart."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

MOST_LETTERS = 4000
"""Of a tag; MLflow's database keeps 5000."""


def tags(engine: Mapping[str, Any], datasets: Mapping[str, Any]) -> dict[str, str]:
    """Tags of a version: `engine` is engine.json, `datasets` those of run.json."""
    sets = {f"nasline.dataset.{role}": entry["digest"] for role, entry in datasets.items() if entry}
    return {**sets, **{f"nasline.licence.{kind}": text[:MOST_LETTERS] for kind, text in licences(engine).items()}}


def licences(engine: Mapping[str, Any]) -> dict[str, str]:
    """The licences of weights, of annotations, and of images with their counts in each set."""
    lineage = engine.get("lineage", {})
    images = [
        f"{', '.join(f'{count} {name}' for name, count in counts.items())} ({dataset})"
        for dataset, counts in lineage.get("images", {}).items()
    ]
    return {
        "weights": ", ".join(lineage.get("weights", [])) or "not told",
        "annotations": ", ".join(lineage.get("annotations", [])) or "not told",
        "images": "; ".join(images) or "not told",
    }
