"""Starting and stopping: only what was started, all of it, and never a process that got the same number."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent / "stack"))
import services

STUBBORN = """
import os, signal, sys, time
if os.fork() == 0:
    os.setpgid(0, 0)  # as Airflow does with each running task
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    print(os.getpid(), flush=True)
time.sleep(60)
"""


def session(program: str) -> subprocess.Popen[str]:
    """A process in a session of its own."""
    return subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, start_new_session=True)


def test_a_session_ends_with_its_stubborn_members_of_other_groups() -> None:
    leader = session(STUBBORN)
    assert leader.stdout is not None
    stubborn = int(leader.stdout.readline())
    assert sorted(services.session_members(leader.pid)) == sorted([leader.pid, stubborn])
    services.stop_session(leader.pid, signal.SIGTERM, patience=(0.3, 0.3, 5))
    assert services.session_members(leader.pid) == []
    assert services.start_time(stubborn) is None
    leader.stdout.close()


def test_a_service_that_obeys_is_not_killed() -> None:
    program = (
        "import signal, sys, time\nsignal.signal(2, lambda *_: print('bye') or sys.exit())\nprint('up', flush=True)\n"
    )
    leader = session(program + "time.sleep(60)")
    assert leader.stdout is not None
    leader.stdout.readline()
    services.stop_session(leader.pid, signal.SIGINT)
    assert leader.stdout.read() == "bye\n"
    leader.stdout.close()


def test_a_reused_pid_is_not_ours(tmp_path: Path) -> None:
    stack = services.Stack(tmp_path, tmp_path / "workspace")
    assert services.running_pid(stack, "mlflow") is None
    record = {"pid": os.getpid(), "started": services.start_time(os.getpid())}
    (tmp_path / "mlflow.pid").write_text(json.dumps(record))
    assert services.running_pid(stack, "mlflow") == os.getpid()
    (tmp_path / "mlflow.pid").write_text(json.dumps({**record, "started": "1"}))
    assert services.running_pid(stack, "mlflow") is None
    services.down(stack)  # we are still here
    assert not (tmp_path / "mlflow.pid").exists()


def test_a_damaged_pid_file_names_nobody(tmp_path: Path) -> None:
    (tmp_path / "airflow.pid").write_text("")
    assert services.running_pid(services.Stack(tmp_path, tmp_path), "airflow") is None


def test_a_dead_process_has_no_start_time() -> None:
    process = session("pass")
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # a zombie now
    assert services.start_time(process.pid) is None
    process.wait()
    assert process.stdout is not None
    process.stdout.close()


def test_settings_of_the_caller_win_but_not_over_where_things_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AIRFLOW__CORE__PARALLELISM", "9")
    monkeypatch.setenv("AIRFLOW_HOME", "/elsewhere")
    environment = services.Stack(tmp_path, tmp_path / "w", 18080, 15000).environment()
    assert environment["AIRFLOW__CORE__PARALLELISM"] == "9"
    assert environment["AIRFLOW_HOME"] == str(tmp_path / "airflow")
    assert environment["NASLINE_WORKSPACE"] == str(tmp_path / "w")
    assert environment["MLFLOW_TRACKING_URI"] == "http://127.0.0.1:15000"


def test_a_foreign_server_on_the_port_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(services, "_mlflow_healthy", lambda stack: True)
    with pytest.raises(SystemExit, match="another mlflow answers"):
        services.up(services.Stack(tmp_path / "s", tmp_path / "w"))


def test_running_services_keep_their_workspace_and_say_so(tmp_path: Path) -> None:
    record = {"pid": os.getpid(), "started": services.start_time(os.getpid()), "workspace": "/data/first"}
    (tmp_path / "mlflow.pid").write_text(json.dumps(record))
    with pytest.raises(SystemExit, match="already runs for the workspace /data/first"):
        services.up(services.Stack(tmp_path, tmp_path / "second"))
    assert (tmp_path / "mlflow.pid").exists()  # and nothing was stopped


def test_a_workspace_in_an_object_store_is_refused(tmp_path: Path) -> None:
    command = [sys.executable, services.__file__, "status", "--state", str(tmp_path), "--workspace", "s3://bucket/x"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1].endswith("the workspace s3://bucket/x is not on this machine; give a folder")


def test_two_stacks_on_a_machine_serve_logs_on_ports_of_their_own(tmp_path: Path) -> None:
    names = [f"AIRFLOW__LOGGING__{which}_LOG_SERVER_PORT" for which in ("WORKER", "TRIGGER")]
    found = [services.Stack(tmp_path, tmp_path, port, 5000).environment() for port in (8080, 8081, 65535)]
    assert found[0][names[0]] == "8793", "as Airflow has it"
    ports = [int(environment[name]) for environment in found for name in names]
    assert len(set(ports)) == 6 and max(ports) < 65536


PARENT_OF_A_DEAD_PART = """
import os, signal, time
signal.signal(signal.SIGINT, signal.SIG_DFL)  # ignored where a shell runs the tests in its background
part = os.fork()
if part == 0:
    os._exit(0)
os.waitid(os.P_PID, part, os.WEXITED | os.WNOWAIT)
print("up", flush=True)
time.sleep(60)
"""


def test_an_airflow_of_which_a_part_has_ended_is_stopped_before_it_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`airflow standalone` lives on beside a scheduler that was killed, and its health never comes back."""
    stack = services.Stack(tmp_path, tmp_path / "workspace")
    leader = session(PARENT_OF_A_DEAD_PART)
    assert leader.stdout is not None
    leader.stdout.readline()
    content = {"pid": leader.pid, "started": services.start_time(leader.pid), "workspace": str(stack.workspace)}
    (tmp_path / "airflow.pid").write_text(json.dumps(content))
    assert services.state_of(stack, "airflow").endswith("but a part of it has ended; `make up` starts it anew")
    started: list[str] = []

    def ensure(stack: services.Stack, name: str, *_: object) -> None:
        started.append(f"{name} {services.running_pid(stack, name)}")

    monkeypatch.setattr(services, "_ensure_running", ensure)
    monkeypatch.setattr(services, "initialise_airflow", lambda _: None)
    services.up(stack)
    assert started == ["mlflow None", "airflow None"], "stopped, so that it is started"
    assert "it is started anew" in capsys.readouterr().out
    leader.wait()
    leader.stdout.close()


def test_an_airflow_whose_parts_live_is_left_alone(tmp_path: Path) -> None:
    leader = session("import os, time\nif os.fork():\n  print('up', flush=True)\ntime.sleep(60)\n")
    assert leader.stdout is not None
    leader.stdout.readline()
    assert services.dead_children(leader.pid) == []
    services.stop_session(leader.pid, signal.SIGTERM, patience=(0.3, 0.3, 5))
    leader.stdout.close()
