"""Airflow's scheduler is killed while a step trains, and the same run is triggered twice: real servers, real steps."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.error import HTTPError

import pytest
import yaml
from typed_chain import REPOSITORY, SMALL, Terminal

for folder in (REPOSITORY / "stack", REPOSITORY / "tests" / "dags"):
    sys.path.append(str(folder))

import services  # noqa: E402
from airflow_api import AirflowApi  # noqa: E402
from dag_helpers import free_port, wait_for  # noqa: E402

pytestmark = pytest.mark.slow

DAG = "short_chain"
DAG_FILE = f"""
    import sys
    sys.path.append({str(REPOSITORY / "dags")!r})
    from datetime import UTC, datetime
    from airflow.sdk import DAG
    from airflow.sdk.definitions.param import ParamsDict
    from pipeline_chain import DAG_ARGUMENTS, start_task, step_task
    from trigger_form import trigger_form

    FORM = trigger_form(without=("start.from_champion",))
    with DAG("{DAG}", schedule=None, start_date=datetime(2026, 1, 1, tzinfo=UTC), **DAG_ARGUMENTS) as dag:
        start_task(FORM) >> step_task("validate_data") >> step_task("pretrain", "student")
    dag.params = ParamsDict(FORM)
"""
"""The first tasks of train_yolo_nas: the rest would only take longer."""
SETTINGS = {
    "NASLINE_RETRY_SECONDS": "1",
    "AIRFLOW__SCHEDULER__SCHEDULER_IDLE_SLEEP_TIME": "0.2",
    "AIRFLOW__SCHEDULER__SCHEDULER_HEALTH_CHECK_THRESHOLD": "10",
    "AIRFLOW__SCHEDULER__ORPHANED_TASKS_CHECK_INTERVAL": "5",
}


@pytest.fixture
def stack(tmp_path: Path) -> Iterator[services.Stack]:
    """Airflow with LocalExecutor and MLflow, and nothing of them left at the end."""
    dags = tmp_path / "dags"
    dags.mkdir()
    (dags / "short_chain.py").write_text(textwrap.dedent(DAG_FILE))
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith(("AIRFLOW", "NASLINE_", "MLFLOW"))]:
            patch.delenv(name)
        for name, value in {**SETTINGS, "NASLINE_SHARED": os.environ.get("NASLINE_SHARED", "")}.items():
            patch.setenv(name, value)
        running = services.Stack(tmp_path / "state", tmp_path / "workspace", free_port(), free_port(), dags)
        services.up(running)
        try:
            yield running
        finally:
            services.down(running)


def scheduler_of(stack: services.Stack) -> int:
    """The scheduler's process, below that of `airflow standalone`."""
    leader = services.running_pid(stack, "airflow")
    assert leader is not None
    (found,) = [pid for pid in services.session_members(leader) if _words(pid)[-2:] == ["airflow", "scheduler"]]
    return found


def _words(pid: int) -> list[str]:
    with suppress(FileNotFoundError):
        return [Path(word).name for word in Path(f"/proc/{pid}/cmdline").read_text().split("\0") if word]
    return []


def form(finished: Terminal) -> dict[str, Any]:
    """What makes the run `one` of the typed chain, as the trigger form sends it."""
    sections = yaml.safe_load(SMALL)
    names = [(section, name) for section in ("start", "pretrain") for name in sections[section]]
    fields = {f"{section}.{name}": sections[section][name] for section, name in names}
    sets = {"dataset": "target", "pretrain_dataset": "pretrain", "unlabeled_dataset": "unlabeled"}
    return {**fields, **{f"start.{name}": str(finished.data / folder) for name, folder in sets.items()}}


def test_killed_scheduler_and_a_run_triggered_twice_end_with_the_bits_of_the_undisturbed_run(
    finished: Terminal, stack: services.Stack
) -> None:
    api = AirflowApi(stack)
    api.unpause(DAG)
    unbroken = finished.published("one", "pretrain/student")
    published = stack.workspace / "steps" / "pretrain" / unbroken.name
    first = api.trigger(DAG, form(finished))
    step = frozen_in_mid_training(published, lambda: api.run_state(DAG, first))
    os.kill(scheduler_of(stack), signal.SIGKILL)
    second = api.trigger(DAG, form(finished))
    with pytest.raises(HTTPError) as refused:
        api.call("POST", f"/dags/{DAG}/dagRuns", {"dag_run_id": first, "logical_date": None, "conf": form(finished)})
    assert refused.value.code == 409, "one id is one run"
    with scheduler(stack):
        time.sleep(12)  # until the new scheduler knows that the old one is dead
        os.kill(step, signal.SIGCONT)
        assert [api.wait_for_end(DAG, run, 300) for run in (first, second)] == ["success", "success"]
    for name in ("checkpoint/model.safetensors", "metrics.jsonl", "history.csv"):
        assert (published / name).read_bytes() == (unbroken / name).read_bytes(), name
    assert [path.name for path in published.parent.iterdir() if path.is_dir()] == [published.name], "done once"


def frozen_in_mid_training(published: Path, state: Callable[[], str]) -> int:
    """Wait for the first save of the training and stop its process there; its id stands in the lease."""
    saved = published.with_name(published.name + ".partial") / "state" / "state.json"
    assert wait_for(saved.exists, 240), state()
    step = int(published.with_name(published.name + ".lock").read_text())
    os.kill(step, signal.SIGSTOP)
    assert not published.exists(), "training had ended already"
    return step


@contextmanager
def scheduler(stack: services.Stack) -> Iterator[None]:
    """A new scheduler process, as whatever watches over it would start it."""
    words = [str(Path(sys.executable).parent / "airflow"), "scheduler"]
    with (stack.state / "scheduler.log").open("ab") as log:
        process = subprocess.Popen(
            words, env=stack.environment(), cwd=REPOSITORY, stdout=log, stderr=log, start_new_session=True
        )
        try:
            yield
        finally:
            services.stop_session(process.pid, signal.SIGTERM)
            process.wait()
