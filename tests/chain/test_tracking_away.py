"""A tracking server that dies does not end a step, and gets what it missed afterwards, once."""

from __future__ import annotations

from pathlib import Path

import pytest
from tracking_server import Server
from typed_chain import Terminal

pytestmark = pytest.mark.slow


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
