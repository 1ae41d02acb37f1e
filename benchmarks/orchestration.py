"""What Airflow costs: seconds between two steps, seconds to read a DAG file, memory of `make up` without work.

    python benchmarks/orchestration.py run [--again]
    python benchmarks/orchestration.py table

Between two steps: a real `airflow standalone` with the LocalExecutor, as `make up` starts it, runs `train_yolo_nas`
with a `nasline` that does no work (orchestration_step.py). Counted is the time from the end of the last process that a
step had to wait for to the moment at which the next one's process has loaded what the real command loads before it
looks at its step: Airflow's end of the one task, its scheduler, the start of the other task, and the start of the
process. Not counted are torch and MLflow, which a step loads as it needs them. Where a task of Airflow without a
process stands between two steps (`pseudo_label.shards`, `gate.target`), both together are a line of their own.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "stack"))

import services

from benchmarks.rows import REPOSITORY, Rows
from pipeline_tasks.airflow_rest import AirflowRest

ROWS = Rows("orchestration")
STAND_IN = Path(__file__).resolve().parent / "orchestration_step.py"
DAG = "train_yolo_nas"
DAGS = ("train_yolo_nas", "retrain_yolo_nas", "evaluate_champion", "promote_or_rollback")
RUNS, IDLE_SECONDS, READINGS = 3, 60, 3

BEFORE = {
    "validate_data": ["start"], "pretrain/student": ["validate_data"], "teach": ["pretrain/teacher"],
    "pseudo_label/merge": ["pseudo_label/0/1"], "distill": ["pseudo_label/merge", "pretrain/student"],
    "quantize": ["distill"], "export": ["quantize"], "register": ["gate"],
}  # fmt: skip
"""Steps that follow others at once, by what they wait for."""
BEFORE_TWO_TASKS = {"pseudo_label/0/1": ["teach"], "gate": ["export"]}
"""The same with a task of Airflow alone between them."""

DAG_FILE = """
import sys, time
import airflow.sdk
from airflow.sdk import DAG, Asset, AssetOrTimeSchedule, BaseOperator, CronTriggerTimetable, Param, TaskGroup, task
began = time.process_time()
import {dag}
print(time.process_time() - began)
"""


def configurations() -> list[dict[str, Any]]:
    """Every row."""
    return [{"what": "dag files"}, {"what": "memory"}, {"what": "between steps"}]


def run(again: bool) -> None:
    """Measure the missing rows, or all again."""
    measures = {"dag files": dag_files, "memory": idle_memory, "between steps": between_steps}
    for configuration in configurations() if again else ROWS.missing(configurations()):
        figures = measures[configuration["what"]]()
        ROWS.add(configuration, figures)
        print(json.dumps(configuration), json.dumps(figures), flush=True)


def dag_files() -> dict[str, Any]:
    """Processor seconds to import each DAG file where Airflow is imported already; the least of some readings."""
    folders = os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "dags")])
    environment = {**os.environ, "PYTHONPATH": folders}
    seconds = {}
    for dag in DAGS:
        words = [sys.executable, "-c", DAG_FILE.format(dag=dag)]
        told = [
            subprocess.run(words, env=environment, check=True, capture_output=True, text=True).stdout.split()[-1]
            for _ in range(READINGS)
        ]
        seconds[dag] = round(min(map(float, told)), 3)
    return {"load": load(), "seconds": seconds}


@contextmanager
def standalone() -> Iterator[tuple[services.Stack, Path]]:
    """Both services as `make up` starts them, with steps that do no work; and the file of these steps' times."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "steps.jsonl")
        os.environ.update(
            NASLINE_COMMAND=f"{sys.executable} {STAND_IN}", ORCHESTRATION_LOG=str(log), NASLINE_ACCELERATOR_SLOTS="4"
        )
        stack = services.Stack(Path(folder, "state"), Path(folder, "workspace"), free_port(), free_port())
        services.up(stack)
        try:
            yield stack, log
        finally:
            services.down(stack)


def idle_memory() -> dict[str, Any]:
    """Megabytes of the services' processes when they have had nothing to do for a while."""
    with standalone() as (stack, _):
        time.sleep(IDLE_SECONDS)
        return {"load": load(), "pss_mb": {name: megabytes(stack, name) for name in ("airflow", "mlflow")}}


def between_steps() -> dict[str, Any]:
    """Seconds between two steps of some runs, one after the other."""
    with standalone() as (stack, log):
        before = load()
        runs = [one_run(stack, log) for _ in range(RUNS)]
        return {
            "load": [before, load()],
            "seconds": [gaps(found, BEFORE) for found in runs],
            "seconds_two_tasks": [gaps(found, BEFORE_TWO_TASKS) for found in runs],
        }


def one_run(stack: services.Stack, log: Path) -> dict[str, dict[str, float]]:
    """When each step of a run began and ended."""
    log.unlink(missing_ok=True)
    password = json.loads(stack.password_file.read_text(encoding="utf-8"))["admin"]
    airflow = AirflowRest(
        {
            "NASLINE_AIRFLOW_URL": stack.airflow_url,
            "NASLINE_AIRFLOW_USER": "admin",
            "NASLINE_AIRFLOW_PASSWORD": password,
        }
    )
    while DAG not in {dag["dag_id"] for dag in airflow.call("GET", "/dags")["dags"]}:
        time.sleep(1)
    airflow.call("PATCH", f"/dags/{DAG}", {"is_paused": False})
    name = f"measured-{time.time_ns()}"
    request = {"dag_run_id": name, "logical_date": None, "conf": {"start.dataset": "/data"}}
    airflow.call("POST", f"/dags/{DAG}/dagRuns", request)
    while (state := airflow.call("GET", f"/dags/{DAG}/dagRuns/{name}")["state"]) not in ("success", "failed"):
        time.sleep(1)
    if state == "failed":
        raise SystemExit(f"the run {name} failed; nothing was measured")
    return {line["step"]: line for line in map(json.loads, log.read_text(encoding="utf-8").splitlines())}


def gaps(found: dict[str, dict[str, float]], before: dict[str, list[str]]) -> dict[str, float]:
    """Seconds that each step began after the last of those it waited for had ended."""
    return {
        step: round(found[step]["began"] - max(found[name]["ended"] for name in waited), 2)
        for step, waited in before.items()
    }


def megabytes(stack: services.Stack, name: str) -> int:
    """Proportional set size of a service's processes, so that shared pages count once."""
    leader = services.running_pid(stack, name)
    assert leader is not None
    return round(sum(map(proportional_kilobytes, services.session_members(leader))) / 1000)


def proportional_kilobytes(pid: int) -> int:
    """PSS of one process."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))


def free_port() -> int:
    """A port nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def load() -> float:
    """Processes that want a processor, over the last minute; more than the cores means that they wait."""
    return round(os.getloadavg()[0], 1)


def table() -> str:
    """The rows as Markdown."""
    lines = ["| what | measured | limit |", "|---|---|---|"]
    if row := ROWS.find({"what": "dag files"}):
        for dag, seconds in row["figures"]["seconds"].items():
            lines.append(f"| reading `dags/{dag}.py` beyond Airflow's import | {seconds:.2f} s of CPU time | 0.5 s |")
    if row := ROWS.find({"what": "between steps"}):
        lines += _between(row["figures"])
    if row := ROWS.find({"what": "memory"}):
        sizes = row["figures"]["pss_mb"]
        parts = ", ".join(f"{name} {size}" for name, size in sizes.items())
        lines.append(f"| memory of `make up` without work (PSS) | {sum(sizes.values())} MB ({parts}) | |")
    return "\n".join(lines)


def _between(figures: dict[str, Any]) -> list[str]:
    lines = []
    for name, what in (("", "between two steps"), ("_two_tasks", "the same with a task of Airflow between them")):
        seconds = sorted(value for found in figures[f"seconds{name}"] for value in found.values())
        told = f"median {statistics.median(seconds):.1f} s, {seconds[0]:.1f} to {seconds[-1]:.1f} s"
        where = f"{len(seconds)} times, load {figures['load'][0]:g} to {figures['load'][1]:g}"
        lines.append(f"| {what} | {told} ({where}) | 3 s |")
    return lines


def main() -> None:
    """Measure what is missing, or print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    running = commands.add_parser("run", help="measure the missing rows")
    running.add_argument("--again", action="store_true", help="measure finished rows again too")
    commands.add_parser("table", help="print the table")
    arguments = parser.parse_args()
    if arguments.command == "run":
        run(arguments.again)
    else:
        print(table())


if __name__ == "__main__":
    main()
