"""A real `airflow standalone` and a real MLflow server, started and stopped as `make up` and `make down` do.

Only the steps are played; what is tested is what dag.test() cannot show: processes, signals, the pool, the API.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import pytest
import services
from airflow_api import AirflowApi
from dag_helpers import FakeNasline, free_port, is_alive, wait_for

pytestmark = pytest.mark.slow
DAG = "train_yolo_nas"


@pytest.fixture(scope="module")
def fake(tmp_path_factory: pytest.TempPathFactory) -> FakeNasline:
    """The planned `nasline` that the stack's tasks run."""
    return FakeNasline(tmp_path_factory.mktemp("fake"))


@pytest.fixture(scope="module")
def stack(fake: FakeNasline, tmp_path_factory: pytest.TempPathFactory) -> Iterator[services.Stack]:
    """Airflow and MLflow on free ports; stopped, with everything they started, at the end."""
    folder = tmp_path_factory.mktemp("stack")
    settings = {
        **fake.environment,
        "NASLINE_RETRY_SECONDS": "1",
        "AIRFLOW__SCHEDULER__SCHEDULER_IDLE_SLEEP_TIME": "0.2",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(name, value)
        running = services.Stack(folder / "state", folder / "workspace", free_port(), free_port())
        services.up(running)
        leaders = [services.running_pid(running, name) for name in ("airflow", "mlflow")]
        try:
            yield running
        finally:
            services.down(running)
        assert all(leader and services.session_members(leader) == [] for leader in leaders)


@pytest.fixture(scope="module")
def api(stack: services.Stack) -> AirflowApi:
    """The REST API, with the chain unpaused."""
    api = AirflowApi(stack)
    api.unpause(DAG)
    return api


def test_pool_and_dags_are_there(api: AirflowApi) -> None:
    assert api.call("GET", "/pools/accelerator")["slots"] == 1
    assert api.call("GET", "/importErrors")["total_entries"] == 0
    assert {d["dag_id"]: d["is_paused"] for d in api.call("GET", "/dags")["dags"]} == {
        DAG: False,
        "retrain_yolo_nas": True,
    }


def test_up_again_leaves_the_running_services_alone(stack: services.Stack, capsys: pytest.CaptureFixture[str]) -> None:
    before = services.running_pid(stack, "airflow")
    services.up(stack)
    assert services.running_pid(stack, "airflow") == before
    assert stack.airflow_url in capsys.readouterr().out


def test_kill_9_of_the_airflow_task_ends_the_step_and_the_retry_succeeds(api: AirflowApi, fake: FakeNasline) -> None:
    fake.plan(teach=[{"seconds": 300}, {}])
    run_id = api.trigger(DAG, {"start.dataset": "/data"})
    assert wait_for(lambda: bool(fake.calls("teach")), 120)
    step = fake.calls("teach")[0]["pid"]
    airflow_task = int(Path(f"/proc/{step}/stat").read_text().rpartition(")")[2].split()[1])
    os.kill(airflow_task, signal.SIGKILL)
    assert wait_for(lambda: not is_alive(step), 10)
    assert api.wait_for_end(DAG, run_id, 180) == "success"
    assert len(fake.calls("teach")) == 2


def test_each_task_links_to_its_mlflow_run(api: AirflowApi) -> None:
    run_id = api.runs(DAG)[0]["dag_run_id"]
    where = f"/dags/{DAG}/dagRuns/{quote(run_id)}/taskInstances"
    teach = api.call("GET", f"{where}/teach/links")
    assert teach["extra_links"] == {"MLflow run": "http://127.0.0.1:5000/#/experiments/1/runs/teach"}
    shard = api.call("GET", f"{where}/pseudo_label.label/links?map_index=1")
    assert shard["extra_links"]["MLflow run"].endswith("/runs/pseudo_label")
    mapped = api.call("GET", f"{where}/pseudo_label.label/listMapped")["task_instances"]
    assert sorted(task["rendered_map_index"] for task in mapped) == ["shard 0/3", "shard 1/3", "shard 2/3"]


def test_a_run_marked_failed_stops_its_step(api: AirflowApi, fake: FakeNasline) -> None:
    before = len(fake.calls("distill"))
    fake.plan(distill=[{"seconds": 300}])
    run_id = api.trigger(DAG, {"start.dataset": "/data"})
    assert wait_for(lambda: len(fake.calls("distill")) > before, 120)
    step = fake.calls("distill")[-1]["pid"]
    api.call("PATCH", f"/dags/{DAG}/dagRuns/{quote(run_id)}", {"state": "failed"})
    assert wait_for(lambda: not is_alive(step), 30)
    assert api.run_state(DAG, run_id) == "failed"


def test_a_dataset_event_starts_a_retraining(api: AirflowApi, fake: FakeNasline) -> None:
    fake.plan()
    api.unpause("retrain_yolo_nas")
    (asset,) = api.call("GET", "/assets")["assets"]
    assert asset["name"] == "nasline_dataset"
    api.call("POST", "/assets/events", {"asset_id": asset["id"], "extra": {"digest": "abc"}})

    def asset_runs() -> list[str]:
        return [run["dag_run_id"] for run in api.runs("retrain_yolo_nas") if run["run_type"] == "asset_triggered"]

    assert wait_for(lambda: bool(asset_runs()), 60)
    assert api.wait_for_end("retrain_yolo_nas", asset_runs()[0], 180) == "success"
    assert "--from-champion" in fake.calls("start")[-1]["argv"]
