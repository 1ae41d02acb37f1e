"""The services of docker-compose.yml, run for real: nobody gets in without a login."""

from __future__ import annotations

import json
import subprocess
import urllib.request
from urllib.error import HTTPError

import pytest
from running_stack import Running

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


def refused(url: str, **headers: str) -> int:
    """The code with which a request is refused."""
    with pytest.raises(HTTPError) as error:
        urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=30)
    return error.value.code


@pytest.mark.parametrize("path", ["/dags", "/dags/train_yolo_nas/dagRuns", "/variables", "/connections"])
def test_airflow_tells_nothing_to_who_is_not_logged_in(running: Running, path: str) -> None:
    assert refused(f"{running.airflow}/api/v2{path}") == 401
    assert refused(f"{running.airflow}/api/v2{path}", Authorization="Bearer made.up.token") in (401, 403)


def test_a_wrong_password_opens_neither_interface(running: Running) -> None:
    body = json.dumps({"username": "admin", "password": "admin"}).encode()
    request = urllib.request.Request(f"{running.airflow}/auth/token", body, {"Content-Type": "application/json"})
    with pytest.raises(HTTPError) as error:
        urllib.request.urlopen(request, timeout=30)
    assert error.value.code == 401
    for user, password in (("", ""), ("admin", "password1234"), ("nasline", "nasline")):
        for path in ("/", "/api/2.0/mlflow/registered-models/search", "/ajax-api/2.0/mlflow/users/get?username=admin"):
            with pytest.raises(HTTPError) as error:
                running.mlflow_call(path, user, password)
            assert error.value.code == 401, (user, path)


def test_the_pipelines_user_is_no_administrator_of_mlflow(running: Running) -> None:
    password = running.secrets["MLFLOW_PIPELINE_PASSWORD"]
    assert isinstance(running.mlflow_call("/api/2.0/mlflow/registered-models/search", "nasline", password), dict)
    with pytest.raises(HTTPError) as error:
        running.mlflow_call("/api/2.0/mlflow/users/get?username=admin", "nasline", password)
    assert error.value.code == 403


def test_a_foreign_host_name_is_refused_by_mlflow_and_the_services_is_not(running: Running) -> None:
    password = running.secrets["MLFLOW_PIPELINE_PASSWORD"]
    path = "/api/2.0/mlflow/registered-models/search"
    running.mlflow_call(path, "nasline", password, Host="localhost:5000")
    with pytest.raises(HTTPError) as error:
        running.mlflow_call(path, "nasline", password, Host="evil.example.org")
    assert error.value.code == 403


def test_store_and_broker_ask_for_their_keys(running: Running) -> None:
    assert refused(f"{running.s3}/nasline?list-type=2") == 403
    from botocore.exceptions import ClientError

    with pytest.raises(ClientError, match="AccessDenied"):
        list(running.bucket().meta.client.list_objects_v2(Bucket="mlflow")["Contents"])
    port = running.services.instances["redis@one"].ports["6379"]
    ping = subprocess.run(["redis-cli", "-p", str(port), "ping"], capture_output=True, text=True)
    assert "NOAUTH" in ping.stdout
