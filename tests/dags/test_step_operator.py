"""What the operator makes of a command: its argv, its words, its exit code, its end."""

from __future__ import annotations

import json
import logging
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from airflow.sdk import Param
from airflow.sdk.exceptions import AirflowException, AirflowFailException, AirflowSkipException
from dag_helpers import FakeNasline, is_alive, wait_for
from step_operator import (
    MlflowRunLink,
    StartOperator,
    StepOperator,
    changed_options,
    child_environment,
    raise_for_exit_code,
    retry_arguments,
    run_name,
    split_level,
    step_command,
)


class Xcoms:
    """Stands for Airflow's task instance; remembers what was pushed."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}

    def xcom_push(self, key: str, value: Any) -> None:
        """Store a value."""
        self.values[key] = value


def run_operator(operator: StepOperator, conf: dict[str, Any] | None = None) -> dict[str, Any]:
    """Execute outside Airflow; returns the XComs, also those pushed before an error."""
    xcoms = Xcoms()
    try:
        # `execute` warns when it is called without a task runner around it, which is what a unit test does.
        StepOperator.execute.__wrapped__(  # type: ignore[attr-defined]
            operator, {"ti": xcoms, "dag_run": SimpleNamespace(conf=conf)}
        )
    except AirflowException as error:
        error.xcoms = xcoms.values  # type: ignore[attr-defined]
        raise
    return xcoms.values


def kill_when(operator: StepOperator, condition: Callable[[], bool]) -> threading.Thread:
    """Call the operator's on_kill once the condition holds, as Airflow does from outside."""

    def kill() -> None:
        assert wait_for(condition)
        operator.on_kill()

    thread = threading.Thread(target=kill)
    thread.start()
    return thread


def test_argv_names_workspace_run_and_arguments(fake_nasline: FakeNasline, tmp_path: Path) -> None:
    run_operator(StepOperator(task_id="t", step="pretrain", run="manual__2026-11-21T10:00:00+00:00",
                              arguments=("--role", "student")))  # fmt: skip
    (call,) = fake_nasline.calls()
    assert call["argv"] == [
        "pretrain", "--workspace", str(tmp_path / "workspace"),
        "--run", run_name("manual__2026-11-21T10:00:00+00:00"), "--role", "student",
    ]  # fmt: skip


def test_form_values_reach_start_as_one_json_argument_and_no_shell(fake_nasline: FakeNasline, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    nasty = f"$(touch {victim}); `touch {victim}` && touch {victim} # '\" {{{{ 1 / 0 }}}}"
    form = {"distill.epochs": Param(3), "gate.minimum_map": Param(0.2)}
    operator = StartOperator(task_id="start", step="start", run="r", form=form)
    run_operator(operator,
                 {"start.dataset": nasty, "distill.epochs": 3, "gate.minimum_map": 0.5, "typo": None})  # fmt: skip
    (call,) = fake_nasline.calls("start")
    assert call["argv"][-2] == "--options-json"
    assert json.loads(call["argv"][-1]) == {"start.dataset": nasty, "gate.minimum_map": 0.5, "typo": None}
    assert not victim.exists()


def test_unchanged_values_stay_with_the_parameter_file() -> None:
    defaults = {"a": None, "b": 1, "c": [1]}
    assert changed_options({"a": None, "b": 1, "c": [1]}, defaults) == {}
    assert changed_options({"a": 0, "b": 2, "c": None, "d": 1}, defaults) == {"a": 0, "b": 2, "c": None, "d": 1}


def test_reference_and_link_are_all_that_travels(fake_nasline: FakeNasline) -> None:
    fake_nasline.plan(teach=[{"say": "10:20:30 INFO teach published: key abc"}])
    operator = StepOperator(task_id="t", step="teach", run="r")
    pushed = run_operator(operator)
    url = "http://127.0.0.1:5000/#/experiments/1/runs/teach"
    assert pushed == {
        "_link_MlflowRunLink": url,
        "reference": {"run": "r", "step": "teach", "key": "key-of-teach", "reused": False,
                      "sentence": "teach published: key abc"},
    }  # fmt: skip
    assert MlflowRunLink().get_link(operator, ti_key=None) == url


def test_lines_keep_their_level() -> None:
    assert split_level("10:20:30 WARNING spread 4.1 is high") == (logging.WARNING, "spread 4.1 is high")
    assert split_level("Traceback (most recent call last):") == (logging.INFO, "Traceback (most recent call last):")


@pytest.mark.parametrize("code", [2, 65, 78, 1, 127])
def test_what_no_retry_cures_fails_at_once_with_the_steps_sentence(fake_nasline: FakeNasline, code: int) -> None:
    sentence = "boxes: box 7 of image a.jpg has no area"
    fake_nasline.plan(validate_data=[{"exit": code, "say": f"10:20:30 ERROR {sentence}"}])
    with pytest.raises(AirflowFailException) as error:
        run_operator(StepOperator(task_id="t", step="validate_data", run="r"))
    assert str(error.value).startswith(sentence)
    assert f"exit {code}" in str(error.value)


@pytest.mark.parametrize("code", [69, 75, -signal.SIGKILL, -signal.SIGSEGV])
def test_what_a_retry_may_cure_is_retried(code: int) -> None:
    with pytest.raises(AirflowException) as error:
        raise_for_exit_code("teach", code, "the tracking server is away")
    assert not isinstance(error.value, AirflowFailException | AirflowSkipException)
    assert "the tracking server is away" in str(error.value)


def test_rejection_skips_and_still_says_why(fake_nasline: FakeNasline) -> None:
    fake_nasline.plan(gate=[{"exit": 99, "say": "10:20:30 INFO rejected: mAP 0.31 is below 0.50"}])
    with pytest.raises(AirflowSkipException, match=r"^rejected: mAP 0.31 is below 0.50$") as error:
        run_operator(StepOperator(task_id="t", step="gate", run="r"))
    xcoms = error.value.xcoms  # type: ignore[attr-defined]
    assert xcoms["reference"]["sentence"] == "rejected: mAP 0.31 is below 0.50"


def test_a_command_that_does_not_exist_names_the_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NASLINE_COMMAND", "/nowhere/nasline")
    with pytest.raises(AirflowFailException, match=r"/nowhere/nasline.*check NASLINE_COMMAND"):
        run_operator(StepOperator(task_id="t", step="teach", run="r"))


def test_on_kill_stops_the_step_and_the_task_ends(fake_nasline: FakeNasline) -> None:
    fake_nasline.plan(teach=[{"seconds": 60, "helper": True}])
    operator = StepOperator(task_id="t", step="teach", run="r")
    killer = kill_when(operator, lambda: bool(fake_nasline.calls()))
    with pytest.raises(AirflowException, match="SIGTERM"):
        run_operator(operator)
    killer.join()
    (call,) = fake_nasline.calls()
    assert not is_alive(call["pid"])


def test_a_stubborn_step_is_killed_after_the_grace(fake_nasline: FakeNasline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NASLINE_KILL_GRACE_SECONDS", "0.5")
    fake_nasline.plan(teach=[{"seconds": 60, "stubborn": True}])
    operator = StepOperator(task_id="t", step="teach", run="r")
    killer = kill_when(operator, lambda: operator.mlflow_url != "")
    with pytest.raises(AirflowException, match="SIGKILL"):
        run_operator(operator)
    killer.join()


def test_a_time_out_leaves_no_step_behind(fake_nasline: FakeNasline) -> None:
    fake_nasline.plan(teach=[{"seconds": 60}])

    def time_out(number: int, frame: Any) -> None:
        raise TimeoutError("execution_timeout")  # as Airflow's own alarm handler does

    before = signal.signal(signal.SIGALRM, time_out)
    signal.setitimer(signal.ITIMER_REAL, 2)
    try:
        with pytest.raises(TimeoutError):
            run_operator(StepOperator(task_id="t", step="teach", run="r"))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    (call,) = fake_nasline.calls()
    assert not is_alive(call["pid"])


def test_the_step_does_not_see_airflows_settings(fake_nasline: FakeNasline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AIRFLOW__DATABASE__SQL_ALCHEMY_CONN", "postgresql://user:secret@db/airflow")
    run_operator(StepOperator(task_id="t", step="teach", run="r"))
    assert fake_nasline.calls()[0]["airflow_settings"] == []
    kept = child_environment({"AIRFLOW__A": "1", "_AIRFLOW_B": "2", "AIRFLOW_HOME": "h", "MLFLOW_TRACKING_URI": "u"})
    assert {"AIRFLOW_HOME": "h", "MLFLOW_TRACKING_URI": "u"}.items() <= kept.items()
    assert not {"AIRFLOW__A", "_AIRFLOW_B"} & set(kept)


def test_a_step_waits_for_another_run_that_does_the_same_work() -> None:
    assert float(child_environment({})["NASLINE_LEASE_WAIT_SECONDS"]) > 24 * 3600
    assert child_environment({"NASLINE_LEASE_WAIT_SECONDS": "5"})["NASLINE_LEASE_WAIT_SECONDS"] == "5"


def test_a_workspace_in_an_object_store_is_passed_on_as_it_is(
    fake_nasline: FakeNasline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NASLINE_WORKSPACE", "s3://bucket/nasline")
    run_operator(StepOperator(task_id="t", step="teach", run="r"))
    assert fake_nasline.calls()[0]["argv"][1:3] == ["--workspace", "s3://bucket/nasline"]


def test_run_names_are_file_names_and_differ_when_ids_differ() -> None:
    assert run_name("demo-1.2_a") == "demo-1.2_a"
    assert run_name("asset_triggered__2026-11-21T10:00:00.1+00:00_ab").startswith("20261121-100000-asset_triggered-")
    stamps = ["manual__2026-11-21T10:00:00+00:00", "manual__2026-11-21T10:00:00-00:00"]
    ids = [*stamps, "a/../b", "a/./b", "über", "/", "x" * 300]
    names = [run_name(run_id) for run_id in ids]
    assert len(set(names)) == len(ids)
    from pipeline_tasks.workspace import RUN_ID

    assert all(RUN_ID.fullmatch(name) and ".." not in name.split("/") for name in names)


def test_command_is_split_once_and_defaults_to_this_interpreter() -> None:
    import sys

    assert step_command({"NASLINE_COMMAND": "/opt/train/bin/nasline"}) == ["/opt/train/bin/nasline"]
    assert step_command({"NASLINE_COMMAND": "nice -n 5 'my nasline'"}) == ["nice", "-n", "5", "my nasline"]
    assert step_command({}) == [sys.executable, "-m", "pipeline_tasks"]


def test_retries_wait_at_least_a_minute_and_back_off() -> None:
    arguments = retry_arguments({})
    assert arguments["retry_delay"].total_seconds() >= 60
    assert arguments["retry_exponential_backoff"] > 1  # True would be 1: Airflow 3.3 multiplies by it
    total = sum(60 * arguments["retry_exponential_backoff"] ** n for n in range(arguments["retries"]))
    assert total > 300  # an API server that is away for five minutes does not use them up
    assert retry_arguments({"NASLINE_RETRY_SECONDS": "1"})["retry_delay"].total_seconds() == 1


def test_environment_is_left_as_it_was(fake_nasline: FakeNasline) -> None:
    before = dict(os.environ)
    run_operator(StepOperator(task_id="t", step="teach", run="r"))
    assert dict(os.environ) == before
