"""The small programs of the stack: secrets, health, and what is refused."""

from __future__ import annotations

import json
import os
import re
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import airflow_init
import health
import make_secrets
import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
PARTS = {"triggerer": {"status": "healthy"}, "dag_processor": {"status": "unhealthy"}}


@pytest.fixture
def airflow_page() -> Iterator[str]:
    """A page like the one of Airflow's API server; any path but /health is missing."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/health" else 503)
            self.end_headers()
            self.wfile.write(json.dumps(PARTS).encode())

        def log_message(self, *_: object) -> None:
            """Silence."""

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_health_is_what_the_page_says(airflow_page: str) -> None:
    assert health.complaint(f"{airflow_page}/health") == ""
    assert health.complaint(f"{airflow_page}/health", "triggerer") == ""
    assert health.complaint(f"{airflow_page}/health", "dag_processor").endswith("dag_processor is unhealthy")
    assert "503" in health.complaint(f"{airflow_page}/elsewhere")
    assert "scheduler" in health.complaint(f"{airflow_page}/health", "scheduler")


def test_a_silent_service_is_not_healthy() -> None:
    assert "127.0.0.1:9" in health.complaint("http://127.0.0.1:9/health")


def test_secrets_are_random_complete_and_for_the_owner_alone(tmp_path: Path) -> None:
    from cryptography.fernet import Fernet

    example = REPOSITORY / ".env.example"
    written = [dict(line.split("=", 1) for line in settings(example, tmp_path / name)) for name in ("one", "two")]
    empty = make_secrets.EMPTY.findall(example.read_text())
    assert len(empty) >= 14
    values = [entry[name] for entry in written for name in empty]
    assert len(set(values)) == len(values) and all(len(value) >= 40 for value in values)
    Fernet(written[0]["AIRFLOW_FERNET_KEY"])
    assert all(value.isalnum() for name, value in written[0].items() if name in empty and "FERNET" not in name)
    assert stat.S_IMODE((tmp_path / "one").stat().st_mode) == 0o600


def settings(example: Path, target: Path) -> list[str]:
    """The assignments of a settings file made from the example."""
    make_secrets.write(example, target)
    return [line for line in target.read_text().splitlines() if line and not line.startswith("#")]


def test_secrets_are_never_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_secrets.write(REPOSITORY / ".env.example", tmp_path / ".env")
    before = (tmp_path / ".env").read_text()
    make_secrets.write(REPOSITORY / ".env.example", tmp_path / ".env")
    assert "is there already with every secret and was left as it is" in capsys.readouterr().out
    assert (tmp_path / ".env").read_text() == before


def test_secrets_that_an_older_file_lacks_are_added_behind_what_it_has(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As Compose says of a missing one: run make secrets, which writes it to .env."""
    target = tmp_path / ".env"
    make_secrets.write(REPOSITORY / ".env.example", target)
    older = target.read_text().replace("POSTGRES_PASSWORD=", "export POSTGRES_PASSWORD = ").rstrip("\n")
    lines = [line for line in older.splitlines() if not line.startswith("AIRFLOW_PIPELINE_PASSWORD=")]
    older = "\n".join(re.sub("^(MLFLOW_SESSION_KEY=).*", r"\1", line) for line in lines)
    target.write_text(older)
    capsys.readouterr()
    make_secrets.write(REPOSITORY / ".env.example", target)
    assert target.read_text().startswith(f"{older}\n")
    added = dict(line.split("=") for line in target.read_text().removeprefix(f"{older}\n").splitlines())
    assert list(added) == ["AIRFLOW_PIPELINE_PASSWORD", "MLFLOW_SESSION_KEY"]
    assert all(len(value) == 40 for value in added.values())
    said = capsys.readouterr().out
    assert "added AIRFLOW_PIPELINE_PASSWORD, MLFLOW_SESSION_KEY, which it lacked" in said
    assert not any(value in said for value in added.values())
    assert stat.S_IMODE(target.stat().st_mode) == 0o600


@pytest.mark.parametrize("missing", ["AIRFLOW_ADMIN_PASSWORD", "AIRFLOW_PIPELINE_PASSWORD"])
def test_airflow_is_not_prepared_without_its_users(monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    for name in ("AIRFLOW_ADMIN", "AIRFLOW_PIPELINE"):
        monkeypatch.setenv(f"{name}_USER", "somebody")
        monkeypatch.setenv(f"{name}_PASSWORD", "" if f"{name}_PASSWORD" == missing else "secret")
    with pytest.raises(SystemExit, match=f"{missing} must be set"):
        airflow_init.main()


RIGHTS = """
import sys
sys.path.insert(0, sys.argv[1])
from airflow_init import ensure_users
from airflow.utils.db import initdb
initdb()
for password in ("first", "second"):
    print("|".join(ensure_users(("admin", password), ("nasline", password))))
from airflow.api_fastapi.app import create_app, get_auth_manager
create_app()
from airflow.api_fastapi.auth.managers.models.resource_details import DagAccessEntity, DagDetails
from airflow.providers.fab.auth_manager.cli_commands.utils import get_application_builder
with get_application_builder() as builder:
    user = builder.sm.find_user("nasline")
    ask = get_auth_manager().is_authorized_dag
    for dag in ("train_yolo_nas", "retrain_yolo_nas", "promote_or_rollback", "evaluate_champion"):
        for method, entity in (("PUT", "TASK_INSTANCE"), ("GET", "TASK_INSTANCE"), ("POST", "RUN"), ("DELETE", "RUN")):
            if ask(method=method, access_entity=DagAccessEntity[entity], details=DagDetails(id=dag), user=user):
                print("may", method, entity, dag)
    print("reads DAGs" if ask(method="GET", user=user) else "reads none")
    manager = get_auth_manager()
    print("may more" if manager.is_authorized_variable(method="GET", user=user) else "reads no variables")
"""


@pytest.mark.slow
def test_the_pipelines_user_of_airflow_may_write_notes_on_its_chains_and_nothing_else(tmp_path: Path) -> None:
    environment = {
        **os.environ,
        "AIRFLOW_HOME": str(tmp_path),
        "AIRFLOW__CORE__AUTH_MANAGER": "airflow.providers.fab.auth_manager.fab_auth_manager.FabAuthManager",
        "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
    }
    told = subprocess.run(
        [sys.executable, "-c", RIGHTS, str(REPOSITORY / "stack")], env=environment, capture_output=True, text=True
    )
    assert told.returncode == 0, told.stderr
    lines = told.stdout.splitlines()
    assert "user admin made, with the role Admin|user nasline made, with the role Nasline" in lines
    assert sum("its password is the one of this environment" in line for line in lines) == 1, "both in one line"
    may = [line for line in lines if line.startswith("may ")]
    assert may == ["may PUT TASK_INSTANCE train_yolo_nas", "may PUT TASK_INSTANCE retrain_yolo_nas"]
    assert "reads no variables" in lines
