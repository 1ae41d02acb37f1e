"""A real `airflow standalone` and a real MLflow server, started and stopped as `make up` and `make down` do.

Only the steps are played; what is tested is what dag.test() cannot show: processes, signals, the pool, the API.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.error import HTTPError
from urllib.parse import quote

import cv2
import numpy as np
import pytest
import services
import yaml
from airflow_api import AirflowApi
from dag_helpers import REPOSITORY, FakeNasline, free_port, is_alive, wait_for

from pipeline_tasks import airflow_rest

pytestmark = pytest.mark.slow
DAG = "train_yolo_nas"
LONG_AGO = datetime(2026, 1, 1, tzinfo=UTC)


@pytest.fixture(scope="module")
def fake(tmp_path_factory: pytest.TempPathFactory) -> FakeNasline:
    """The planned `nasline` that the stack's tasks run."""
    return FakeNasline(tmp_path_factory.mktemp("fake"))


@pytest.fixture(scope="module")
def alerts() -> Iterator[tuple[str, list[str]]]:
    """A webhook's address, and what it was told."""
    told: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            told.append(json.loads(self.rfile.read(int(self.headers["Content-Length"])))["text"])
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Silence."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/hook", told
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def stack(
    fake: FakeNasline, alerts: tuple[str, list[str]], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[services.Stack]:
    """Airflow and MLflow on free ports; stopped, with everything they started, at the end."""
    folder = tmp_path_factory.mktemp("stack")
    settings = {
        **fake.environment,
        "NASLINE_RETRY_SECONDS": "1",
        "NASLINE_ALERT_WEBHOOK": alerts[0],
        "NASLINE_DEADLINE_HOURS": "0.003",
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
        "evaluate_champion": True,
        "promote_or_rollback": False,
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


def test_an_added_version_starts_a_retraining_and_unchanged_data_do_nothing(
    stack: services.Stack, api: AirflowApi, fake: FakeNasline, tmp_path: Path
) -> None:
    fake.plan()
    api.unpause("retrain_yolo_nas")
    data = tmp_path / "project/data/cells"
    assert "is not set, so no retraining is started" in nasline("init", tmp_path / "project") + version(data, 1)
    as_admin = {airflow_rest.URL: stack.airflow_url, airflow_rest.USER: "admin", airflow_rest.PASSWORD: api.password}
    output = version(data, 2, **as_admin)
    assert "announced data/cells" in output and api.password not in output, output
    assert wait_for(lambda: len(asset_runs(api)) == 1, 180), api.runs("retrain_yolo_nas")
    assert api.wait_for_end("retrain_yolo_nas", asset_runs(api)[0], 180) == "success"
    assert {"--from-champion", "--if-changed"} <= set(fake.calls("start")[-1]["argv"])
    (event,) = api.call("GET", "/assets/events")["asset_events"]
    told = {"dataset": "data/cells", "digest": digest_of(data)}  # neither revision nor remote: it is not committed
    assert event["extra"] == {**told, "from_rest_api": True}

    assert "knows data/cells" in version(data, 2, **as_admin)
    nothing = "nothing to do: cells v3 was made from these datasets with these parameters"
    fake.plan(start=[{"exit": 99, "say": nothing}])
    assert "announced data/cells" in nasline("data", "announce", data, "--again", **as_admin)
    assert wait_for(lambda: len(asset_runs(api)) == 2, 180)
    assert api.wait_for_end("retrain_yolo_nas", asset_runs(api)[0], 180) == "success"
    states = api.task_states("retrain_yolo_nas", asset_runs(api)[0])
    assert (states["start"], states["teach"], states["report"]) == ("skipped", "skipped", "success")
    where = f"/dags/retrain_yolo_nas/dagRuns/{quote(asset_runs(api)[0])}/taskInstances/report"
    assert nothing in api.call("GET", f"{where}/xcomEntries/return_value")["value"]


def version(data: Path, number: int, **environment: str) -> str:
    """Put a picture into a set and add it with the real command; what it said."""
    data.mkdir(parents=True, exist_ok=True)
    (data / "a.png").write_bytes(cv2.imencode(".png", np.full((8, 8, 3), number, np.uint8))[1].tobytes())
    return nasline("data", "add", data, **environment)


def digest_of(data: Path) -> str:
    """What DVC has written down."""
    return str(yaml.safe_load(data.with_name("cells.dvc").read_text(encoding="utf-8"))["outs"][0]["md5"])


def nasline(*arguments: object, **environment: str) -> str:
    """The real command line, which must end well; its output."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("NASLINE_AIRFLOW")}
    command = [sys.executable, "-m", "pipeline_tasks", *map(str, arguments)]
    done = subprocess.run(command, env={**kept, **environment}, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def asset_runs(api: AirflowApi, told: datetime = LONG_AGO) -> list[str]:
    """Retrainings that an asset's event started, the newest first; those made since ``told``."""
    runs = [run for run in api.runs("retrain_yolo_nas") if run["run_type"] == "asset_triggered"]
    return [run["dag_run_id"] for run in runs if datetime.fromisoformat(run["queued_at"]) >= told]


def test_a_drop_of_the_champion_ends_red_is_told_and_starts_a_retraining(
    api: AirflowApi, fake: FakeNasline, alerts: tuple[str, list[str]]
) -> None:
    api.unpause("retrain_yolo_nas")
    drop = {"result": {"summary": {"dropped": 1, "retrain": 1}}, "say": "champion cells v3 DROPPED"}
    fake.plan(**{"evaluate-champion": [drop]})
    api.unpause("evaluate_champion")
    run_id = api.trigger("evaluate_champion", {"start.dataset": "/data/today"})
    assert api.wait_for_end("evaluate_champion", run_id, 180) == "failed"
    assert api.task_states("evaluate_champion", run_id)["retrain"] == "success"
    assert wait_for(lambda: any("alert failed" in text for text in alerts[1]), 30)
    text = next(text for text in alerts[1] if "alert failed" in text)
    assert text.splitlines()[:2] == ["*evaluate_champion: alert failed*", "champion cells v3 DROPPED"]
    assert wait_for(lambda: retrained_after(api, run_id), 180), api.runs("retrain_yolo_nas")


def retrained_after(api: AirflowApi, run_id: str) -> bool:
    """Whether a retraining was made after the event of this evaluation. Not counted: the slot that unpausing makes
    Airflow run ends with a drop too, and two events close together share a run or get one each.
    """
    events = api.call("GET", f"/assets/events?source_dag_id=evaluate_champion&source_run_id={quote(run_id)}")
    (told,) = (datetime.fromisoformat(event["timestamp"]) for event in events["asset_events"])
    return asset_runs(api, told) != []


def test_a_run_that_takes_longer_than_its_deadline_is_told(
    api: AirflowApi, fake: FakeNasline, alerts: tuple[str, list[str]]
) -> None:
    fake.plan(**{"evaluate-champion": [{"seconds": 15, "result": {"summary": {"dropped": 0, "retrain": 0}}}]})
    api.unpause("evaluate_champion")
    run_id = api.trigger("evaluate_champion", {"start.dataset": "/data/today"})
    sentence = f"*evaluate_champion {run_id} has not ended by its deadline*"
    assert wait_for(lambda: any(text.startswith(sentence) for text in alerts[1]), 120), alerts[1]
    assert api.wait_for_end("evaluate_champion", run_id, 180) == "success"


def answered(api: AirflowApi, run_id: str, place: str, choice: str) -> bool:
    """Whether `approve` has ended; while it waits it is answered, a second apart: an answer in the very moment in which
    the task parks is lost in Airflow 3.3.2, which then asks again.
    """
    state = api.task_states("promote_or_rollback", run_id)["approve"]
    if state == "awaiting_input":
        time.sleep(1)
        with suppress(HTTPError):  # answered meanwhile
            api.call("PATCH", place, {"chosen_options": [choice], "params_input": {}})
    return state == "success"


@pytest.mark.parametrize(("answer", "moved"), [("Approve", "success"), ("Reject", "skipped")])
def test_a_promotion_waits_for_a_person(api: AirflowApi, fake: FakeNasline, answer: str, moved: str) -> None:
    dag = "promote_or_rollback"
    planned = {"model": "cells", "version": "4", "before": "3", "kind": "promote"}
    fake.plan(promote=[{"result": planned, "say": "promote cells v4 (accepted)"}])
    before = len(fake.calls("promote"))
    form = {"action": "promote", "model": "cells", "version": "4", "reason": "sees small cells"}
    run_id = api.trigger(dag, form)
    assert wait_for(lambda: api.task_states(dag, run_id).get("approve") == "awaiting_input", 180)
    assert len(fake.calls("promote")) == before + 1  # only checked so far
    place = f"/dags/{dag}/dagRuns/{quote(run_id)}/taskInstances/approve/-1/hitlDetails"
    assert api.call("GET", place)["subject"] == "promote cells v4 (accepted)"
    assert wait_for(lambda: answered(api, run_id, place, answer), 180)
    assert api.wait_for_end(dag, run_id, 180) == "success"
    assert api.task_states(dag, run_id)["move"] == moved
    calls = fake.calls("promote")[before:]
    assert len(calls) == (2 if moved == "success" else 1)
    if moved == "success":
        assert "--by=admin, approved by admin" in calls[1]["argv"] and "--dry-run" not in calls[1]["argv"]
