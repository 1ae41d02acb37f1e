"""The registered model as MLflow gives it out: the boxes that the gate measured, in Python and over HTTP."""

from __future__ import annotations

import base64
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typed_chain import Terminal

pytestmark = pytest.mark.slow
LOW = 0.001
"""So low that an engine which has hardly learned finds something."""
START_SECONDS = 120.0

THROUGH_MLFLOW = """
import json, sys, mlflow, pandas
mlflow.set_tracking_uri(sys.argv[1])
model = mlflow.pyfunc.load_model("models:/chain_digits/1")
paths, low = sys.argv[3:], {"score_threshold": float(sys.argv[2])}
print(json.dumps({
    "low": model.predict(paths, params=low),
    "frame": model.predict(pandas.DataFrame({"picture": paths}), params=low),
    "own": model.predict(paths),
    "example": model.predict(model.input_example, params={"score_threshold": 1.0}),
    "params": [param.name for param in model.metadata.signature.params],
}))
"""
AS_THE_GATE = """
import json, sys
from pathlib import Path
import nasline
from model.detector import Detector
from model.engines import load_engine
opened, gate = nasline.load("models:/chain_digits/1"), Path(sys.argv[2])
measured = Detector(load_engine(gate / "target" / "int8" / "model.xml", threads=1), opened.class_names,
                    opened.preprocessing, iou_threshold=opened.iou_threshold)
paths, low = sys.argv[3:], float(sys.argv[1])
for detector in (opened, measured):
    print(json.dumps([result.to_json() for result in detector.stream(paths, score_threshold=low, batch_size=1)]))
"""


@pytest.fixture(scope="module")
def pictures(finished: Terminal) -> list[str]:
    """Four test images."""
    return [str(path) for path in sorted((finished.data / "target" / "images").iterdir())[:4]]


def run_python(finished: Terminal, script: str, *arguments: str) -> list[Any]:
    """What a script prints as JSON, line by line."""
    command = [sys.executable, "-c", script, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=finished.environment, cwd=finished.folder)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith(("{", "["))]


@pytest.fixture(scope="module")
def store(finished: Terminal) -> str:
    return f"sqlite:///{finished.workspace}/mlflow.db"


@pytest.fixture(scope="module")
def through_mlflow(finished: Terminal, store: str, pictures: list[str]) -> dict[str, Any]:
    """Detections from MLflow's model."""
    (found,) = run_python(finished, THROUGH_MLFLOW, store, str(LOW), *pictures)
    assert isinstance(found, dict)
    return found


def test_mlflow_gives_the_boxes_of_the_engine_that_the_gate_measured(
    finished: Terminal, through_mlflow: dict[str, Any], pictures: list[str]
) -> None:
    gate = finished.published("one", "gate")
    opened, measured = run_python(finished, AS_THE_GATE, str(LOW), str(gate), *pictures)
    assert through_mlflow["low"] == opened == measured
    assert all(result["detections"] for result in opened)


def test_signature_parameters_and_example_are_honoured(through_mlflow: dict[str, Any]) -> None:
    assert through_mlflow["params"] == ["score_threshold", "iou_threshold", "max_detections"]
    assert through_mlflow["frame"] == through_mlflow["low"]
    counts = [[len(result["detections"]) for result in through_mlflow[key]] for key in ("own", "low")]
    assert all(own < low for own, low in zip(*counts, strict=True))
    (example,) = through_mlflow["example"]
    assert (example["width"], example["height"], example["detections"]) == (32, 32, [])


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@pytest.fixture(scope="module")
def served(finished: Terminal, store: str) -> Iterator[str]:
    """Address of a real `mlflow models serve`."""
    port = free_port()
    command = ["mlflow", "models", "serve", "-m", "models:/chain_digits/1", "--env-manager", "local"]
    with (finished.folder / "serve.log").open("w") as log:
        server = subprocess.Popen(
            [*command, "-h", "127.0.0.1", "-p", str(port)], cwd=finished.folder, stdout=log, stderr=log,
            env={**finished.environment, "MLFLOW_TRACKING_URI": store}, start_new_session=True,
        )  # fmt: skip
    try:
        _wait_for(f"http://127.0.0.1:{port}/ping", finished.folder / "serve.log")
        yield f"http://127.0.0.1:{port}/invocations"
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def _wait_for(url: str, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        try:
            urllib.request.urlopen(url, timeout=2).close()
            return
        except OSError:
            time.sleep(0.2)
    raise AssertionError(log.read_text())


def test_a_server_answers_with_the_same_boxes(served: str, pictures: list[str], through_mlflow: dict[str, Any]) -> None:
    sent = [f"data:image/jpeg;base64,{base64.b64encode(Path(path).read_bytes()).decode()}" for path in pictures]
    body = json.dumps({"inputs": sent, "params": {"score_threshold": LOW}}).encode()
    request = urllib.request.Request(served, body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as response:
        answered = json.loads(response.read())["predictions"]
    assert [one["detections"] for one in answered] == [one["detections"] for one in through_mlflow["low"]]


def test_mlflow_alone_tells_what_came_out(finished: Terminal, store: str) -> None:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(store)
    experiment = client.get_experiment_by_name("nasline")
    (parent,) = client.search_runs([experiment.experiment_id], "tags.`nasline.step` = 'pipeline'", max_results=1,
                                   order_by=["start_time ASC"])  # fmt: skip
    tags = parent.data.tags
    assert tags["nasline.data"].startswith("target ") and tags["nasline.variant"] == "pico < pico"
    assert tags["nasline.gate"] == "accepted" and tags["nasline.registered"] == "chain_digits v1"
    page = tags["mlflow.note.content"]
    assert "| passed &emsp; | rule &emsp; | measured &emsp; | limit &emsp; |" in page
    assert "student pico, teacher pico, 64 pixels" in page
    assert "![confusion matrix](get-artifact?path=plots%2Fconfusion_matrix.png&run_uuid=" in page
    steps = client.get_metric_history(parent.info.run_id, "curves/teach/map50_95")
    assert [point.step for point in steps] == [1, 2, 3, 4, 5, 6]
    version = client.get_model_version("chain_digits", "1")
    assert version.tags["nasline.licence.weights"] == "random initialisation"
    assert "nasline.dataset.target" in version.tags
    assert version.tags["nasline.champion.because"].startswith("accepted: ")
