"""`make up` and `make down`: Airflow standalone and the MLflow server on this machine's loopback.

    python stack/services.py up      start both, wait until they are healthy, print addresses and the login
    python stack/services.py down    stop what `up` started, and nothing else
    python stack/services.py status  say what runs

State lives in `.stack` (`--state`): Airflow's home with its SQLite database, logs, and a PID file per service.
Runs and models live in the workspace (`NASLINE_WORKSPACE`), so what `nasline` logged without a server is there too.
Standard library only: it runs before anything else works, and says what does not.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
START_SECONDS = 180.0
"""A loaded two-core machine needed 80 s until all of Airflow's parts were healthy."""


@dataclass(frozen=True)
class Stack:
    """Where the services keep their state and where they listen."""

    state: Path
    workspace: Path
    airflow_port: int = 8080
    mlflow_port: int = 5000
    dags: Path = REPOSITORY / "dags"

    @property
    def airflow_url(self) -> str:
        """Address of Airflow's UI and API."""
        return f"http://127.0.0.1:{self.airflow_port}"

    @property
    def mlflow_url(self) -> str:
        """Address of the MLflow server."""
        return f"http://127.0.0.1:{self.mlflow_port}"

    @property
    def airflow_home(self) -> Path:
        """AIRFLOW_HOME."""
        return self.state / "airflow"

    @property
    def password_file(self) -> Path:
        """Where Airflow writes the generated password of the user admin."""
        return self.airflow_home / "simple_auth_manager_passwords.json.generated"

    def _beside_airflow(self, distance: int) -> int:
        """A port that follows Airflow's, so that two stacks on one machine keep apart."""
        above = self.airflow_port + distance
        return above if above < 65536 else self.airflow_port - distance

    def environment(self) -> dict[str, str]:
        """Environment of both services; an AIRFLOW__ setting of the caller wins over the defaults here."""
        fixed = {
            "AIRFLOW_HOME": str(self.airflow_home),
            "AIRFLOW__CORE__DAGS_FOLDER": str(self.dags),
            "AIRFLOW__API__HOST": "127.0.0.1",
            "AIRFLOW__API__PORT": str(self.airflow_port),
            "AIRFLOW__API__BASE_URL": self.airflow_url,
            "AIRFLOW__CORE__EXECUTION_API_SERVER_URL": f"{self.airflow_url}/execution/",
            "AIRFLOW__LOGGING__WORKER_LOG_SERVER_PORT": str(self._beside_airflow(713)),  # 8793 beside 8080
            "AIRFLOW__LOGGING__TRIGGER_LOG_SERVER_PORT": str(self._beside_airflow(1713)),
            "MLFLOW_TRACKING_URI": self.mlflow_url,
            "NASLINE_WORKSPACE": str(self.workspace),
            "PYTHONPATH": os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")])),
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
        }
        return {**DEFAULTS, **os.environ, **fixed}


DEFAULTS = {
    "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
    "AIRFLOW__CORE__PARALLELISM": "4",  # the default forks 32 workers
    "AIRFLOW__DAG_PROCESSOR__REFRESH_INTERVAL": "10",  # the default sees a new DAG file after up to 300 s
    "AIRFLOW__DAG_PROCESSOR__MIN_FILE_PROCESS_INTERVAL": "10",
    "AIRFLOW__DAG_PROCESSOR__PRINT_STATS_INTERVAL": "0",
    "AIRFLOW__SCHEDULER__SCHEDULER_IDLE_SLEEP_TIME": "0.5",
    "AIRFLOW__WORKERS__MAX_FAILED_HEARTBEATS": "20",  # the API server may be away for minutes without a task's end
    "AIRFLOW__WORKERS__EXECUTION_API_RETRIES": "10",
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # seven more processes otherwise
    "MLFLOW_DISABLE_TELEMETRY": "true",
}


def up(stack: Stack) -> None:
    """Start what does not run yet and return when all of it is healthy.

    An Airflow of which a part has ended is started anew: `airflow standalone` starts its parts once and looks at none
    of them again, so that waiting for its health would only take until the end of the patience.

    Raises:
        SystemExit: the services run for another workspace; or one did not become healthy: its log's last lines
            are printed and the rest is stopped.
    """
    _refuse_another_workspace(stack)
    _stop_half_an_airflow(stack)
    for folder in (stack.state, stack.airflow_home, stack.workspace):
        folder.mkdir(parents=True, exist_ok=True)
    stack.state.chmod(0o700)  # Airflow's keys and the password lie here
    try:
        _ensure_running(stack, "mlflow", _mlflow_command(stack), _mlflow_healthy)
        if running_pid(stack, "airflow") is None:
            initialise_airflow(stack)
        _ensure_running(stack, "airflow", [_program("airflow"), "standalone"], _airflow_healthy)
    except BaseException:  # also Ctrl-C: half a stack must not stay behind
        down(stack)
        raise
    print(summary(stack))


def _refuse_another_workspace(stack: Stack) -> None:
    """A service keeps the workspace it was started with; that must not go unnoticed."""
    for name in ("airflow", "mlflow"):
        if running_pid(stack, name) is not None:
            workspace = json.loads(_pid_file(stack, name).read_text(encoding="utf-8")).get("workspace")
            if workspace != str(stack.workspace):
                raise SystemExit(f"{name} already runs for the workspace {workspace}; stop it with `make down` first")


def _stop_half_an_airflow(stack: Stack) -> None:
    pid = running_pid(stack, "airflow")
    if pid is not None and dead_children(pid):
        print(f"a part of airflow (pid {pid}) has ended, see {stack.state}/airflow.log; it is started anew")
        stop_session(pid, signal.SIGINT)


def down(stack: Stack) -> None:
    """Stop the services that `up` started, found by PID file."""
    for name, first in (("airflow", signal.SIGINT), ("mlflow", signal.SIGTERM)):
        pid = running_pid(stack, name)
        if pid is not None:
            stop_session(pid, first)
            print(f"{name} stopped (pid {pid})")
        _pid_file(stack, name).unlink(missing_ok=True)


def summary(stack: Stack) -> str:
    """Addresses, and where the login is."""
    return "\n".join(
        [
            f"Airflow  {stack.airflow_url}   user admin, password in {stack.password_file}",
            f"MLflow   {stack.mlflow_url}   no login, this machine only",
            f"workspace {stack.workspace}, logs in {stack.state}; stop both with `make down`",
        ]
    )


def initialise_airflow(stack: Stack) -> None:
    """Create or migrate Airflow's database and the pool of the training tasks, which must exist before a run."""
    log = stack.state / "airflow-init.log"
    with log.open("w") as output:
        code = subprocess.call(
            [sys.executable, str(REPOSITORY / "stack" / "airflow_database.py")],
            env=stack.environment(), cwd=REPOSITORY, stdout=output, stderr=subprocess.STDOUT,
        )  # fmt: skip
    if code:
        raise SystemExit(f"Airflow's database could not be prepared:\n{_tail(log)}")


def _ensure_running(stack: Stack, name: str, command: list[str], healthy: Callable[[Stack], bool]) -> None:
    if running_pid(stack, name) is None:
        if healthy(stack):
            raise SystemExit(
                f"another {name} answers on the port already; stop it, or choose a port (NASLINE_{name.upper()}_PORT)"
            )
        _launch(stack, name, command)
    deadline = time.monotonic() + START_SECONDS
    while not healthy(stack):
        if running_pid(stack, name) is None or time.monotonic() > deadline:
            log = stack.state / f"{name}.log"
            raise SystemExit(f"{name} did not become healthy; the end of {log}:\n{_tail(log)}")
        time.sleep(0.3)


def _launch(stack: Stack, name: str, command: list[str]) -> None:
    """Start a service in a session of its own, with SIGINT at its default: make starts us with it ignored at times."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with (stack.state / f"{name}.log").open("ab") as output:
            process = subprocess.Popen(
                command, env=stack.environment(), cwd=REPOSITORY, stdin=subprocess.DEVNULL,
                stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
    finally:
        signal.signal(signal.SIGINT, before)
    content = {"pid": process.pid, "started": start_time(process.pid), "workspace": str(stack.workspace)}
    _pid_file(stack, name).write_text(json.dumps(content), encoding="utf-8")


def _mlflow_command(stack: Stack) -> list[str]:
    store = ["--backend-store-uri", f"sqlite:///{stack.workspace}/mlflow.db"]
    artifacts = ["--artifacts-destination", str(stack.workspace / "mlflow-artifacts")]
    where = ["--host", "127.0.0.1", "--port", str(stack.mlflow_port), "--workers", "1"]
    return [_program("mlflow"), "server", *store, *artifacts, *where]


def _program(name: str) -> str:
    return str(Path(sys.executable).parent / name)


def _mlflow_healthy(stack: Stack) -> bool:
    return _get(f"{stack.mlflow_url}/health") == b"OK"


def _airflow_healthy(stack: Stack) -> bool:
    """All four parts: standalone goes on without an API server that could not bind its port."""
    answer = _get(f"{stack.airflow_url}/api/v2/monitor/health")
    if answer is None:
        return False
    parts = json.loads(answer)
    names = ("metadatabase", "scheduler", "triggerer", "dag_processor")
    return all(parts[name]["status"] == "healthy" for name in names)


def _get(url: str) -> bytes | None:
    try:
        with urllib.request.urlopen(url, timeout=3) as response:
            return bytes(response.read())
    except OSError:
        return None


def _tail(log: Path, lines: int = 15) -> str:
    return "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])


# processes ----------------------------------------------------------------------------------------------


def running_pid(stack: Stack, name: str) -> int | None:
    """The pid `up` wrote down, if that very process still lives (a pid is given again some day)."""
    try:
        content = json.loads(_pid_file(stack, name).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    pid = int(content["pid"])
    with suppress(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)
    return pid if start_time(pid) == content["started"] else None


def stop_session(leader: int, first: signal.Signals, patience: tuple[float, float, float] = (20, 10, 5)) -> None:
    """End a service and all processes of its session: `first` to the leader, then SIGTERM, then SIGKILL to all.

    By session and not by group: Airflow gives each running task a group of its own.
    """
    with suppress(ProcessLookupError):
        os.kill(leader, first)
    for number, seconds in zip((None, signal.SIGTERM, signal.SIGKILL), patience, strict=True):
        if number is not None:
            for pid in session_members(leader):
                with suppress(ProcessLookupError):
                    os.kill(pid, number)
        if _wait_until_empty(leader, seconds):
            return


def _wait_until_empty(leader: int, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while session_members(leader):
        if time.monotonic() > deadline:
            return False
        with suppress(ChildProcessError):
            os.waitpid(leader, os.WNOHANG)
        time.sleep(0.1)
    return True


def session_members(leader: int) -> list[int]:
    """Living processes (a zombie is dead) whose session is `leader`."""
    members = []
    for entry in Path("/proc").iterdir():
        fields = _stat(entry.name) if entry.name.isdigit() else None
        if fields and fields[0] != "Z" and int(fields[3]) == leader:
            members.append(int(entry.name))
    return members


def dead_children(parent: int) -> list[int]:
    """Children that have ended and were not asked for within a second: a service that starts each of its parts once has
    lost one.
    """
    found = _zombies(parent)
    if found:
        time.sleep(1.0)
    return [pid for pid in _zombies(parent) if pid in found] if found else []


def _zombies(parent: int) -> list[int]:
    stats = {int(entry.name): _stat(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()}
    return [pid for pid, fields in stats.items() if fields and fields[0] == "Z" and int(fields[1]) == parent]


def start_time(pid: int) -> str | None:
    """Clock ticks after boot at which the process started; None when it is dead."""
    fields = _stat(str(pid))
    return fields[19] if fields and fields[0] != "Z" else None


def _stat(pid: str) -> list[str] | None:
    """Fields 3 (state) and following of /proc/PID/stat, which begin after the last parenthesis."""
    try:
        text = Path("/proc", pid, "stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    return text.rpartition(")")[2].split()


def state_of(stack: Stack, name: str) -> str:
    """What `status` says of a service."""
    pid = running_pid(stack, name)
    if pid is None:
        return "not running"
    lost = ", but a part of it has ended; `make up` starts it anew" if dead_children(pid) else ""
    return f"running, pid {pid}{lost}"


def _pid_file(stack: Stack, name: str) -> Path:
    return stack.state / f"{name}.pid"


def main() -> None:
    """Read the command line and do as it says."""
    environment = os.environ
    parser = argparse.ArgumentParser(description="Airflow and MLflow on this machine's loopback.")
    parser.add_argument("action", choices=["up", "down", "status"])
    parser.add_argument("--state", type=Path, default=REPOSITORY / ".stack")
    parser.add_argument("--workspace", default=environment.get("NASLINE_WORKSPACE", ".nasline"))
    parser.add_argument("--airflow-port", type=int, default=int(environment.get("NASLINE_AIRFLOW_PORT", "8080")))
    parser.add_argument("--mlflow-port", type=int, default=int(environment.get("NASLINE_MLFLOW_PORT", "5000")))
    options = parser.parse_args()
    if "://" in options.workspace:
        parser.error(f"the workspace {options.workspace} is not on this machine; give a folder")
    stack = Stack(options.state.resolve(), Path(options.workspace).resolve(), options.airflow_port, options.mlflow_port)
    if options.action == "up":
        up(stack)
    elif options.action == "down":
        down(stack)
    else:
        for name in ("airflow", "mlflow"):
            print(f"{name}: {state_of(stack, name)}")


if __name__ == "__main__":
    main()
