"""The DAGs as Airflow loads them, and whole runs of them with a planned `nasline`."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from airflow.sdk import DAG
from dag_helpers import REPOSITORY, FakeNasline

from pipeline_tasks import params
from pipeline_tasks.steps import STEPS, reference

DAG_IDS = ("train_yolo_nas", "retrain_yolo_nas")
ALL_DAGS = (*DAG_IDS, "evaluate_champion", "promote_or_rollback")
HELPER_TASKS = {"pseudo_label.shards", "gate.target", "report"}
GATES = {"gate.cpu", "gate.gpu", "gate.t4"}
REFERENCES = [reference(step.name, part) for step in STEPS for part in step.parts or ("",)]


def load_dag(dag_id: str) -> DAG:
    """The DAG of a file, freshly executed so that it sees the test's environment."""
    for name in ("step_operator", "trigger_form", "promotion_operator", "pipeline_chain", dag_id):
        sys.modules.pop(name, None)
    dag = importlib.import_module(dag_id).start.dag
    assert isinstance(dag, DAG)
    return dag


def logical_edges(dag: DAG) -> dict[str, set[str]]:
    """For each step (`pretrain/student`, shards folded into their step) all steps before it, near and far."""
    edges = {}
    for task in dag.tasks:
        if task.task_id not in HELPER_TASKS and task.task_id != "pseudo_label.label":
            name = logical(task.task_id)
            upstream = {logical(earlier) for earlier in task.get_flat_relative_ids(upstream=True)} - {"", name}
            edges[name] = edges.get(name, upstream) & upstream  # of the gate's tasks only one has its turn
    return edges


def logical(task_id: str) -> str:
    """`pretrain.student` as `pretrain/student`, `pseudo_label.merge` as `pseudo_label`, `gate.t4` as `gate`; helpers
    as nothing.
    """
    group, _, name = task_id.partition(".")
    if task_id in HELPER_TASKS:
        return ""
    return group if group in ("pseudo_label", "gate") else reference(group, name)


def before(name: str, without: str = "") -> set[str]:
    """Everything that must have finished before a step, from `steps.STEPS`; `start` precedes all."""
    step_name = name.split("/")[0]
    (step,) = [step for step in STEPS if step.name == step_name]
    needed = {need for need in step.needs if need.split("/")[0] != without}
    further = {earlier for need in needed for earlier in before(need, without)}
    return needed | further | ({"start"} if step_name != "start" else set())


def run(dag_id: str, conf: dict[str, Any] | None = None) -> tuple[str, dict[str, str]]:
    """One run in this process; its state, and the state of each task (mapped ones as `label[0]`)."""
    finished = load_dag(dag_id).test(run_conf=conf or {})
    states = {
        ti.task_id + (f"[{ti.map_index}]" if ti.map_index >= 0 else ""): str(ti.state)
        for ti in finished.get_task_instances()
    }
    return str(finished.state), states


@pytest.mark.parametrize("dag_id", DAG_IDS)
def test_arrows_are_what_the_steps_need(dag_id: str) -> None:
    without = "pretrain" if dag_id == "retrain_yolo_nas" else ""
    edges = logical_edges(load_dag(dag_id))
    assert list(edges) == [name for name in REFERENCES if not without or not name.startswith(without)]
    for name, upstream in edges.items():
        missing = before(name, without) - upstream
        assert not missing, f"{dag_id}: {name} may run before {missing}"


def test_the_picture_of_the_design() -> None:
    direct = {task.task_id: task.downstream_task_ids for task in load_dag("train_yolo_nas").tasks}
    assert direct == {
        "start": {"validate_data"},
        "validate_data": {"pretrain.student", "pretrain.teacher"},
        "pretrain.student": {"distill"},
        "pretrain.teacher": {"teach"},
        "teach": {"pseudo_label.shards"},
        "pseudo_label.shards": {"pseudo_label.label"},
        "pseudo_label.label": {"pseudo_label.merge"},
        "pseudo_label.merge": {"distill"},
        "distill": {"quantize"},
        "quantize": {"export"},
        "export": {"gate.target"},
        "gate.target": GATES,
        **{gate: {"register", "report"} for gate in GATES},
        "register": {"report"},
        "report": set(),
    }


@pytest.mark.parametrize("dag_id", DAG_IDS)
def test_every_task_is_explained_bounded_and_retried_with_care(dag_id: str) -> None:
    dag = load_dag(dag_id)
    steps = {step.name: step for step in STEPS}
    for task in dag.tasks:
        assert task.doc_md, task.task_id
        if task.task_id in HELPER_TASKS:
            continue
        step = steps[task.task_id.split(".")[0]]
        uses_accelerator = (step.uses_accelerator and not task.task_id.endswith("merge")) or task.task_id == "gate.gpu"
        assert task.pool == ("accelerator" if uses_accelerator else "default_pool"), task.task_id
        assert task.queue == ("t4" if task.task_id == "gate.t4" else "default"), task.task_id
        assert task.execution_timeout
        assert task.execution_timeout.total_seconds() == step.timeout_hours * 3600
        assert task.retry_delay.total_seconds() >= 60
        assert step.summary in task.doc_md
    assert dag.doc_md
    assert not dag.catchup


def test_retraining_waits_to_be_unpaused_and_follows_clock_and_dataset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NASLINE_RETRAIN_CRON", "30 4 * * 5")
    dag = load_dag("retrain_yolo_nas")
    assert dag.is_paused_upon_creation
    assert dag.max_active_runs == 1
    timetable: Any = dag.timetable
    assert timetable.timetable.expression == "30 4 * * 5"
    assert [asset.name for asset in timetable.asset_condition.objects] == ["nasline_dataset", "nasline_champion_drop"]


def test_the_form_is_the_parameter_schema(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    parameter_file = tmp_path / "params.yaml"
    parameter_file.write_text("distill:\n  epochs: 7\ngate:\n  maximum_latency_ms: 12.5\n", encoding="utf-8")
    monkeypatch.setenv("NASLINE_PARAMS", str(parameter_file))
    dag = load_dag("train_yolo_nas")
    shown = {key: dag.params.get_param(key) for key in dag.params}
    fields = {field.key: field for field in params.form_fields() if field.key != "start.from_champion"}
    assert set(shown) == set(fields)
    for key, param in shown.items():
        assert param.description == fields[key].schema["description"], key
        assert param.schema.get("section") == fields[key].section, key
        param.resolve()  # the value shown satisfies its own schema, so a run may be triggered unchanged
    assert shown["distill.epochs"].value == 7
    assert shown["gate.maximum_latency_ms"].value == 12.5
    assert "[pixels]" in str(shown["start.image_size"].description)
    assert shown["start.student_variant"].schema["enum"] == ["pico", "t", "n", "s", "m", "l"]
    with_section = [param.schema.get("section") is not None for param in shown.values()]
    assert with_section == sorted(with_section)  # the main ones come first
    assert 4 <= with_section.count(False) <= 16


def test_retraining_offers_no_pretraining() -> None:
    shown = set(load_dag("retrain_yolo_nas").params)
    assert not {key for key in shown if key.startswith(("pretrain.", "start.pretrain"))}
    assert {"distill.epochs", "start.dataset"} <= shown


def test_a_run_passes_through_every_step_in_order(fake_nasline: FakeNasline) -> None:
    state, states = run("train_yolo_nas", {"start.dataset": "/data/my set", "distill.epochs": 2})
    assert state == "success"
    assert {task for task, outcome in states.items() if outcome != "success"} == {"gate.gpu", "gate.t4"}
    assert set(states.values()) == {"success", "skipped"}
    names = [call["name"] for call in fake_nasline.calls()]
    assert names[:2] == ["start", "validate_data"]
    assert sorted(names[2:4]) == ["pretrain/student", "pretrain/teacher"]
    assert names[4:] == ["teach", *["pseudo_label"] * 4, "distill", "quantize", "export", "gate", "register"]
    options = json.loads(fake_nasline.calls("start")[0]["argv"][-1])
    assert options == {"start.dataset": "/data/my set", "distill.epochs": 2}
    shards = [call["argv"][-2:] for call in fake_nasline.calls("pseudo_label")]
    assert sorted(shards[:3]) == [["--shard", f"{index}/3"] for index in range(3)]
    assert shards[3][-1] == "--merge"
    runs = {call["argv"][call["argv"].index("--run") + 1] for call in fake_nasline.calls()}
    assert len(runs) == 1


def test_a_rejected_engine_leaves_a_green_run_that_says_why(
    fake_nasline: FakeNasline, capfd: pytest.CaptureFixture[str]
) -> None:
    fake_nasline.plan(gate=[{"exit": 99, "say": "rejected: minimum_map 0.500 > measured 0.312"}])
    state, states = run("train_yolo_nas")
    assert state == "success"
    assert {task for task, outcome in states.items() if outcome == "skipped"} == {*GATES, "register"}
    assert states["report"] == "success"
    assert not fake_nasline.calls("register")
    said = capfd.readouterr().out
    assert "The gate rejected: minimum_map 0.500 > measured 0.312. Nothing was registered" in said


def test_targets_of_the_gate_are_those_of_the_schema() -> None:
    schema = next(field.schema for field in params.form_fields() if field.key == "gate.target")
    assert {f"gate.{target}" for target in schema["enum"]} == GATES


@pytest.mark.slow
def test_a_gate_on_the_wrong_device_fails_the_run_at_once(fake_nasline: FakeNasline) -> None:
    fake_nasline.plan(gate=[{"exit": 78, "say": "gate.target is t4, but the device here is no T4"}])
    state, states = run("retrain_yolo_nas", {"gate.target": "t4"})
    assert (state, states["gate.t4"], states["register"], states["report"]) == (
        "failed", "failed", "upstream_failed", "upstream_failed"
    )  # fmt: skip
    assert len(fake_nasline.calls("gate")) == 1


def test_the_outcome_is_told_in_a_sentence() -> None:
    outcome = importlib.import_module("pipeline_chain").outcome
    gate = {"sentence": "published", "summary": {"verdict": "accepted: all 2 rules passed"}}
    register: dict[str, Any] = {"sentence": "published", "summary": {"model": "digits", "version": "3"}}
    assert outcome({}, gate, register) == "The gate accepted: all 2 rules passed. Registered: digits v3."
    register["summary"]["not_champion"] = "digits v3 was compared with v1"
    assert outcome({}, gate, register).endswith("digits v3. Not champion: digits v3 was compared with v1.")
    assert outcome({"sentence": "nothing changed"}, None, None) == "The run ended before the gate: nothing changed"


@pytest.mark.slow
def test_bad_data_fails_the_run_without_a_second_try(fake_nasline: FakeNasline) -> None:
    fake_nasline.plan(validate_data=[{"exit": 65, "say": "image a.jpg is truncated"}])
    state, states = run("train_yolo_nas")
    assert state == "failed"
    assert states["validate_data"] == "failed"
    assert states["report"] == "upstream_failed"  # a report that ran would have painted the run green
    assert len(fake_nasline.calls("validate_data")) == 1


@pytest.mark.slow
def test_a_service_that_was_away_is_tried_again(fake_nasline: FakeNasline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NASLINE_RETRY_SECONDS", "0.1")
    fake_nasline.plan(register=[{"exit": 69, "say": "the registry is away"}, {}])
    state, _ = run("train_yolo_nas")
    assert state == "success"
    assert len(fake_nasline.calls("register")) == 2


@pytest.mark.parametrize("target", ["t4", pytest.param("gpu", marks=pytest.mark.slow)])
def test_retraining_starts_from_the_champion_and_the_gate_runs_once_on_the_forms_target(
    fake_nasline: FakeNasline, target: str
) -> None:
    state, states = run("retrain_yolo_nas", {"gate.target": target})
    assert state == "success"
    assert "--from-champion" in fake_nasline.calls("start")[0]["argv"]
    assert not [call for call in fake_nasline.calls() if call["name"].startswith("pretrain")]
    assert {task for task, outcome in states.items() if outcome == "skipped"} == GATES - {f"gate.{target}"}
    assert len(fake_nasline.calls("gate")) == len(fake_nasline.calls("register")) == 1


COST = """
import sys, time
import airflow.sdk
from airflow.sdk import DAG, Asset, AssetOrTimeSchedule, BaseOperator, CronTriggerTimetable, Param, TaskGroup, task
before, began = set(sys.modules), time.process_time()
import {dag_id}
seconds = time.process_time() - began
heavy = {{name.split(".")[0] for name in set(sys.modules) - before}} & {{
    "torch", "mlflow", "numpy", "pandas", "cv2", "pyarrow", "great_expectations", "dvc", "model", "onnx", "openvino"}}
print(seconds, sorted(heavy))
"""


@pytest.mark.parametrize("dag_id", ALL_DAGS)
def test_a_dag_file_costs_little_and_imports_nothing_heavy(dag_id: str) -> None:
    """At most 0.5 s of processor time beyond Airflow's own import, in a fresh interpreter; the better of two."""
    seconds = []
    for _ in range(2):
        output = subprocess.run(
            [sys.executable, "-c", COST.format(dag_id=dag_id)],
            env={**os.environ, "PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'dags'}"},
            capture_output=True, text=True, check=True,
        ).stdout.splitlines()[-1]  # fmt: skip
        cost, _, heavy = output.partition(" ")
        assert heavy == "[]"
        seconds.append(float(cost))
    assert min(seconds) <= 0.5


def test_airflow_finds_all_dags_and_nothing_else() -> None:
    from airflow.dag_processing.dagbag import DagBag

    bag = DagBag(str(REPOSITORY / "dags"))
    assert bag.import_errors == {}
    assert sorted(bag.dags) == sorted(ALL_DAGS)
