"""Each task finds a worker: the queues of the DAGs are those that the Compose workers take."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_compose_file import WORKERS, queues

pytestmark = pytest.mark.slow
REPOSITORY = Path(__file__).resolve().parents[2]
FILES = ("train_yolo_nas", "retrain_yolo_nas", "evaluate_champion", "promote_or_rollback")
LIST_QUEUES = f"""
import importlib, json
dags = [importlib.import_module(name).dag for name in {FILES}]
print(json.dumps({{f"{{dag.dag_id}}.{{task.task_id}}": task.queue for dag in dags for task in dag.tasks}}))
"""


@pytest.mark.parametrize("accelerator", ["default", "gpu"])
def test_every_task_has_a_worker(accelerator: str, tmp_path: Path) -> None:
    environment = {
        **os.environ, "AIRFLOW_HOME": str(tmp_path), "NASLINE_ACCELERATOR_QUEUE": accelerator,
        "PYTHONPATH": os.pathsep.join([str(REPOSITORY / "dags"), str(REPOSITORY)]),
    }  # fmt: skip
    done = subprocess.run([sys.executable, "-c", LIST_QUEUES], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    asked: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    taken = set.union(*(queues(name) for name in WORKERS))
    assert set(asked.values()) == {"default", "t4", accelerator} <= taken
    assert asked["train_yolo_nas.distill"] == asked["train_yolo_nas.gate.gpu"] == accelerator
    assert asked["train_yolo_nas.gate.t4"] == "t4" and asked["train_yolo_nas.start"] == "default"
