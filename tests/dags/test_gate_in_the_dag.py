"""The gate's rules through the real DAG: the steps before the gate are finished work of typed chains, the gate is real.

Each run sets limits that cannot be met; every rule must then be seen in the verdict, in MLflow and in Airflow.
"""

from __future__ import annotations

import contextlib
import json
import sqlite3
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from test_dag_chain import load_dag
from typed_chain import CHAIN, Terminal

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3000)]

BEFORE_THE_GATE = r"validate_data|pretrain\..*|teach|pseudo_label\.(label|merge)|distill|quantize|export"
CANDIDATE: dict[str, Any] = {}
"""What the run `one` was made with."""
BETTER = {"distill.epochs": 16, "quantize.qat": "never"}
BROKEN = {"quantize.observer": "percentile", "quantize.percentile": 50.1, "quantize.qat": "never",
          "quantize.map_budget": 100.0}  # fmt: skip
"""Half of all activations are cut off: INT8 finds nothing."""
FLOAT = {"quantize.float_layers": ["*"], "quantize.qat": "never"}
TWO_DECIMALS = {"gate.latency_repeats": 100}


@dataclass(frozen=True)
class Outcome:
    """One run of the DAG: states of its tasks, what the gate wrote, what MLflow and the task `report` say."""

    state: str
    states: dict[str, str]
    verdict: dict[str, Any]
    tags: dict[str, str]
    said: str

    @property
    def failed(self) -> dict[str, dict[str, Any]]:
        return {rule["parameter"] or rule["name"]: rule for rule in self.verdict["rules"] if not rule["passed"]}


RunDag = Callable[..., Outcome]


@pytest.fixture(scope="module")
def prepared(finished: Terminal) -> Terminal:
    """Beside `one`, version 1: `better`, the champion; and two whose INT8 engine is none, up to their export."""
    for run, options in (("better", BETTER), ("broken", BROKEN), ("float", FLOAT)):
        words = [word for key, value in options.items() for word in (f"--{key}", json.dumps(value))]
        finished.start(run, *words)
        for command in CHAIN[6:] if run == "better" else CHAIN[6:-2]:
            finished.nasline(*command, "--run", run)
    return finished


@pytest.fixture(scope="module")
def run_dag(prepared: Terminal) -> Iterator[RunDag]:
    """The DAG with the real `nasline`; `doctor` may change the fetched champion before the run."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("NASLINE_WORKSPACE", "OMP_NUM_THREADS"):
            patch.setenv(name, prepared.environment[name])
        patch.setenv("NASLINE_COMMAND", f"{sys.executable} -m pipeline_tasks")
        patch.setenv("NASLINE_PARAMS", str(prepared.folder / "params.yaml"))
        patch.chdir(prepared.folder)
        sets = {"dataset": "target", "pretrain_dataset": "pretrain", "unlabeled_dataset": "unlabeled"}
        folders = {f"start.{name}": str(prepared.data / folder) for name, folder in sets.items()}

        def run(**options: Any) -> Outcome:
            output = StringIO()
            with contextlib.redirect_stdout(output):
                conf = {**folders, **{name.replace("__", "."): value for name, value in options.items()}}
                done = load_dag("train_yolo_nas").test(run_conf=conf, mark_success_pattern=BEFORE_THE_GATE)
            states = {ti.task_id: str(ti.state) for ti in done.get_task_instances()}
            import step_operator

            name = step_operator.run_name(done.run_id)
            verdict = json.loads((prepared.published(name, "gate") / "verdict.json").read_text())
            return Outcome(str(done.state), states, verdict, parent_tags(prepared.workspace, name), output.getvalue())

        yield run


def parent_tags(workspace: Path, run: str) -> dict[str, str]:
    """Tags of a pipeline run's parent in MLflow."""
    query = (
        "SELECT t.key, t.value FROM tags t WHERE t.run_uuid ="
        " (SELECT a.run_uuid FROM tags a JOIN tags b USING (run_uuid)"
        " WHERE a.key = 'nasline.run' AND a.value = ? AND b.key = 'nasline.step' AND b.value = 'pipeline')"
    )
    with contextlib.closing(sqlite3.connect(workspace / "mlflow.db")) as store:
        return dict(store.execute(query, (run,)).fetchall())
