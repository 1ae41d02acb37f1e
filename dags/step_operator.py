"""Airflow's side of the contract with the steps: start the command, pass its words on, map its exit code.

A step is a program of its own (`nasline STEP`), so the scheduler's and the task's processes never import torch. Of
a step's result only a reference travels through XCom: run, step, key and a few metrics.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shlex
import signal
import sys
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, ClassVar, Protocol

from airflow.sdk import BaseOperator, BaseOperatorLink, Param
from airflow.sdk.exceptions import AirflowException, AirflowFailException, AirflowSkipException
from child_process import ChildProcess

RESULT_PREFIX = "NASLINE_RESULT "
MLFLOW_PREFIX = "NASLINE_MLFLOW "
REFERENCE_KEY = "reference"
ACCELERATOR_POOL = "accelerator"

LEASE_WAIT_SECONDS = 7 * 24 * 3600
"""Two runs that need the same work: the second waits and then reuses it; retries would be burnt in minutes."""

FAIL_AT_ONCE = {2: "wrong usage", 65: "bad data or parameters", 78: "wrong device or configuration"}
RETRY = {69: "a service is away", 75: "stopped, or told to try again"}
REJECTED = 99
LOG_LINE = re.compile(r"\d\d:\d\d:\d\d (DEBUG|INFO|WARNING|ERROR|CRITICAL) (.*)")

GENERATED_RUN_ID = re.compile(r"([a-z_]+)__(\d{4})-(\d\d)-(\d\d)T(\d\d):(\d\d):(\d\d)")


class TaskInstance(Protocol):
    """What the operator asks of Airflow's task instance."""

    def xcom_push(self, key: str, value: Any) -> None:
        """Store a value beside the task."""


class MlflowRunLink(BaseOperatorLink):
    """The button "MLflow run" on a task.

    Airflow's API server reads the address from the XCom `_link_MlflowRunLink`; it runs no code of ours and needs
    no plugin. The operator writes that XCom as soon as the step names its run; Airflow writes it again at the end.
    """

    name: ClassVar[str] = "MLflow run"

    def get_link(self, operator: BaseOperator, *, ti_key: Any) -> str:
        """Address of the step's run on the tracking server, empty where there is none."""
        return operator.mlflow_url if isinstance(operator, StepOperator) else ""


class StepOperator(BaseOperator):
    """Runs `nasline STEP --workspace W --run R ARGUMENTS` as a child process.

    Args:
        step: name of the step.
        arguments: further arguments, each an argv entry of its own; templates are rendered, no shell sees them.
        run: name of the pipeline run; made safe as a file name.

    Environment: `NASLINE_COMMAND` (argv prefix, default this interpreter with `-m pipeline_tasks`),
    `NASLINE_WORKSPACE` (default `.nasline`), `NASLINE_KILL_GRACE_SECONDS` (default 30) between SIGTERM and SIGKILL.
    """

    template_fields = ("run", "arguments")
    operator_extra_links = (MlflowRunLink(),)
    ui_color = "#e8f0fe"

    def __init__(
        self,
        *,
        step: str,
        arguments: Sequence[str] = (),
        run: str = "{{ dag_run.run_id }}",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.step = step
        self.arguments = arguments
        self.run = run
        self.mlflow_url = ""
        self._child: ChildProcess | None = None

    def execute(self, context: Any) -> None:
        """Run the step to its end.

        Raises:
            AirflowFailException: another try would end the same way.
            AirflowException: another try may help.
            AirflowSkipException: the gate rejected the engine, or there was nothing to do.
        """
        argv = self.argv(context)
        self.log.info("Running %s", shlex.join(argv))
        try:
            self._child = ChildProcess(argv, child_environment(os.environ))
        except OSError as error:
            raise AirflowFailException(f"cannot start {argv[0]!r}: {error}; check NASLINE_COMMAND") from error
        last_line, result = self._follow(self._child, context["ti"])
        code = self._child.wait()
        if result or code in (0, REJECTED):
            reference = {"run": run_name(self.run), "step": self.step, **result, "sentence": last_line}
            context["ti"].xcom_push(key=REFERENCE_KEY, value=reference)
        raise_for_exit_code(self.step, code, last_line)

    def on_kill(self) -> None:
        """Tell the step to checkpoint and stop; kill it when it takes too long."""
        if self._child is not None:
            self._child.ask_to_stop(float(os.environ.get("NASLINE_KILL_GRACE_SECONDS", "30")))

    def argv(self, context: Any) -> list[str]:
        """The command line of the step."""
        where = ["--workspace", workspace(os.environ), "--run", run_name(self.run)]
        return [*step_command(os.environ), self.step, *where, *self.arguments]

    def _follow(self, child: ChildProcess, task_instance: TaskInstance) -> tuple[str, dict[str, Any]]:
        """Pass the child's lines on to the task log; return the last one and what the step reported."""
        last_line = ""
        result: dict[str, Any] = {}
        try:
            for line in child.lines():
                if line.startswith(RESULT_PREFIX):
                    result = json.loads(line.removeprefix(RESULT_PREFIX))
                    self._show_mlflow_run(result.get("mlflow_url"), task_instance)
                elif line.startswith(MLFLOW_PREFIX):
                    self._show_mlflow_run(line.removeprefix(MLFLOW_PREFIX), task_instance)
                elif line:
                    level, last_line = split_level(line)
                    self.log.log(level, "%s", last_line)
        except BaseException:  # a time-out, or a result that is no JSON: leave no step behind
            self.on_kill()
            child.wait()
            raise
        return last_line, result

    def _show_mlflow_run(self, url: str | None, task_instance: TaskInstance) -> None:
        if url and url != self.mlflow_url:
            self.mlflow_url = url
            self.log.info("MLflow run %s", url)
            task_instance.xcom_push(key=MlflowRunLink().xcom_key, value=url)


class StartOperator(StepOperator):
    """Runs `nasline start`, which freezes the run, or another command that reads the parameters: hands it the parameter
    file and what the form changed.

    Args:
        form: the DAG's form. Its values are kept as they are now: Airflow writes a run's values into these objects.
    """

    def __init__(self, *, form: Mapping[str, Param], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.form_defaults = {key: field.value for key, field in form.items()}

    def argv(self, context: Any) -> list[str]:
        """The command line, with the changed values as one JSON argument: no value is ever read by a shell."""
        changed = changed_options(context["dag_run"].conf or {}, self.form_defaults)
        return [*super().argv(context), "--options-json", json.dumps(changed, sort_keys=True)]


def split_level(line: str) -> tuple[int, str]:
    """Level and message of a line that a step logged (`HH:MM:SS LEVEL message`); any other line is information."""
    match = LOG_LINE.fullmatch(line)
    return (logging.getLevelNamesMapping()[match[1]], match[2]) if match else (logging.INFO, line)


def changed_options(conf: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a run's conf that differ from the form's defaults; unknown keys stay, `start` refuses them."""
    return {key: value for key, value in conf.items() if key not in defaults or value != defaults[key]}


def step_command(environment: Mapping[str, str]) -> list[str]:
    """The argv prefix that runs steps: `NASLINE_COMMAND` split like a shell would, else this interpreter."""
    return shlex.split(environment.get("NASLINE_COMMAND", "")) or [sys.executable, "-m", "pipeline_tasks"]


def workspace(environment: Mapping[str, str]) -> str:
    """`NASLINE_WORKSPACE`, a folder or an address."""
    place = environment.get("NASLINE_WORKSPACE", ".nasline")
    return place if "://" in place else str(Path(place).resolve())


def child_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment without Airflow's settings: a step needs neither its database nor its keys."""
    kept = {name: value for name, value in environment.items() if not name.startswith(("AIRFLOW__", "_AIRFLOW"))}
    return {"NASLINE_LEASE_WAIT_SECONDS": str(LEASE_WAIT_SECONDS), **kept}


def run_name(run_id: str) -> str:
    """Airflow's run id as a file name that begins with what tells runs apart in a list: date and time.

    `manual__2026-11-21T10:00:00.123+00:00_x` becomes `20261121-100000-manual-3f9a1c`; an id that a person chose
    stays, where it may be a file name. The digest keeps apart ids that would look alike.
    """
    digest = hashlib.sha256(run_id.encode()).hexdigest()[:6]
    if match := GENERATED_RUN_ID.match(run_id):
        kind, *date_and_time = match.groups()
        return f"{''.join(date_and_time[:3])}-{''.join(date_and_time[3:])}-{kind}-{digest}"
    safe = re.sub(r"[^A-Za-z0-9_.-]+", "-", run_id).strip("._-")[:100]
    return run_id if safe == run_id else f"{safe or 'run'}-{digest}"


def raise_for_exit_code(step: str, code: int, last_line: str) -> None:
    """Turn a step's exit code into what Airflow does next."""
    if code == 0:
        return
    if code == REJECTED:
        raise AirflowSkipException(last_line)
    if code < 0:
        raise AirflowException(f"{step} was ended by {signal.Signals(-code).name}; last line: {last_line}")
    if code in RETRY:
        raise AirflowException(f"{last_line} ({step}: {RETRY[code]}, exit {code})")
    meaning = FAIL_AT_ONCE.get(code, "an error nobody foresaw, see the lines above")
    raise AirflowFailException(f"{last_line} ({step}: {meaning}, exit {code})")


def retry_arguments(environment: Mapping[str, str]) -> dict[str, Any]:
    """Retry at least a minute apart, each pause twice as long: a service that restarts must not use them all up."""
    seconds = float(environment.get("NASLINE_RETRY_SECONDS", "60"))
    return {
        "retries": 3,
        "retry_delay": timedelta(seconds=seconds),
        "retry_exponential_backoff": 2.0,
        "max_retry_delay": timedelta(minutes=30),
    }
