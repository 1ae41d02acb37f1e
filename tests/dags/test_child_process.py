"""A step's process: its lines arrive, it goes when it is told to, and it does not outlive its Airflow task."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from child_process import ChildProcess
from dag_helpers import is_alive, wait_for

REPOSITORY = Path(__file__).resolve().parent.parent.parent


def python(program: str) -> ChildProcess:
    """A child that runs a few lines of Python."""
    return ChildProcess([sys.executable, "-u", "-c", program], {**os.environ, "PYTHONPATH": str(REPOSITORY)})


def test_lines_of_both_streams_arrive_as_they_are_written(tmp_path: Path) -> None:
    go_on = tmp_path / "go_on"
    child = python(
        "import os, sys, time; print('one'); print('two', file=sys.stderr)\n"
        f"while not os.path.exists({str(go_on)!r}): time.sleep(0.01)\n"
        "print('three')"
    )
    lines = child.lines()
    assert [next(lines), next(lines)] == ["one", "two"]
    assert is_alive(child.pid)  # the first lines came while it was still at work
    go_on.touch()
    assert list(lines) == ["three"]
    assert child.wait() == 0


def test_bytes_that_are_no_text_do_not_end_the_task() -> None:
    child = python("import sys; sys.stdout.buffer.write(b'ok \\xff\\n')")
    assert list(child.lines()) == ["ok �"]
    assert child.wait() == 0


def test_of_a_progress_bar_the_last_state_is_kept() -> None:
    child = python("print('10 %\\r50 %\\r100 %')")
    assert list(child.lines()) == ["100 %"]
    child.wait()


def test_child_gets_no_input_and_the_parents_pid() -> None:
    child = python("import os, sys; print(repr(sys.stdin.read()), os.environ['NASLINE_DIE_WITH_PARENT'], os.getsid(0))")
    assert list(child.lines()) == [f"'' {os.getpid()} {child.pid}"]
    child.wait()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGKILL, -9), (signal.SIGTERM, -15)])
def test_exit_code_of_a_signal_is_negative(number: signal.Signals, code: int) -> None:
    child = python("import time; print('up'); time.sleep(60)")
    next(child.lines())
    os.kill(child.pid, number)
    assert child.wait() == code


def test_helpers_of_a_dead_step_neither_live_on_nor_keep_the_task_waiting() -> None:
    child = python(
        "import os, signal, subprocess, sys\n"
        "print(subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']).pid)\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    (line,) = list(child.lines())  # would wait a minute: the helper holds the pipe open
    assert child.wait() == -9
    assert wait_for(lambda: not is_alive(int(line)))


def test_asked_to_stop_a_step_may_finish_its_checkpoint() -> None:
    child = python(
        "import signal, sys, time\n"
        "def stop(number, frame): print('checkpoint written'); sys.exit(75)\n"
        "signal.signal(signal.SIGTERM, stop); print('up'); time.sleep(60)"
    )
    lines = child.lines()
    next(lines)
    child.ask_to_stop(grace_seconds=10)
    assert list(lines) == ["checkpoint written"]
    assert child.wait() == 75


def test_a_step_that_ignores_the_request_is_killed_after_the_grace() -> None:
    child = python("import signal, time; signal.signal(15, signal.SIG_IGN); print('up'); time.sleep(60)")
    lines = child.lines()
    next(lines)
    began = time.monotonic()
    child.ask_to_stop(grace_seconds=0.5)
    assert list(lines) == []
    assert child.wait() == -9
    assert 0.5 <= time.monotonic() - began < 10


PARENT = """
import os, sys
from child_process import ChildProcess
child = ChildProcess([sys.executable, "-u", "-c", sys.argv[1]], dict(os.environ))
for line in child.lines():
    print(line, flush=True)
"""
STEP = """
import os, time
from pipeline_tasks.process import die_with_parent
die_with_parent()
print(os.getpid())
time.sleep(60)
"""


def test_kill_9_of_the_airflow_task_takes_the_step_along() -> None:
    path = os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "dags")])
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, STEP], env={**os.environ, "PYTHONPATH": path}, stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    step = int(parent.stdout.readline())
    assert is_alive(step)
    parent.kill()
    parent.wait()
    assert wait_for(lambda: not is_alive(step))
    parent.stdout.close()
