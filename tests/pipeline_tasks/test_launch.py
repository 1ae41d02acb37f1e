"""Several processes for a step: how many, on which device, and whose failure counts."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline_tasks import launch
from pipeline_tasks.errors import ConfigurationError, UsageError
from pipeline_tasks.launch import Report, first_cause
from pipeline_tasks.steps import STEP_NAMES

UNDER_TORCHRUN = {"RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500", "LOCAL_RANK": "1"}


@pytest.fixture(autouse=True)
def own_environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in (*UNDER_TORCHRUN, "CUDA_VISIBLE_DEVICES", launch.REPORTS_VARIABLE, launch.LAUNCHER_VARIABLE):
        monkeypatch.delenv(name, raising=False)
    numbers = (signal.SIGTERM, signal.SIGINT)
    handlers = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, handlers, strict=True):
        signal.signal(number, handler)


def join(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in UNDER_TORCHRUN.items():
        monkeypatch.setenv(name, value)


def test_training_steps_are_steps() -> None:
    assert set(launch.TRAINING_STEPS) < set(STEP_NAMES)


def test_option_wins_over_the_parameter() -> None:
    assert (launch.count(None, 1), launch.count(None, 8), launch.count(2, 8), launch.count(1, 8)) == (1, 8, 2, 1)
    with pytest.raises(UsageError, match="--processes must be at least 1, got 0"):
        launch.count(0, 1)


def test_torchrun_of_the_users_is_joined_and_not_nested(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (launch.is_member(), launch.rank()) == (False, 0)
    join(monkeypatch)
    assert (launch.is_member(), launch.rank()) == (True, 1)
    assert launch.count(None, 8) == 1 and launch.count(4, 8) == 1
    with pytest.raises(UsageError, match="--processes 2 contradicts torchrun, which started 4; leave the option out"):
        launch.count(2, 1)


@pytest.mark.parametrize(("shown", "expected"), [(None, "1"), ("6,7", "7"), ("GPU-a,GPU-b,GPU-c", "GPU-b")])
def test_each_process_sees_the_device_of_its_place(
    monkeypatch: pytest.MonkeyPatch, shown: str | None, expected: str
) -> None:
    join(monkeypatch)
    if shown:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", shown)
    launch.own_device("cuda")
    assert os.environ["CUDA_VISIBLE_DEVICES"] == expected
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    launch.own_device("cpu")
    assert "CUDA_VISIBLE_DEVICES" not in os.environ


def test_impossible_devices_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    join(monkeypatch)
    with pytest.raises(ConfigurationError, match="'cuda:1' names one device for several processes; use cuda"):
        launch.own_device("cuda:1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    with pytest.raises(ConfigurationError, match="CUDA_VISIBLE_DEVICES=0 has no device for training process 2"):
        launch.own_device("cuda")


def test_report_is_left_for_the_command_and_only_for_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert not launch.report(65, "told to the user directly")
    join(monkeypatch)
    monkeypatch.setenv(launch.REPORTS_VARIABLE, str(tmp_path))
    assert launch.report(65, "bad data")
    content = json.loads((tmp_path / "1.json").read_text())
    assert (content["rank"], content["exit_code"], content["sentence"]) == (1, 65, "bad data")
    monkeypatch.setenv(launch.REPORTS_VARIABLE, str(tmp_path / "gone"))
    assert launch.report(65, "the command is gone"), "and this is no error"


BAD = Report(1, 65, "bad data", 10.2)
CRASH = Report(0, 1, "Traceback: connection closed", 10.3)
STOP = Report(0, 75, "told to stop", 10.3)


@pytest.mark.parametrize(
    ("ended", "reports", "exit_code", "words"),
    [
        # one refuses its data; the other loses it, or is stopped by the agent, or is killed because it hangs
        ({0: (1, 11), 1: (65, 10)}, [BAD, CRASH], 65, "bad data"),
        ({0: (75, 11), 1: (65, 10)}, [BAD, STOP], 65, "bad data"),
        ({0: (-9, 40), 1: (65, 10)}, [BAD], 65, "bad data"),
        # one is killed; the other loses it
        ({0: (1, 11), 1: (-9, 10)}, [CRASH], 75, "process 1 was ended by SIGKILL; run the same command again"),
        ({0: (75, 11), 1: (-11, 10)}, [STOP], 75, "process 1 was ended by SIGSEGV"),
        # an error of ours; the other hangs and is killed by the agent, 30 seconds later
        ({0: (1, 10), 1: (-9, 40)}, [CRASH], 1, "Traceback: connection closed"),
        # somebody stopped one process, which stops all
        ({0: (75, 10), 1: (75, 10)}, [STOP], 75, "told to stop"),
        ({0: (1, 11), 1: (75, 10)}, [Report(1, 75, "told to stop", 10.2), CRASH], 75, "told to stop"),
        # one ended before it could say anything
        ({1: (3, 10)}, [], 3, "process 1 ended with exit code 3; see what it wrote above"),
    ],
)
def test_first_failure_decides(
    ended: dict[int, tuple[int, float]], reports: list[Report], exit_code: int, words: str
) -> None:
    found, sentence = first_cause(ended, reports)
    assert found == exit_code and words in sentence


def test_processes_run_the_same_command(capfd: pytest.CaptureFixture[str]) -> None:
    before = dict(os.environ)
    assert launch.run(["params"], 2, "cpu") == 0
    assert capfd.readouterr().out.count("student_variant:") == 2
    added = {name: value for name, value in os.environ.items() if before.get(name) != value}
    assert set(added) <= {"TORCHELASTIC_SIGNALS_TO_HANDLE"}


def test_exit_code_and_sentence_are_those_of_the_processes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    words = ["teach", "--run", "nobody", "--workspace", str(tmp_path)]
    assert launch.run(words, 2, "cpu") == 2
    assert [record.message[:27] for record in caplog.records if record.levelname == "ERROR"] == [
        "run 'nobody' does not exist"
    ]
    streams = capfd.readouterr()
    assert "ERROR" not in streams.out + streams.err and "Traceback" not in streams.err


def test_more_processes_than_devices_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="64 processes need a CUDA device each, but torch finds"):
        launch.run(["params"], 64, "cuda")
