"""A killed training goes on and ends with the same bits; a killed step leaves nothing half-written."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

import pytest
from typed_chain import Terminal

pytestmark = pytest.mark.slow

DISTILL = ("distill", "--run", "one")


def prepared(finished: Terminal, folder: Path) -> tuple[Terminal, Path]:
    """A copy of the finished workspace without what `distill` published."""
    import shutil

    terminal = Terminal(folder, finished.data)
    shutil.copytree(finished.workspace, terminal.workspace)
    published = terminal.published("one", "distill")
    shutil.rmtree(published)
    return terminal, published


def wait_for_checkpoint(partial: Path, process: object) -> None:
    """Until a training step has been saved, which these settings do in the middle of an epoch."""
    deadline = time.monotonic() + 120
    while not (partial / "state" / "state.json").exists():
        assert time.monotonic() < deadline, "no checkpoint was written"
        assert process.poll() is None, "training ended before it could be killed"  # type: ignore[attr-defined]
        time.sleep(0.02)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_killed_training_ends_with_the_bits_of_an_unbroken_one(
    finished: Terminal, tmp_path: Path, how: signal.Signals
) -> None:
    unbroken = finished.published("one", "distill")
    terminal, published = prepared(finished, tmp_path)
    partial = published.with_name(published.name + ".partial")
    process = terminal.popen(DISTILL)
    wait_for_checkpoint(partial, process)
    process.send_signal(how)
    output, _ = process.communicate()
    assert process.returncode == (75 if how == signal.SIGTERM else -signal.SIGKILL), output
    assert not published.exists()
    output = terminal.nasline(*DISTILL)
    assert "training goes on from step" in output
    for name in ("checkpoint/model.safetensors", "metrics.jsonl", "history.csv"):
        assert (published / name).read_bytes() == (unbroken / name).read_bytes(), name
    manifests = [json.loads((folder / "manifest.json").read_text()) for folder in (published, unbroken)]
    assert manifests[0]["summary"] == manifests[1]["summary"]


def test_step_killed_at_any_moment_publishes_all_or_nothing(finished: Terminal, tmp_path: Path) -> None:
    import shutil

    terminal = Terminal(tmp_path, finished.data)
    shutil.copytree(finished.workspace, terminal.workspace)
    published = terminal.published("one", "export")
    whole = {path.relative_to(published) for path in published.rglob("*")}
    for delay in (1.0, 3.0, 6.0, 9.0):
        shutil.rmtree(published, ignore_errors=True)
        process = terminal.popen(("export", "--run", "one"))
        time.sleep(delay)
        process.kill()
        process.communicate()
        assert not published.exists() or {path.relative_to(published) for path in published.rglob("*")} == whole
    terminal.nasline("export", "--run", "one")
    assert {path.relative_to(published) for path in published.rglob("*")} == whole


def test_two_processes_do_the_work_once(finished: Terminal, tmp_path: Path) -> None:
    terminal, _ = prepared(finished, tmp_path)
    processes = [terminal.popen(DISTILL) for _ in range(2)]
    outputs = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert sorted("distill reused" in output for output in outputs) == [False, True]
