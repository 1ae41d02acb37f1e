"""The demo around the DAG: what it puts into the form, what it shows, how it judges pseudo-labels and the end."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent.parent
for folder in (REPOSITORY, REPOSITORY / "demo"):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

import label_quality  # noqa: E402
import run as demo  # noqa: E402

from model.score_thresholds import PseudoLabelQuality  # noqa: E402


def options(**given: Any) -> argparse.Namespace:
    """Options of a demo on one's own data."""
    return argparse.Namespace(
        **{"dataset": Path("/data/a"), "pretrain": None, "unlabeled": None, "gate": "pass", **given}
    )


def test_own_folders_go_into_the_form_as_absolute_paths(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    form = demo._form_values(options(dataset=Path("my set"), unlabeled=Path("more")))
    assert form == {"start.dataset": str(tmp_path / "my set"), "start.unlabeled_dataset": str(tmp_path / "more")}


def test_a_failing_gate_is_a_limit_no_engine_reaches() -> None:
    assert 0.99 < demo._form_values(options(gate="fail"))["gate.minimum_map"] <= 1


@pytest.mark.parametrize(
    ("given", "passed", "code"),
    [
        ({"dataset": None}, 1, 0),
        ({"dataset": None}, 0, 1),
        ({"dataset": None, "gate": "fail"}, 0, 0),
        ({"dataset": None, "gate": "fail"}, 1, 1),
        ({}, 0, 0),
    ],
)
def test_only_the_demos_own_data_must_end_as_asked(given: dict[str, Any], passed: int, code: int) -> None:
    assert demo._judge({"gate": {"summary": {"passed": passed}}}, options(**given)) == code


def test_the_terminal_shows_what_steps_say_and_why_a_task_failed(capsys: pytest.CaptureFixture[str]) -> None:
    logger = "airflow.task.operators.step_operator.StepOperator"
    command = "Running python -m pipeline_tasks pretrain --workspace /w --run r --role student"
    for entry in (
        {"event": "DagRun Finished", "logger": "airflow.models.dagrun.DagRun"},
        {"event": command, "logger": logger},
        {"event": "epoch 1/2 loss 3.1", "logger": logger},
        {
            "event": "Task failed with exception",
            "logger": "task",
            "exception": [{"exc_value": "image a.jpg is broken"}],
        },
    ):
        demo.show_line(json.dumps(entry), 1.0)
    demo.show_line("no JSON at all", 2.0)
    shown = [line.split(" s  ", 1)[1] for line in capsys.readouterr().out.splitlines()]
    assert shown == ["▶ pretrain student", "epoch 1/2 loss 3.1", "failed: image a.jpg is broken"]


def test_another_airflow_or_mlflow_of_the_terminal_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AIRFLOW__CORE__FERNET_KEY", "theirs")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://theirs")
    environment = demo._environment(Path("/p.yaml"))
    assert "AIRFLOW__CORE__FERNET_KEY" not in environment
    assert "MLFLOW_TRACKING_URI" not in environment
    assert environment["NASLINE_PARAMS"] == "/p.yaml"


def write_manifest(workspace: Path, name: str, summary: dict[str, Any], made_by: str) -> Path:
    """A published step with a summary."""
    folder = workspace / "steps" / name.split("/")[0] / f"key-{name.replace('/', '-')}"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text(json.dumps({"summary": summary, "made_by_run": made_by}))
    return folder


def test_the_table_holds_the_numbers_of_the_run(tmp_path: Path) -> None:
    summaries: dict[str, dict[str, Any]] = {
        "validate_data": {},
        "pretrain/student": {},
        "pseudo_label/shard-0-of-2": {"boxes": 5},
        "pseudo_label": {"boxes": 123},
        "quantize": {"float_map50_95": 0.7, "ptq_map50_95": 0.61, "qat_map50_95": 0.69, "published": "qat"},
        "gate": {
            "float_map50_95": 0.71, "int8_map50_95": 0.7012, "float_latency_p50_ms": 2.0, "int8_latency_p50_ms": 1.0,
            "speedup": 2.0, "verdict": "accepted: all 2 rules passed", "passed": 1,
        },
        "register": {"registered": 1, "model": "digits", "version": "4"},
    }  # fmt: skip
    keys = {}
    for name, summary in summaries.items():
        folder = write_manifest(tmp_path, name, summary, "old" if "pretrain" in name or "shard" in name else "r")
        keys[name] = folder.name
    latency = {
        "device": {"device": "AMD EPYC"}, "runtime": "openvino", "runtime_version": "2026.4.1-22982", "threads": 1,
        "batch": 1, "input_size": 128,
    }  # fmt: skip
    (tmp_path / "steps" / "gate" / keys["gate"] / "latency.json").write_text(json.dumps({"int8": latency}))
    (tmp_path / "runs" / "r").mkdir(parents=True)
    (tmp_path / "runs" / "r" / "run.json").write_text(json.dumps({"steps": keys}))
    text = demo.table(demo.read_results(tmp_path, "r"), "r", None)
    for expected in (
        "0.7012", "2.00 times", "AMD EPYC, openvino 2026.4.1, threads 1, batch 1, 128 pixels", "PTQ 0.6100",
        "QAT 0.6900", "published: qat", "123 boxes kept", "accepted: all 2 rules passed",
        "digits version 4 (models:/digits@champion)",
    ):  # fmt: skip
        assert expected in text
    assert text.splitlines()[-1] == "reused        pretrain/student (finished by an earlier run)"


def test_pseudo_labels_are_told_in_one_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    measured = PseudoLabelQuality(precision=0.5, recall=0.25, kept=4, correct=2, truth=8, per_class={})
    monkeypatch.setattr("pipeline_tasks.label_quality.label_quality", lambda tables, truth: measured)
    sentence = label_quality.label_quality(tmp_path, tmp_path)
    assert sentence == "4 boxes kept; against the hidden truth (IoU 0.5) precision 0.500, recall 0.250 of 8"
    nothing = replace(measured, precision=float("nan"), recall=0.0, kept=0, correct=0)
    monkeypatch.setattr("pipeline_tasks.label_quality.label_quality", lambda tables, truth: nothing)
    assert "precision 0.000, recall 0.000 of 8" in label_quality.label_quality(tmp_path, tmp_path)
