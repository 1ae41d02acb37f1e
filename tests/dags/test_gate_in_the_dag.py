"""The gate's rules through the real DAG: `start`, `gate` and `register` are real, the engines' accuracy is known.

Four runs: the first engine, a worse one that a wide margin lets pass, one that misses every rule, one that meets all.
What is trained in between would take minutes and show nothing here; tests/chain has the chain with real networks.
"""

from __future__ import annotations

import contextlib
import json
import sqlite3
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import known_engines
import pytest
from known_engines import Known
from test_dag_chain import GATES, load_dag
from typed_chain import Terminal

from pipeline_tasks.gate_parameters import GateParameters

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

BEFORE_THE_GATE = r"validate_data|pretrain\..*|teach|pseudo_label\.(label|merge)|distill|quantize|export"
MODEL = "gate_digits"
RUN = "before"
DIGITS = list("0123456789")
PRECISION = "precision of the built engine"
BEST_OF_LINE = "mAP50-95 against the best of its line"

ACCURACY = {
    "minimum_map": 0.9, "maximum_map_drop": 1.0, "maximum_class_map_drop": 1.0, "maximum_box_error_pixels": 0.5,
    "champion_margin": 0.5, "minimum_added_class_map": 0.9,
}  # fmt: skip
"""The same limits for the engine that finds nothing and for the one that finds everything."""
MISSED: dict[str, Any] = {
    **ACCURACY, "maximum_latency_ms": 1e-6, "maximum_latency_p99_ms": 1e-6, "minimum_speedup": 1e6,
    "maximum_size_megabytes": 1e-3, "require_image_licence": ["nobody's"], "require_annotation_licence": ["nobody's"],
    "require_weights_licence": ["nobody's"], "minimum_comparison_images": 1000, "allow_removed_classes": False,
}  # fmt: skip
MET: dict[str, Any] = {
    **ACCURACY, "maximum_latency_ms": 1e6, "maximum_latency_p99_ms": 1e6, "minimum_speedup": 1e-6,
    "maximum_size_megabytes": 1e3, "require_image_licence": ["CC BY 4.0"], "require_annotation_licence": ["CC0-1.0"],
    "require_weights_licence": ["random initialisation"], "minimum_comparison_images": 20,
    "allow_removed_classes": True,
}  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """One run of the DAG: states of its tasks, what the gate wrote, what MLflow and the task `report` say."""

    state: str
    states: dict[str, str]
    verdict: dict[str, Any]
    tags: dict[str, str]
    said: str

    @property
    def skipped(self) -> set[str]:
        return {task for task, state in self.states.items() if state == "skipped"}

    def rules(self, passed: bool) -> dict[str, dict[str, Any]]:
        """The rules with that outcome by parameter; two share the champion's, and one has none."""
        own_name = {PRECISION, BEST_OF_LINE}
        judged = self.verdict["rules"]
        return {
            one["name"] if one["name"] in own_name else one["parameter"]: one
            for one in judged
            if one["passed"] is passed
        }


RunDag = Callable[..., Outcome]
sleep = time.sleep


def short_sleep(seconds: float) -> None:
    """`DAG.test` sleeps for a second after each round in which no task could be started; here there are several."""
    sleep(min(seconds, 0.05))


ALL_RULES = {*MISSED, PRECISION, BEST_OF_LINE}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory, small_digits: Path) -> Terminal:
    """A workspace in which all that precedes `export` is finished."""
    terminal = Terminal(tmp_path_factory.mktemp("gates"), small_digits)
    terminal.nasline("start", "--run", RUN, "--params", "params.yaml", "--start.dataset", str(small_digits / "target"))
    terminal.nasline("validate_data", "--run", RUN)
    known_engines.publish_before_export(terminal, RUN)
    return terminal


@contextlib.contextmanager
def real_commands(terminal: Terminal) -> Iterator[None]:
    """DAGs run the real `nasline` in the terminal's workspace, with its params.yaml."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("NASLINE_WORKSPACE", "OMP_NUM_THREADS"):
            patch.setenv(name, terminal.environment[name])
        patch.setenv("NASLINE_COMMAND", f"{sys.executable} -m pipeline_tasks")
        patch.setenv("NASLINE_PARAMS", str(terminal.folder / "params.yaml"))
        patch.chdir(terminal.folder)
        patch.setattr(time, "sleep", short_sleep)
        yield


@pytest.fixture(scope="module")
def run_dag(prepared: Terminal) -> Iterator[RunDag]:
    """Runs the DAG with the real `nasline` on an engine; options of the gate by their own name."""
    with real_commands(prepared):
        fixed = {
            "start.model_name": MODEL, "start.dataset": str(prepared.data / "target"), "gate.latency_repeats": 100,
            "gate.latency_warmup_seconds": 0.1, "gate.minimum_class_boxes": 1,
        }  # fmt: skip

        def run(engine: Known, mark: int, gate: dict[str, Any]) -> Outcome:
            output = StringIO()
            export = known_engines.publish_export(prepared, RUN, engine, mark)
            conf = {**fixed, **export, **{f"gate.{name}": value for name, value in gate.items()}}
            with contextlib.redirect_stdout(output):
                done = load_dag("train_yolo_nas").test(run_conf=conf, mark_success_pattern=BEFORE_THE_GATE)
            import step_operator

            name = step_operator.run_name(done.run_id)
            return Outcome(
                state=str(done.state),
                states={ti.task_id: str(ti.state) for ti in done.get_task_instances()},
                verdict=published_verdict(prepared, name, output.getvalue()),
                tags=parent_tags(prepared.workspace, name),
                said=output.getvalue(),
            )

        yield run


def published_verdict(terminal: Terminal, run: str, said: str) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads((terminal.published(run, "gate") / "verdict.json").read_text())
    except (OSError, KeyError) as error:
        raise AssertionError(f"the gate of the DAG's run {run} published no verdict ({error}):\n{said}") from None
    return content


def parent_tags(workspace: Path, run: str) -> dict[str, str]:
    """Tags of a pipeline run's parent in MLflow."""
    query = (
        "SELECT t.key, t.value FROM tags t WHERE t.run_uuid ="
        " (SELECT a.run_uuid FROM tags a JOIN tags b USING (run_uuid)"
        " WHERE a.key = 'nasline.run' AND a.value = ? AND b.key = 'nasline.step' AND b.value = 'pipeline')"
    )
    with contextlib.closing(sqlite3.connect(workspace / "mlflow.db")) as store:
        return dict(store.execute(query, (run,)).fetchall())


def version_page(workspace: Path, version: str) -> tuple[dict[str, str], str]:
    """Tags and description of a registered version."""
    where = "WHERE version = ? AND name = ?"
    with contextlib.closing(sqlite3.connect(workspace / "mlflow.db")) as store:
        tags = dict(store.execute(f"SELECT key, value FROM model_version_tags {where}", (version, MODEL)).fetchall())
        (page,) = store.execute(f"SELECT description FROM model_versions {where}", (version, MODEL)).fetchone()
    return tags, page


@pytest.fixture(scope="module")
def first(run_dag: RunDag) -> Outcome:
    return run_dag(Known(finds=DIGITS), 2, {})


@pytest.fixture(scope="module")
def accepted_though_worse(run_dag: RunDag, first: Outcome) -> Outcome:
    """It finds half of the classes and calls one of the others a ghost; a margin that is far too wide lets it pass."""
    return run_dag(Known(finds=DIGITS[:5], class_names=[*DIGITS[:-1], "ghost"]), 3, {"champion_margin": 100.0})


@pytest.fixture(scope="module")
def missed_all(run_dag: RunDag, accepted_though_worse: Outcome) -> Outcome:
    """Its INT8 form finds nothing and is none."""
    return run_dag(Known(finds=(), quantized=False), 4, MISSED)


@pytest.fixture(scope="module")
def met_all(run_dag: RunDag, missed_all: Outcome) -> Outcome:
    return run_dag(Known(finds=DIGITS), 5, MET)


def test_the_limits_here_are_all_that_there_are() -> None:
    settings = {"minimum_class_boxes", "maximum_spread"}  # what a rule looks at, and what is refused before any rule
    prefixes = ("minimum_", "maximum_", "require_", "allow_", "champion_")
    limits = {name for name in GateParameters.model_fields if name.startswith(prefixes)} - settings
    assert set(MISSED) == set(MET) == limits


def test_without_a_champion_the_first_engine_is_judged_alone(first: Outcome) -> None:
    assert (first.state, first.tags["nasline.registered"]) == ("success", f"{MODEL} v1")
    assert first.verdict["champion_comparison"] is None and not first.rules(passed=False)
    assert "champion_margin" not in first.rules(passed=True)


def test_within_its_margin_a_worse_engine_becomes_champion_and_carries_the_better_one(
    accepted_though_worse: Outcome, prepared: Terminal
) -> None:
    assert accepted_though_worse.state == "success"
    assert accepted_though_worse.tags["nasline.registered"] == f"{MODEL} v2"
    compared = accepted_though_worse.verdict["champion_comparison"]
    assert compared["difference_points"] == pytest.approx(-50.0) and compared["share_of_resamples_worse"] == 1.0
    assert accepted_though_worse.rules(passed=True)["allow_removed_classes"]["measured"] == "none removed"
    tags, _ = version_page(prepared.workspace, "2")
    assert tags["nasline.best_of_line"] == f"{MODEL} v1"


@pytest.mark.parametrize("rule", sorted(ALL_RULES))
def test_each_rule_can_reject_a_run_and_says_so_in_airflow_and_mlflow(missed_all: Outcome, rule: str) -> None:
    missed = missed_all.rules(passed=False)[rule]
    sentence = missed_all.tags["nasline.verdict"]
    assert sentence.startswith("rejected: ") and f"{missed['name']}: " in sentence
    assert f"The gate rejected: {sentence.removeprefix('rejected: ')}." in missed_all.said


def test_a_rejected_run_is_green_skipped_and_registers_nothing(missed_all: Outcome) -> None:
    assert set(missed_all.rules(passed=False)) == ALL_RULES and not missed_all.rules(passed=True)
    assert (missed_all.state, missed_all.states["report"]) == ("success", "success")
    assert missed_all.skipped == {*GATES, "register"}
    assert not missed_all.verdict["passed"]
    assert missed_all.verdict["sentence"] == missed_all.tags["nasline.verdict"]
    assert "nasline.registered" not in missed_all.tags
    assert "Nothing was registered; the champion is unchanged." in missed_all.said
    assert missed_all.rules(passed=False)["allow_removed_classes"]["measured"] == "ghost"
    assert missed_all.verdict["champion_comparison"]["added_classes"] == {"9": 0.0}
    drop = missed_all.rules(passed=False)["maximum_map_drop"]
    assert (drop["measured"], drop["limit"], drop["unit"]) == (pytest.approx(100.0), 1.0, "points")


@pytest.mark.parametrize("rule", sorted(ALL_RULES))
def test_each_rule_can_pass(met_all: Outcome, rule: str) -> None:
    assert rule in met_all.rules(passed=True)


def test_an_engine_that_meets_every_limit_is_registered_with_what_was_measured(
    met_all: Outcome, prepared: Terminal
) -> None:
    assert set(met_all.rules(passed=True)) == ALL_RULES and not met_all.rules(passed=False)
    assert (met_all.state, met_all.skipped) == ("success", GATES - {"gate.cpu"})
    assert met_all.verdict["passed"] and met_all.verdict["off"] == []
    assert met_all.rules(passed=True)["maximum_box_error_pixels"]["how"].endswith("itself 0 pixels from torch")
    assert met_all.tags["nasline.registered"] == f"{MODEL} v1", "the first engine again, which keeps its version"
    assert f"Registered: {MODEL} v1." in met_all.said
    tags, page = version_page(prepared.workspace, "1")
    assert tags["nasline.best_of_line"] == "itself" and tags["nasline.target"] == "cpu"
    assert float(tags["nasline.latency_p99_ms"]) >= float(tags["nasline.latency_min_ms"]) > 0
    assert tags["nasline.int8_map50_95"] == "1.0000"
    assert page.startswith("The gate accepted: all ") and "| int8 &emsp; |" in page and "letterbox" in page
