"""A tracking server that dies does not end a step, and gets what it missed afterwards, once."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from typed_chain import Terminal

pytestmark = pytest.mark.slow


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


class Server:
    """A real `mlflow server` that can be killed and started again."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, free_port()
        self.address = f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        command = [
            str(Path(sys.executable).parent / "mlflow"), "server", "--host", "127.0.0.1", "--port", str(self.port),
            "--backend-store-uri", f"sqlite:///{self.folder}/server.db",
            "--artifacts-destination", str(self.folder / "artifacts"), "--workers", "1",
        ]  # fmt: skip
        environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
        log = (self.folder / "server.log").open("ab")
        self.process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
        deadline = time.monotonic() + 120
        while not self.is_healthy():
            assert time.monotonic() < deadline, (self.folder / "server.log").read_text()
            time.sleep(0.2)

    def is_healthy(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.address}/health", timeout=2) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    def kill(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def test_missed_metrics_are_delivered_later_and_once(finished: Terminal, tmp_path: Path) -> None:
    from mlflow.tracking import MlflowClient

    server = Server(tmp_path)
    server.start()
    terminal = Terminal(tmp_path / "terminal", finished.data)
    environment = {"MLFLOW_TRACKING_URI": server.address, "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1"}
    try:
        terminal.start("one", **environment)
        terminal.nasline("validate_data", "--run", "one", **environment)
        server.kill()
        output = terminal.nasline("pretrain", "--role", "student", "--run", "one", **environment)
        assert output.count("tracking server at") == 1 and "published: key" in output
        assert "is away" in terminal.nasline("deliver", "--run", "one", code=69, **environment)
        server.start()
        for _ in range(2):
            terminal.nasline("deliver", "--run", "one", **environment)
        client = MlflowClient(server.address)
        experiment = client.get_experiment_by_name("nasline")
        assert experiment is not None
        runs = client.search_runs([experiment.experiment_id], "tags.`nasline.step` = 'pretrain/student'")
        assert [run.info.status for run in runs] == ["FINISHED"]
        points = client.get_metric_history(runs[0].info.run_id, "loss")
        assert [point.step for point in points] == [1, 2]
        (parent,) = client.search_runs([experiment.experiment_id], "tags.`nasline.step` = 'pipeline'")
        assert parent.inputs.dataset_inputs and parent.data.params["distill.epochs"] == "3"
        assert runs[0].data.tags["mlflow.parentRunId"] == parent.info.run_id
    finally:
        server.kill()
