"""The stack of docker-compose.yml running for tests, with its addresses and its secrets."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
import urllib.request
from base64 import b64encode
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import compose_processes
import make_secrets
import pytest
from airflow_api import AirflowApi
from compose_processes import ComposeProcesses
from typed_chain import SMALL

REPOSITORY = Path(__file__).resolve().parents[2]
PATIENCE = 600.0
"""Seconds: a machine of two cores under a load of twenty needs ten times what a calm one does."""

FASTER = {
    "OMP_NUM_THREADS": "1",
    "AIRFLOW__API__HOST": "127.0.0.1",
    "AIRFLOW__SCHEDULER__SCHEDULER_IDLE_SLEEP_TIME": "0.2",
    "AIRFLOW__SCHEDULER__TASK_INSTANCE_HEARTBEAT_TIMEOUT_DETECTION_INTERVAL": "2",
    "AIRFLOW__SCHEDULER__TASK_INSTANCE_HEARTBEAT_SEC": "2",
}
"""A dead worker is noticed in seconds, and nothing listens beyond the loopback."""


class StackApi(AirflowApi):
    """Logged in as the administrator that `airflow-init` made."""

    def __init__(self, address: str, password: str) -> None:
        self._base, self.password = address, password
        login = {"username": "admin", "password": password}
        self._token = self._request("POST", "/auth/token", login, {})["access_token"]


@dataclass
class Running:
    """The stack, its addresses and its secrets."""

    services: ComposeProcesses
    airflow: str
    mlflow: str
    s3: str
    secrets: dict[str, str]

    def login(self) -> AirflowApi:
        """Airflow's API as the administrator."""
        return StackApi(self.airflow, self.secrets["AIRFLOW_ADMIN_PASSWORD"])

    def bucket(self) -> Any:
        """The pipeline's bucket, read with the pipeline's own key."""
        import boto3

        store = boto3.resource(
            "s3", endpoint_url=self.s3, region_name="us-east-1", aws_access_key_id="nasline",
            aws_secret_access_key=self.secrets["S3_PIPELINE_SECRET"],
        )  # fmt: skip
        return store.Bucket("nasline")

    def mlflow_call(self, path: str, user: str = "", password: str = "", **headers: str) -> Any:
        """GET a page of MLflow."""
        if user:
            headers["Authorization"] = "Basic " + b64encode(f"{user}:{password}".encode()).decode()
        with urllib.request.urlopen(urllib.request.Request(self.mlflow + path, headers=headers), timeout=30) as answer:
            return json.loads(answer.read())


@pytest.fixture(scope="session")
def stack_folder() -> Iterator[Path]:
    """Where the stack lives; the users of Postgres and Redis must get through, which pytest's own folders forbid."""
    created = Path(tempfile.mkdtemp(prefix="nasline-stack-"))
    created.chmod(0o711)
    yield created
    shutil.rmtree(created)


@pytest.fixture(scope="session")
def running(compose_program: Path, stack_folder: Path) -> Iterator[Running]:
    """Everything healthy, with two CPU workers on machines of their own; nothing is left at the end."""
    folder = stack_folder
    (folder / "params.yaml").write_text(SMALL, encoding="utf-8")
    make_secrets.write(REPOSITORY / ".env.example", folder / ".env")
    settings = (folder / ".env").read_text()
    secrets = dict(re.findall(r"^([A-Z0-9_]+(?:PASSWORD|SECRET|KEY))=(.+)$", settings, re.MULTILINE))
    airflow, mlflow = compose_processes.free_ports(2)
    with (folder / ".env").open("a") as more:
        more.write(
            f"AIRFLOW_PUBLIC_URL=http://127.0.0.1:{airflow}\nNASLINE_MLFLOW_UI=http://127.0.0.1:{mlflow}\n"
            f"NASLINE_PARAMS_FILE={folder}/params.yaml\nNASLINE_HEARTBEAT_SECONDS=10\nNASLINE_RETRY_SECONDS=1\n"
        )
    file = compose_processes.resolved(compose_program, folder / ".env", "cpu")
    ports = {("airflow-apiserver", "8080"): airflow, ("mlflow", "5000"): mlflow}
    services = ComposeProcesses(file, folder, ports, FASTER, second=("worker-cpu",))
    try:
        services.up(PATIENCE)
        s3 = f"http://127.0.0.1:{services.instances['s3@one'].ports['8333']}"
        addresses = (f"http://127.0.0.1:{airflow}", f"http://127.0.0.1:{mlflow}", s3)
        yield Running(services, *addresses, secrets)
    finally:
        services.down()
    assert services.survivors() == []
