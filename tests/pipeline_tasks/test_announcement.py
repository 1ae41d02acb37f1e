"""Versions told to a small real HTTP server that answers as Airflow's API does, and what happens when it does not."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from pipeline_tasks.__main__ import main
from pipeline_tasks.airflow_rest import PASSWORD, TOKEN, URL, USER
from pipeline_tasks.announcement import ASSET, announce, announce_added
from pipeline_tasks.errors import ConfigurationError, UnavailableError

SECRET = "hunter2-planted"


class Airflow(HTTPServer):
    """Assets, events and DAGs of Airflow 3's API, kept in lists."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.events: list[dict[str, Any]] = []
        self.requests: list[str] = []
        self.assets = [
            {"id": 4, "name": f"{ASSET}_other", "scheduled_dags": []},
            {"id": 7, "name": ASSET, "scheduled_dags": [{"dag_id": "retrain_yolo_nas"}]},
        ]
        self.paused = False
        self.status: int | None = None
        self.address = f"http://127.0.0.1:{self.server_port}"
        self.environment = {URL: self.address, USER: "ada", PASSWORD: SECRET}


class _Handler(BaseHTTPRequestHandler):
    server: Airflow

    def do_GET(self) -> None:
        self._answer(None)

    def do_POST(self) -> None:
        self._answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    def _answer(self, body: Any) -> None:
        server, where = self.server, urlsplit(self.path)
        server.requests.append(f"{self.command} {where.path}")
        if server.status is not None:
            self.send_response(server.status)
            self.send_header("Location", "http://127.0.0.1:1/")
            self.end_headers()
            return
        if where.path == "/auth/token":
            known = body == {"username": "ada", "password": SECRET}
            return self._send(201 if known else 401, {"access_token": "token-of-ada"} if known else {})
        if self.headers["Authorization"] != "Bearer token-of-ada":
            return self._send(401, {})
        return self._send(200, self._content(where.path, parse_qs(where.query), body))

    def _content(self, path: str, query: dict[str, list[str]], body: Any) -> Any:
        server = self.server
        if body is not None:
            server.events.append({"id": len(server.events) + 1, **body})
            return server.events[-1]
        if path == "/api/v2/assets":
            return {"assets": [one for one in server.assets if query["name_pattern"][0] in str(one["name"])]}
        if path == "/api/v2/assets/events":
            assert query["order_by"] == ["-timestamp"]
            chosen = [one for one in server.events if [str(one["asset_id"])] == query["asset_id"]]
            return {"asset_events": chosen[::-1]}
        return {"dag_id": path.rsplit("/", 1)[-1], "is_paused": server.paused}

    def _send(self, code: int, content: Any) -> None:
        data = json.dumps(content).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        """Silence."""


@pytest.fixture
def airflow() -> Iterator[Airflow]:
    server = Airflow()
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    folder = tmp_path / "cells"
    folder.mkdir()
    (folder / "notes.txt").write_text("first")
    return folder


def test_each_version_is_told_once_and_sets_are_kept_apart(airflow: Airflow, dataset: Path, tmp_path: Path) -> None:
    other = tmp_path / "wheels"
    other.mkdir()
    first = announce(dataset, environment=airflow.environment)
    assert announce(other, environment=airflow.environment).new
    repeated = announce(dataset, environment=airflow.environment)
    assert (first.new, repeated.new, repeated.event) == (True, False, first.event)
    (dataset / "notes.txt").write_text("second")
    assert announce(dataset, environment=airflow.environment).new
    (dataset / "notes.txt").write_text("first")
    assert announce(dataset, environment=airflow.environment).new  # back again: the data are others than the last ones
    assert announce(dataset, again=True, environment=airflow.environment).new
    told = [(event["asset_id"], event["extra"]["dataset"], event["extra"]["digest"]) for event in airflow.events]
    assert [name for _, name, _ in told] == ["cells", "wheels", "cells", "cells", "cells"]
    assert {asset for asset, _, _ in told} == {7}
    assert told[0] == told[3] == told[4] != told[2]


def test_secrets_may_stand_in_files(airflow: Airflow, dataset: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text(f"{SECRET}\n")
    environment = {URL: f"{airflow.address}/", USER: "ada", f"{PASSWORD}_FILE": str(secret)}
    assert announce(dataset, environment=environment).new
    secret.write_text("token-of-ada\n")
    airflow.requests.clear()
    assert announce(dataset, again=True, environment={URL: airflow.address, f"{TOKEN}_FILE": str(secret)}).new
    assert "POST /auth/token" not in airflow.requests


def test_a_paused_dag_is_told(airflow: Airflow, dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    airflow.paused = True
    with pytest.MonkeyPatch.context() as patch:
        for name, value in airflow.environment.items():
            patch.setenv(name, value)
        assert main(["data", "announce", str(dataset)]) == 0
    printed = capsys.readouterr().out
    assert (
        "announced cells " in printed and "WARNING retrain_yolo_nas is paused, so the event starts nothing" in printed
    )


@pytest.mark.parametrize(
    ("status", "sentence"),
    [
        (401, "refused the user of NASLINE_AIRFLOW_USER"),
        (403, "check the secret and the role"),
        (302, "sends to another address"),
        (404, "is it Airflow 3"),
        (503, "cannot answer now"),
    ],
)
def test_a_refusal_is_told_and_the_added_set_stays(
    airflow: Airflow, dataset: Path, status: int, sentence: str, caplog: pytest.LogCaptureFixture
) -> None:
    airflow.status = status
    with pytest.raises(UnavailableError if status == 503 else ConfigurationError, match=sentence):
        announce(dataset, environment=airflow.environment)
    announce_added(dataset, airflow.environment)
    assert "the set was added, but not announced" in caplog.text and "nasline data announce" in caplog.text
    assert SECRET not in caplog.text and airflow.events == []


def test_an_airflow_that_is_away_is_a_warning(
    airflow: Airflow, dataset: Path, caplog: pytest.LogCaptureFixture
) -> None:
    airflow.shutdown()
    airflow.server_close()
    announce_added(dataset, airflow.environment)
    assert "cannot be reached: [Errno 111] Connection refused" in caplog.text and SECRET not in caplog.text


def test_nothing_configured_is_a_hint(dataset: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        announce_added(dataset, {})
    assert [record.levelname for record in caplog.records] == ["INFO"]
    assert "NASLINE_AIRFLOW_URL is not set" in caplog.text


def test_no_asset_yet(airflow: Airflow, dataset: Path) -> None:
    airflow.assets.pop()
    with pytest.raises(ConfigurationError, match="has no asset nasline_dataset; it has one as soon as"):
        announce(dataset, environment=airflow.environment)


@pytest.mark.parametrize(
    ("environment", "sentence"),
    [
        ({}, "must be the address of Airflow"),
        ({URL: "ftp://127.0.0.1"}, "must be the address of Airflow"),
        ({URL: f"http://ada:{SECRET}@127.0.0.1"}, "must hold no user or password"),
        ({URL: "http://127.0.0.1:80"}, "nothing to log in with"),
        ({URL: "http://127.0.0.1:80", USER: "ada"}, "nothing to log in with"),
        (
            {URL: "http://127.0.0.1:80", f"{TOKEN}_FILE": "/nowhere/secret"},
            "NASLINE_AIRFLOW_TOKEN_FILE /nowhere/secret",
        ),
    ],
)
def test_unusable_settings(dataset: Path, environment: dict[str, str], sentence: str) -> None:
    with pytest.raises(ConfigurationError, match=sentence) as refused:
        announce(dataset, environment=environment)
    assert SECRET not in str(refused.value)


def test_a_server_that_is_no_airflow(airflow: Airflow, dataset: Path) -> None:
    airflow.assets = [{"name": ASSET}]
    with pytest.raises(ConfigurationError, match="does not answer as Airflow 3 does"):
        announce(dataset, environment=airflow.environment)
