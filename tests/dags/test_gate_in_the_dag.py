"""The gate's rules through the real DAG: the steps before the gate are finished work of typed chains, the gate is real.

Each run sets limits that cannot be met; every rule must then be seen in the verdict, in MLflow and in Airflow.
"""

from __future__ import annotations

import contextlib
import json
import sqlite3
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from test_dag_chain import GATES, load_dag
from typed_chain import CHAIN, Terminal

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3000)]

BEFORE_THE_GATE = r"validate_data|pretrain\..*|teach|pseudo_label\.(label|merge)|distill|quantize|export"
MODEL = "gate_digits"
BETTER = {"distill.epochs": 16, "quantize.qat": "never"}
BROKEN = {"quantize.observer": "percentile", "quantize.percentile": 50.1, "quantize.qat": "never",
          "quantize.map_budget": 100.0}  # fmt: skip
"""Half of all activations are cut off: INT8 finds nothing."""
ALL_FLOAT = {"quantize.float_layers": ["*"], "quantize.qat": "never"}


@dataclass(frozen=True)
class Outcome:
    """One run of the DAG: states of its tasks, what the gate wrote, what MLflow and the task `report` say."""

    state: str
    states: dict[str, str]
    verdict: dict[str, Any]
    tags: dict[str, str]
    said: str

    @property
    def failed(self) -> dict[str, dict[str, Any]]:
        return {rule["parameter"] or rule["name"]: rule for rule in self.verdict["rules"] if not rule["passed"]}


RunDag = Callable[..., Outcome]


@pytest.fixture(scope="module")
def prepared(finished: Terminal) -> Terminal:
    """Beside the run `one`: `better`, the champion, and two whose INT8 engine is none, up to their export."""
    for run, options in (("better", BETTER), ("broken", BROKEN), ("all_float", ALL_FLOAT)):
        words = [word for key, value in options.items() for word in (f"--{key}", json.dumps(value))]
        finished.start(run, "--start.model_name", MODEL, *words)
        for command in CHAIN[6:] if run == "better" else CHAIN[6:-2]:
            finished.nasline(*command, "--run", run)
    return finished


UNREACHABLE: dict[str, Any] = {
    "minimum_map": 0.999, "maximum_box_error_pixels": 1e-9, "maximum_latency_ms": 1e-6, "maximum_latency_p99_ms": 1e-6,
    "minimum_speedup": 1e6, "maximum_size_megabytes": 1e-3, "require_image_licence": ["nobody's"],
    "require_annotation_licence": ["nobody's"], "require_weights_licence": ["nobody's"],
    "minimum_comparison_images": 1000, "champion_margin": 0.0,
}  # fmt: skip
"""Missed by the engine of the run `one`, which is worse than the champion of `better`."""
LOSSES = {"maximum_map_drop": 0.0, "maximum_class_map_drop": 0.0}
REACHED: dict[str, Any] = {
    **dict.fromkeys(LOSSES, 100.0), "minimum_map": 0.0, "maximum_latency_ms": 1e6, "maximum_latency_p99_ms": 1e6,
    "minimum_speedup": 1e-6, "maximum_size_megabytes": 1e3, "minimum_comparison_images": 1, "champion_margin": 0.0,
    "require_weights_licence": ["random initialisation"],
}  # fmt: skip


@pytest.fixture(scope="module")
def run_dag(prepared: Terminal) -> Iterator[RunDag]:
    """Runs the DAG with the real `nasline`: options of the candidate by full name, those of the gate by their own."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("NASLINE_WORKSPACE", "OMP_NUM_THREADS"):
            patch.setenv(name, prepared.environment[name])
        patch.setenv("NASLINE_COMMAND", f"{sys.executable} -m pipeline_tasks")
        patch.setenv("NASLINE_PARAMS", str(prepared.folder / "params.yaml"))
        patch.chdir(prepared.folder)
        sets = {"dataset": "target", "pretrain_dataset": "pretrain", "unlabeled_dataset": "unlabeled"}
        folders = {"start.model_name": MODEL} | {
            f"start.{name}": str(prepared.data / folder) for name, folder in sets.items()
        }

        def run(candidate: dict[str, Any], gate: dict[str, Any]) -> Outcome:
            output = StringIO()
            limits = {"latency_repeats": 100, "minimum_class_boxes": 1, **gate}
            conf = {**folders, **candidate, **{f"gate.{name}": value for name, value in limits.items()}}
            with contextlib.redirect_stdout(output):
                done = load_dag("train_yolo_nas").test(run_conf=conf, mark_success_pattern=BEFORE_THE_GATE)
            states = {ti.task_id: str(ti.state) for ti in done.get_task_instances()}
            import step_operator

            name = step_operator.run_name(done.run_id)
            verdict = json.loads((prepared.published(name, "gate") / "verdict.json").read_text())
            return Outcome(str(done.state), states, verdict, parent_tags(prepared.workspace, name), output.getvalue())

        yield run


def parent_tags(workspace: Path, run: str) -> dict[str, str]:
    """Tags of a pipeline run's parent in MLflow."""
    query = (
        "SELECT t.key, t.value FROM tags t WHERE t.run_uuid ="
        " (SELECT a.run_uuid FROM tags a JOIN tags b USING (run_uuid)"
        " WHERE a.key = 'nasline.run' AND a.value = ? AND b.key = 'nasline.step' AND b.value = 'pipeline')"
    )
    with contextlib.closing(sqlite3.connect(workspace / "mlflow.db")) as store:
        return dict(store.execute(query, (run,)).fetchall())


def assert_rejected(outcome: Outcome, *parameters: str) -> None:
    """The run is green and skipped; each rule that was missed is told in the verdict, in MLflow and by `report`."""
    assert outcome.state == "success"
    assert {task for task, state in outcome.states.items() if state == "skipped"} == {*GATES, "register"}
    assert outcome.states["report"] == "success"
    assert not outcome.verdict["passed"]
    assert outcome.verdict["sentence"].startswith("rejected: ")
    assert outcome.tags["nasline.verdict"] == outcome.verdict["sentence"]
    assert "nasline.registered" not in outcome.tags
    assert "Nothing was registered; the champion is unchanged." in outcome.said
    for parameter in parameters:
        rule = outcome.failed[parameter]
        assert f"{rule['name']}: " in outcome.tags["nasline.verdict"], parameter
        assert f"{rule['name']}: " in outcome.said, parameter


@pytest.fixture(scope="module")
def missed_all(run_dag: RunDag) -> Outcome:
    return run_dag({}, UNREACHABLE)


@pytest.mark.parametrize("parameter", UNREACHABLE)
def test_a_rule_that_is_missed_rejects_the_run(missed_all: Outcome, parameter: str) -> None:
    assert_rejected(missed_all, parameter)
    assert set(missed_all.failed) == set(UNREACHABLE)


@pytest.fixture(scope="module")
def lost_all(run_dag: RunDag) -> Outcome:
    return run_dag(BROKEN, {**LOSSES, "champion_margin": None})


@pytest.mark.parametrize("parameter", LOSSES)
def test_an_int8_engine_that_finds_nothing_is_rejected(lost_all: Outcome, parameter: str) -> None:
    assert_rejected(lost_all, parameter)
    assert set(lost_all.failed) == set(LOSSES)


def test_an_int8_engine_that_runs_in_float_is_rejected(run_dag: RunDag) -> None:
    outcome = run_dag(ALL_FLOAT, {"champion_margin": None})
    assert_rejected(outcome, "precision of the built engine")
    assert set(outcome.failed) == {"precision of the built engine"}


def test_classes_that_are_gone_or_new_are_judged(run_dag: RunDag, prepared: Terminal) -> None:
    """The champion as it lies fetched is made to know other classes: a `ghost`, and no `9`."""
    (folder,) = (prepared.workspace / "champions").glob(f"{MODEL}-v1-*[!k]")
    described = folder / "engine" / "engine.json"
    before = described.read_text()
    content = json.loads(before)
    content["class_names"][-1] = "ghost"
    described.write_text(json.dumps(content))
    try:
        outcome = run_dag(BETTER, {"minimum_added_class_map": 0.999, "champion_margin": 100.0})
    finally:
        described.write_text(before)
    assert_rejected(outcome, "allow_removed_classes", "minimum_added_class_map")
    assert set(outcome.failed) == {"allow_removed_classes", "minimum_added_class_map"}
    assert outcome.failed["allow_removed_classes"]["measured"] == "ghost"
    assert outcome.verdict["champion_comparison"]["added_classes"].keys() == {"9"}


def test_an_engine_that_meets_every_limit_is_registered_with_what_was_measured(
    run_dag: RunDag, prepared: Terminal
) -> None:
    """Twice the same engine: as good as the champion, it keeps the champion's version."""
    outcome = run_dag(BETTER, REACHED)
    assert outcome.state == "success"
    assert {task for task, state in outcome.states.items() if state == "skipped"} == GATES - {"gate.cpu"}
    assert outcome.verdict["passed"] and {rule["parameter"] for rule in outcome.verdict["rules"]} >= set(REACHED)
    assert outcome.tags["nasline.registered"] == f"{MODEL} v1"
    with contextlib.closing(sqlite3.connect(prepared.workspace / "mlflow.db")) as store:
        tags = dict(
            store.execute(
                "SELECT key, value FROM model_version_tags WHERE version = 1 AND name = ?", (MODEL,)
            ).fetchall()
        )
        (page,) = store.execute(
            "SELECT description FROM model_versions WHERE version = 1 AND name = ?", (MODEL,)
        ).fetchone()
    assert tags["nasline.best_of_line"] == "itself" and tags["nasline.target"] == "cpu"
    assert float(tags["nasline.latency_p99_ms"]) >= float(tags["nasline.latency_min_ms"]) > 0
    assert page.startswith("The gate accepted: all ") and "| int8 |" in page and "letterbox" in page


def test_a_line_of_champions_cannot_sink(run_dag: RunDag, prepared: Terminal) -> None:
    """A margin that is far too wide lets a worse engine become champion; the next one must still meet the better."""
    worse = run_dag({}, {"champion_margin": 100.0})
    assert worse.tags["nasline.registered"] == f"{MODEL} v2"
    outcome = run_dag({}, {"champion_margin": 0.5})
    assert outcome.verdict["champion_comparison"]["difference_points"] == 0.0
    assert_rejected(outcome, "champion_margin")
    (rule,) = outcome.failed.values()
    assert rule["name"] == "mAP50-95 against the best of its line" and f"{MODEL} v1" in rule["how"]
