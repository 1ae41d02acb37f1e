"""A few calls of Airflow's REST API, for tests against a running stack."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Callable
from typing import Any
from urllib.error import HTTPError
from urllib.parse import quote

from dag_helpers import wait_for
from services import Stack


class AirflowApi:
    """Logged in as the generated admin."""

    def __init__(self, stack: Stack) -> None:
        self._base = stack.airflow_url
        self.password = json.loads(stack.password_file.read_text(encoding="utf-8"))["admin"]
        login = {"username": "admin", "password": self.password}
        self._token = self._request("POST", "/auth/token", login, {})["access_token"]

    def call(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        """One request below /api/v2; an HTTP error raises, a 500 when it comes three times.

        Airflow 3.3.2 writes its audit log on the server's event loop, before it carries the request out. With SQLite
        that waits for the lock of a task's report which waits for the same loop, until SQLite gives up after 5 s.
        """
        for left in (2, 1, 0):
            try:
                return self._request(method, f"/api/v2{path}", body, {"Authorization": f"Bearer {self._token}"})
            except HTTPError as error:
                if error.code != 500 or not left:
                    raise
                print(f"500 to {method} {path}, once more")

    def _request(self, method: str, path: str, body: dict[str, Any] | None, headers: dict[str, str]) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            self._base + path, data, {"Content-Type": "application/json", **headers}, method=method
        )
        with urllib.request.urlopen(request, timeout=60) as response:
            return json.loads(response.read() or b"null")

    def unpause(self, dag_id: str) -> None:
        """Let the DAG run; waits until the DAG processor has found it."""
        assert wait_for(lambda: dag_id in {d["dag_id"] for d in self.call("GET", "/dags")["dags"]}, 60)
        self.call("PATCH", f"/dags/{dag_id}", {"is_paused": False})

    def trigger(self, dag_id: str, conf: dict[str, Any]) -> str:
        """Start a run; its id."""
        run = self.call("POST", f"/dags/{dag_id}/dagRuns", {"logical_date": None, "conf": conf})
        return str(run["dag_run_id"])

    def runs(self, dag_id: str) -> list[dict[str, Any]]:
        """All runs of a DAG, the newest first."""
        return list(self.call("GET", f"/dags/{dag_id}/dagRuns?order_by=-run_after")["dag_runs"])

    def run_state(self, dag_id: str, run_id: str) -> str:
        """State of a run."""
        return str(self.call("GET", f"/dags/{dag_id}/dagRuns/{quote(run_id)}")["state"])

    def task_states(self, dag_id: str, run_id: str) -> dict[str, str]:
        """State of each task; mapped ones as `label[0]`."""
        tasks = self.call("GET", f"/dags/{dag_id}/dagRuns/{quote(run_id)}/taskInstances")["task_instances"]
        return {t["task_id"] + (f"[{t['map_index']}]" if t["map_index"] >= 0 else ""): str(t["state"]) for t in tasks}

    def wait_for_end(self, dag_id: str, run_id: str, seconds: float) -> str:
        """The final state of a run."""
        finished: Callable[[], bool] = lambda: self.run_state(dag_id, run_id) in ("success", "failed")  # noqa: E731
        assert wait_for(finished, seconds), self.task_states(dag_id, run_id)
        return self.run_state(dag_id, run_id)
