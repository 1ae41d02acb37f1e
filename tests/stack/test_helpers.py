"""The small programs of the stack: secrets, health, and what is refused."""

from __future__ import annotations

import json
import stat
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


def test_secrets_are_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("POSTGRES_PASSWORD=mine\n")
    with pytest.raises(SystemExit, match="is there already, and a stack may run with its secrets"):
        make_secrets.write(REPOSITORY / ".env.example", tmp_path / ".env")
    assert (tmp_path / ".env").read_text() == "POSTGRES_PASSWORD=mine\n"


def test_airflow_is_not_prepared_without_an_administrator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AIRFLOW_ADMIN_USER", "admin")
    monkeypatch.setenv("AIRFLOW_ADMIN_PASSWORD", "")
    with pytest.raises(SystemExit, match="AIRFLOW_ADMIN_PASSWORD must be set"):
        airflow_init.main()
