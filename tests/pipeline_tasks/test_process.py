"""A step dies with its Airflow task, and stops in order when told to."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from pipeline_tasks.__main__ import main
from pipeline_tasks.errors import TemporaryError
from pipeline_tasks.process import LAUNCHER_VARIABLE, PARENT_VARIABLE, Stopper, die_with_parent, end_undisturbed

CHILD = textwrap.dedent(
    """
    import sys, time
    from pipeline_tasks.process import Stopper, die_with_parent
    stopper = Stopper(); stopper.install(); die_with_parent()
    with stopper.cooperative():
        print("ready", flush=True)
        while not stopper.requested():
            time.sleep(0.02)
            print("step", flush=True)
    open(sys.argv[1], "w").write("checkpoint")
    """
)
PARENT = textwrap.dedent(
    """
    import os, subprocess, sys, time
    child = subprocess.Popen(
        [sys.executable, "-c", sys.argv[2], sys.argv[1]], stdout=subprocess.PIPE, text=True,
        env={**os.environ, sys.argv[3]: str(os.getpid())})
    child.stdout.readline()
    print(child.pid, flush=True)
    time.sleep(60)
    """
)


def is_running(pid: int) -> bool:
    """A zombie is dead: the state comes from /proc."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):  # gone before the file was opened, or before it was read
        return False


def wait_until_gone(pid: int, seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while is_running(pid):
        assert time.monotonic() < deadline, f"process {pid} is still running"
        time.sleep(0.05)


def kill_parent(mark: Path, variable: str) -> None:
    """Kill the parent of a child that had the variable, and wait for the child's end."""
    words = [sys.executable, "-c", PARENT, str(mark), CHILD, variable]
    parent = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    wait_until_gone(child)


def test_child_of_a_killed_task_checkpoints_and_ends(tmp_path: Path) -> None:
    kill_parent(tmp_path / "mark", PARENT_VARIABLE)
    assert (tmp_path / "mark").read_text() == "checkpoint"


def test_training_process_of_a_killed_command_ends_at_once(tmp_path: Path) -> None:
    """The command passes every other signal on and waits; who kills it has waited long enough."""
    kill_parent(tmp_path / "mark", LAUNCHER_VARIABLE)
    assert not (tmp_path / "mark").exists()


def test_without_the_operators_request_nothing_is_asked_of_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(PARENT_VARIABLE, raising=False)
    die_with_parent()


def test_a_parent_that_is_gone_already_is_noticed() -> None:
    script = "from pipeline_tasks.process import die_with_parent; die_with_parent()"
    environment = {**os.environ, PARENT_VARIABLE: "1"}
    result = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert "the process 1 that started this step is gone" in result.stderr


def test_signal_outside_a_training_loop_interrupts() -> None:
    stopper = Stopper()
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    stopper.install()
    try:
        with pytest.raises(TemporaryError, match="told to stop by SIGTERM; nothing was published"):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)
    finally:
        signal.signal(signal.SIGTERM, before[0])
        signal.signal(signal.SIGINT, before[1])


def test_signal_inside_a_training_loop_only_raises_the_flag() -> None:
    stopper = Stopper()
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    stopper.install()
    try:
        with stopper.cooperative():
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.05)
        assert stopper.requested()
    finally:
        signal.signal(signal.SIGTERM, before[0])
        signal.signal(signal.SIGINT, before[1])


def test_signals_no_longer_disturb_a_process_that_says_how_it_ended() -> None:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        end_undisturbed()
        assert all(signal.getsignal(number) is handler for number, handler in before.items()), "not a Stopper's"
        Stopper().install()
        end_undisturbed()
        os.kill(os.getpid(), signal.SIGTERM)  # a Stopper would raise here
        os.kill(os.getpid(), signal.SIGINT)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_ctrl_c_ends_a_command_with_a_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted() -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr("pipeline_tasks.parameter_file.parameter_file", interrupted)
    assert main(["params"]) == 130
    assert "interrupted by Ctrl-C" in capsys.readouterr().out


def test_an_interruption_that_a_library_took_for_its_own_error_is_told_as_one() -> None:
    stopper = Stopper()
    stopper.install()
    with pytest.raises(TemporaryError, match="told to stop; nothing was published"), stopper.told_apart():
        try:
            signal.raise_signal(signal.SIGTERM)
        except TemporaryError as error:
            raise AttributeError("partially initialized module") from error
    with pytest.raises(KeyError), Stopper().told_apart():
        raise KeyError("not told to stop")
