"""Finished rows of a benchmark, kept as JSON, so that whoever continues measures only what is missing."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import platform
import subprocess
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"
REPOSITORY = Path(__file__).resolve().parent.parent


class Rows:
    """The rows of ``results/NAME.json``: each has a configuration, figures, and where and when it was measured.

    Rows are found by their configuration, a flat mapping of what was chosen (dataset, seed, recipe, ...).
    """

    def __init__(self, name: str, results: Path = RESULTS) -> None:
        self.path = results / f"{name}.json"

    def all(self) -> list[dict[str, Any]]:
        """Every finished row, oldest first."""
        return json.loads(self.path.read_text(encoding="utf-8")) if self.path.exists() else []

    def find(self, configuration: Mapping[str, Any]) -> dict[str, Any] | None:
        """The row of this configuration, None while it is missing."""
        return next((row for row in self.all() if row["configuration"] == dict(configuration)), None)

    def missing(self, configurations: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """The configurations that have no row yet, in their order."""
        done = [row["configuration"] for row in self.all()]
        return [dict(wanted) for wanted in configurations if dict(wanted) not in done]

    def add(self, configuration: Mapping[str, Any], figures: Mapping[str, Any]) -> dict[str, Any]:
        """Store a finished row at once; an older row of the same configuration is replaced."""
        row = {
            "configuration": dict(configuration),
            "figures": dict(figures),
            "machine": machine(),
            "commit": commit(),
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(self.path):
            others = [other for other in self.all() if other["configuration"] != row["configuration"]]
            unfinished = self.path.with_suffix(f".{os.getpid()}.partial")
            unfinished.write_text(_as_text([*others, row]), encoding="utf-8")
            unfinished.replace(self.path)
        return row


def machine() -> str:
    """Processor, cores and the instructions that decide how fast networks run."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if Path("/proc/cpuinfo").exists() else []
    pairs = (line.partition(":") for line in lines)
    facts = {name.strip(): value.strip() for name, _, value in pairs}
    flags = facts.get("flags", "").split()
    known = [flag for flag in ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16") if flag in flags]
    return f"{facts.get('model name', platform.processor())}, {os.cpu_count()} cores, {' '.join(known)}"


def commit() -> str:
    """The checked-out commit, with a plus sign where the working tree differs from it."""
    head = _git("rev-parse", "--short", "HEAD")
    return head + ("+" if _git("status", "--porcelain", "--", "model", "pipeline_tasks") else "")


def _git(*words: str) -> str:
    return subprocess.run(["git", *words], cwd=REPOSITORY, capture_output=True, text=True, check=False).stdout.strip()


def _as_text(rows: list[dict[str, Any]]) -> str:
    """One line per row, so that a difference shows which rows came."""
    lines = ",\n ".join(json.dumps(row, sort_keys=True) for row in rows)
    return f"[\n {lines}\n]\n"


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One writer at a time; the lock's file lies outside the repository."""
    name = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:16]
    with (Path(tempfile.gettempdir()) / f"nasline-rows-{name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
