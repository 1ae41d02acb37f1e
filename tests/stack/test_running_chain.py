"""The services of docker-compose.yml, run for real: the chain on two workers, faults, and no secret anywhere.

One run of `train_yolo_nas` goes through everything: its worker is killed in mid-training, Postgres and Redis restart in
mid-step, and it must end with a champion and the numbers of a training that nobody disturbed.
"""

from __future__ import annotations

import os
import re
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import boto3
import compose_processes
import pytest
from dag_helpers import wait_for
from running_stack import PATIENCE, Running
from typed_chain import SMALL, Terminal

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)]
DAG = "train_yolo_nas"
MODEL = "chain_digits"
PRETRAINING = ("pretrain.student", "pretrain.teacher")
"""One training for both, since they are the same network; which of the two tasks does it is Airflow's choice."""


PARAMETERS = SMALL.replace("{epochs: 2, batch_size: 8,", "{epochs: 12, batch_size: 8,")
"""The chain tests' settings, with a pretraining long enough to be killed in its middle."""

NOTES: dict[str, str] = {}


def inert(running: Running) -> Path:
    """The file that the form's shell characters would make."""
    return running.services.folder / "INERT"


def objects(running: Running, pattern: str) -> list[str]:
    """Names in the workspace that match."""
    return [entry.key for entry in running.bucket().objects.all() if re.search(pattern, entry.key)]


def training_worker(running: Running, step: str) -> str:
    """Name of the worker where a step's process runs now."""
    for name, instance in running.services.instances.items():
        if instance.service == "worker-cpu" and instance.process is not None:
            commands = map(command_line, running.services.processes_of(name))
            if any(step in words and "pipeline_tasks" in words for words in commands):
                return name
    return ""


def command_line(pid: int) -> list[str]:
    """A process's arguments; empty when it has gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text(errors="replace").split("\0")
    except OSError:
        return []


def test_the_chain_survives_its_worker_its_database_and_its_broker(
    running: Running, small_digits: Path, tmp_path: Path
) -> None:
    (running.services.folder / "params.yaml").write_text(PARAMETERS)  # read by `start`, as its DAG file is
    api = running.login()
    api.unpause(DAG)
    file = inert(running)
    experiment = f"digits; touch {file} $(touch {file}) `touch {file}` | x > {file}"
    sets = {"dataset": "target", "pretrain_dataset": "pretrain", "unlabeled_dataset": "unlabeled"}
    form = {f"start.{name}": str(small_digits / part) for name, part in sets.items()}
    run = api.trigger(DAG, {**form, "start.experiment": experiment})
    NOTES.update(run=run, experiment=experiment)

    saved = r"/pretrain/\w+\.partial/state"
    assert wait_for(lambda: bool(objects(running, saved)), PATIENCE), api.task_states(DAG, run)
    killed = training_worker(running, "pretrain")
    assert killed, api.task_states(DAG, run)
    NOTES["killed"] = killed
    running.services.vanish(killed)
    undisturbed = Terminal(tmp_path, small_digits)
    (tmp_path / "params.yaml").write_text(PARAMETERS)
    elsewhere = threading.Thread(target=typed_pretraining, args=(undisturbed, experiment))
    elsewhere.start()

    done = lambda: {api.task_states(DAG, run)[task] for task in PRETRAINING} == {"success"}  # noqa: E731
    assert wait_for(done, PATIENCE), api.task_states(DAG, run)
    elsewhere.join()
    assert_equal_training(running, undisturbed)
    running.services.start(running.services.instances[killed])

    assert wait_for(lambda: bool(training_worker(running, "teach")), PATIENCE), api.task_states(DAG, run)
    running.services.restart("postgres@one")
    assert wait_for(lambda: bool(training_worker(running, "distill")), PATIENCE), api.task_states(DAG, run)
    running.services.restart("redis@one")
    assert api.wait_for_end(DAG, run, PATIENCE) == "success"
    states = api.task_states(DAG, run)
    assert states["register"] == "success" and states["gate.cpu"] == "success"


def typed_pretraining(terminal: Terminal, experiment: str) -> None:
    """The same training by typed commands, in a workspace of its own, with nobody to disturb it."""
    terminal.start("calm", "--start.experiment", experiment)
    terminal.nasline("validate_data", "--run", "calm")
    terminal.nasline("pretrain", "--role", "student", "--run", "calm")


def assert_equal_training(running: Running, undisturbed: Terminal) -> None:
    """The killed and resumed training published the bits of the undisturbed one."""
    calm = undisturbed.published("calm", "pretrain/student")
    for name in ("checkpoint/model.safetensors", "metrics.jsonl", "history.csv"):
        found = objects(running, rf"/pretrain/{calm.name}/\w+/{name}$")
        assert len(found) == 1, (name, objects(running, "/pretrain/"))
        assert running.bucket().Object(found[0]).get()["Body"].read() == (calm / name).read_bytes(), name


def test_the_other_machine_went_on_where_the_killed_one_had_been(running: Running) -> None:
    """The killed task is tried again there; that try goes on, or the other role's task, which has waited for it."""
    tried = {task: task_logs(running, task) for task in PRETRAINING}
    (again,) = [logs for logs in tried.values() if len(logs) > 1]
    assert len({log.parents[4] for log in again}) == 2
    logs = [log for task in PRETRAINING for log in tried[task]]
    went_on = [log for log in logs if "training goes on from step" in log.read_text(errors="replace")]
    killed = running.services.folder / NOTES["killed"].partition("@")[2]
    assert went_on and not any(log.is_relative_to(killed) for log in went_on)


def task_logs(running: Running, task: str) -> list[Path]:
    """The logs of a task's tries on both machines."""
    return sorted(running.services.folder.glob(f"*/airflow-home/logs/**/task_id={task}/*.log"))


def test_the_model_is_champion_on_the_server(running: Running) -> None:
    found = running.mlflow_call(
        f"/api/2.0/mlflow/registered-models/alias?name={MODEL}&alias=champion",
        "nasline", running.secrets["MLFLOW_PIPELINE_PASSWORD"],
    )["model_version"]  # fmt: skip
    assert found["version"] == "1"
    assert next(tag["value"] for tag in found["tags"] if tag["key"] == "nasline.target") == "cpu"


def test_shell_characters_in_the_form_are_only_a_name(running: Running) -> None:
    assert not inert(running).exists()
    path = f"/api/2.0/mlflow/experiments/get-by-name?experiment_name={quote(NOTES['experiment'])}"
    found = running.mlflow_call(path, "nasline", running.secrets["MLFLOW_PIPELINE_PASSWORD"])
    assert found["experiment"]["name"] == NOTES["experiment"]


def test_no_secret_is_in_a_log_a_manifest_an_xcom_or_mlflow(running: Running) -> None:
    values = {value.encode(): name for name, value in running.secrets.items()}
    looked_at = 0
    for place, content in everything_written(running):
        looked_at += 1
        for value, name in values.items():
            assert value not in content, f"{name} in {place}"
    assert looked_at > 60


def everything_written(running: Running) -> Iterator[tuple[str, bytes]]:
    """Logs of services and tasks, the objects of both buckets, and both databases as text."""
    services = running.services
    for path in [*services.folder.glob("*.log"), *services.folder.glob("*/airflow-home/logs/**/*.log")]:
        yield str(path), path.read_bytes()
    store = boto3.resource(
        "s3", endpoint_url=running.s3, region_name="us-east-1", aws_access_key_id="admin",
        aws_secret_access_key=running.secrets["S3_ADMIN_SECRET"],
    )  # fmt: skip
    for bucket in ("nasline", "mlflow"):
        for entry in store.Bucket(bucket).objects.all():
            yield f"s3://{bucket}/{entry.key}", entry.get()["Body"].read()
    port = str(services.instances["postgres@one"].ports["5432"])
    login = {"PGHOST": "127.0.0.1", "PGPORT": port, "PGUSER": "postgres"}
    login["PGPASSWORD"] = running.secrets["POSTGRES_PASSWORD"]
    program = compose_processes.postgres_programs() / "pg_dump"
    for database in ("airflow", "mlflow", "mlflow_users"):
        dump = subprocess.run([program, database], env={**os.environ, **login}, capture_output=True, check=True)
        assert len(dump.stdout) > 10000
        yield f"database {database}", dump.stdout


def test_every_service_is_healthy_in_the_end(running: Running) -> None:
    def unhealthy() -> list[str]:
        return [name for name, each in running.services.instances.items() if not running.services.is_ready(each)]

    deadline = time.monotonic() + 90
    while unhealthy():
        assert time.monotonic() < deadline, unhealthy()
        time.sleep(1)
