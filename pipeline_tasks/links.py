"""Copies of finished content for DVC, which empties its outputs before a stage and must not touch the workspace."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from pipeline_tasks.workspace import MANIFEST, write_json


def link_published(directory: Path, target: Path) -> None:
    """Copy a published folder, without its manifest, so that equal work gives equal bytes.

    Copies, not hard links: DVC changes the permissions of what it caches, and a published file must stay as it is.
    """
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(directory, target, ignore=shutil.ignore_patterns(MANIFEST, "data_docs"))


def link_start(frozen: dict[str, Any], target: Path) -> None:
    """What a run was started with, without its times and paths."""
    shutil.rmtree(target, ignore_errors=True)
    datasets = {role: entry["digest"] for role, entry in frozen["datasets"].items() if entry}
    champion = frozen["champion"] and {k: frozen["champion"][k] for k in ("name", "version", "digest")}
    write_json(target / "start.json", {"datasets": datasets, "champion": champion})
