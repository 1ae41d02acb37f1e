"""`nasline data add` under `kill -9`: at whatever moment, no set is half added."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from pipeline_tasks.data.garbage import collect
from pipeline_tasks.data.versioning import add, dataset_digest


@pytest.mark.slow
def test_killed_at_any_moment_it_is_whole_absent_or_found(project: Path, make_coco_folder: Any) -> None:
    source = make_coco_folder("source", train=1500)
    digest, target = dataset_digest(source.path), project / "data/set"
    command = [sys.executable, "-m", "pipeline_tasks", "data", "add", str(source.path), "--to", "data/set"]
    found = set()
    for moment in ("copying", "adding", "anywhere"):
        child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wait_for(moment, target, child)
        child.kill()
        child.wait()
        if target.exists():
            assert dataset_digest(target) == digest
        pointer = target.with_name("set.dvc")
        assert not pointer.exists() or digest in pointer.read_text()
        found |= {orphan.kind for orphan in collect(project).orphans}
    assert "half-written set" in found and "note of a half-added set" in found
    assert add(source.path, to=target).digest == digest
    assert collect(project, delete=True).unreadable == []
    assert collect(project).orphans == [] and dataset_digest(target) == digest


def wait_for(moment: str, target: Path, child: subprocess.Popen[bytes]) -> None:
    """Until the command copies the pictures, or until DVC adds them; at last a little later than that."""
    sign = ".set.incoming/images" if moment == "copying" else ".set.adding"
    deadline = time.monotonic() + 60
    while not target.with_name(sign.split("/")[0]).joinpath(*sign.split("/")[1:]).exists():
        assert child.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    time.sleep(0.3 if moment == "anywhere" else 0)
