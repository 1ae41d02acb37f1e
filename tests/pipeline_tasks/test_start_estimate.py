"""The estimate that a run's first task tells: log, result, note in Airflow, and refusal."""

from __future__ import annotations

import json
import logging
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline_tasks import estimate as estimate_module
from pipeline_tasks import start_estimate
from pipeline_tasks.errors import DataError
from pipeline_tasks.estimate import Estimate, StepEstimate
from pipeline_tasks.probe import Measured

MEASURED = Measured(
    seconds_per_step=0.5, seconds_per_image=0.1, memory_bytes=2 * 10**9, state_bytes=10**8, weights_bytes=10**7
)


@pytest.fixture
def probed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Steps of each probe, which takes no time here (tests of `plan` train for real)."""
    steps: list[int] = []
    monkeypatch.setattr(estimate_module, "probe", lambda o, p, t, count: steps.append(count) or MEASURED)
    return steps


@pytest.fixture
def airflow(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, Any]]]:
    """What an Airflow was asked to change, by the process of a task of it."""
    changed: list[tuple[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_PATCH(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            changed.append((self.path, body))
            self.send_response(200 if self.headers["Authorization"] == "Bearer t0ken" else 401)
            self.end_headers()
            self.wfile.write(b"{}")

        def log_message(self, *_: object) -> None:
            """Silence."""

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    settings = {
        "NASLINE_AIRFLOW_URL": f"http://127.0.0.1:{server.server_port}",
        "NASLINE_AIRFLOW_TOKEN": "t0ken",
        "AIRFLOW_CTX_DAG_ID": "train_yolo_nas",
        "AIRFLOW_CTX_DAG_RUN_ID": "manual__2026-11-22T10:00:00+00:00",
        "AIRFLOW_CTX_TASK_ID": "start",
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    yield changed
    server.shutdown()
    server.server_close()


def start(nasline: Any, folder: Path, run: str, *options: object, code: int = 0) -> str:
    small = ("--distill.batch_size", 2, "--teach.batch_size", 2)
    output: str = nasline("start", "--run", run, "--start.dataset", folder, *small, *options, code=code)
    return output


def test_the_note_says_images_steps_hours_memory_and_disk(
    coco_folder: Any, nasline: Any, probed: list[int], airflow: list[tuple[str, Any]], tmp_path: Path
) -> None:
    output = start(nasline, coco_folder.path, "one", "--estimate")
    ((path, body),) = airflow
    run = "manual__2026-11-22T10%3A00%3A00%2B00%3A00"
    assert path == f"/api/v2/dags/train_yolo_nas/dagRuns/{run}/taskInstances/start?update_mask=note"
    lines = body["note"].splitlines()
    assert lines[0] == "estimate, from 20 optimiser steps on cpu; not a promise"
    (distill,) = [line for line in lines if line.startswith("distill: ")]
    assert distill.startswith("distill: 6 images, ") and " steps, " in distill and " h, " in distill
    assert " GB memory, " in distill and distill.endswith(" disk")
    assert lines[-1].startswith("disk: about ") and lines[-1].endswith(" free")
    assert all(f"INFO {line}" in output for line in lines)
    result = json.loads(output.split("NASLINE_RESULT ")[1])
    assert result["estimate"] == body["note"] and "t0ken" not in output
    assert probed and set(probed) == {20}
    assert (tmp_path / "workspace/runs/one/run.json").is_file()


def test_it_is_asked_for_and_can_be_switched_off(
    coco_folder: Any, nasline: Any, probed: list[int], airflow: list[tuple[str, Any]]
) -> None:
    assert "estimate" not in start(nasline, coco_folder.path, "one")
    assert "estimate" not in start(nasline, coco_folder.path, "two", "--estimate", "--start.estimate_steps", "null")
    output = start(nasline, coco_folder.path, "three", "--estimate", "--start.estimate_steps", 0)
    assert (
        "estimate, without a probe; not a promise" in output and " h" not in output.split("distill: ")[1].split("\n")[0]
    )
    assert probed == [] and len(airflow) == 1


def test_a_short_disk_is_refused_and_told(
    coco_folder: Any, nasline: Any, probed: list[int], airflow: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(free=1000))
    assert "free; make room or choose another --workspace" in start(
        nasline, coco_folder.path, "one", "--estimate", code=75
    )
    assert airflow[0][1]["note"].endswith("TOO LITTLE")


def test_what_goes_wrong_with_an_estimate_ends_no_run(
    coco_folder: Any, nasline: Any, airflow: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise DataError("too few pictures")

    monkeypatch.setattr(estimate_module, "probe", fail)
    assert "WARNING no estimate: too few pictures" in start(nasline, coco_folder.path, "one", "--estimate")
    monkeypatch.setenv("NASLINE_AIRFLOW_TOKEN", "wr0ng")
    output = start(nasline, coco_folder.path, "two", "--estimate", "--start.estimate_steps", 0)
    assert "WARNING the estimate is no note of the task" in output and "wr0ng" not in output


def test_a_long_note_is_cut_to_what_airflow_takes() -> None:
    steps = [StepEstimate(f"pretrain/{n}", 10**6, 10**6, 1e3, 10**10, 10**10, "") for n in range(40)]
    found = Estimate(steps, 20, "cpu", 10**15, Path("/data"))
    note = start_estimate.note(found)
    assert len(note) == start_estimate.NOTE_LETTERS and note.splitlines()[-1].startswith("disk: about ")


def test_a_gpu_in_use_is_left_alone(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (60, 100))
    with caplog.at_level(logging.INFO):
        assert not start_estimate._idle("cuda:1")
    assert "cuda:1 is in use" in caplog.text
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (95, 100))
    assert start_estimate._idle("cuda:1") and start_estimate._idle("cpu")
