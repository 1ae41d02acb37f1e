"""The champion's DAGs: what follows an evaluation, who must approve, and what is told when something fails."""

from __future__ import annotations

import importlib
import json
from types import SimpleNamespace
from typing import Any

import pytest
from airflow.sdk.exceptions import AirflowFailException
from dag_helpers import FakeNasline
from test_dag_chain import ALL_DAGS, load_dag, run

EVALUATION = {"summary": {"dropped": 0, "retrain": 0, "drop_points": 0.4}}
PLANNED = {"model": "cells", "version": "2", "before": "3", "kind": "rollback"}


def option(argv: list[str], name: str) -> str:
    """The value of `--name=value`."""
    (word,) = [word for word in argv if word.startswith(f"--{name}=")]
    return word.partition("=")[2]


def test_a_champion_that_holds_ends_green(fake_nasline: FakeNasline) -> None:
    fake_nasline.plan(**{"evaluate-champion": [{"result": EVALUATION, "say": "champion cells v3 holds"}]})
    state, states = run("evaluate_champion", {"start.dataset": "/data/today"})
    assert (state, states) == (
        "success", {"evaluate": "success", "judge": "success", "alert": "skipped", "retrain": "skipped"}
    )  # fmt: skip
    (call,) = fake_nasline.calls()
    assert json.loads(call["argv"][-1]) == {"start.dataset": "/data/today"}
    assert "--params" in call["argv"] and "--run" in call["argv"]


@pytest.mark.parametrize("retrain", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_drop_is_a_red_run_and_may_start_a_retraining(fake_nasline: FakeNasline, retrain: int) -> None:
    fake_nasline.plan(**{"evaluate-champion": [{"result": {"summary": {"dropped": 1, "retrain": retrain}}}]})
    state, states = run("evaluate_champion")
    assert (state, states["alert"]) == ("failed", "failed")
    assert states["retrain"] == ("success" if retrain else "skipped")


def test_the_retraining_follows_the_event_of_a_drop() -> None:
    outlets = load_dag("evaluate_champion").get_task("retrain").outlets
    timetable: Any = load_dag("retrain_yolo_nas").timetable
    followed = [asset.name for asset in timetable.asset_condition.objects]
    assert [asset.name for asset in outlets] == ["nasline_champion_drop"] and "nasline_champion_drop" in followed


def test_the_form_of_an_evaluation_offers_what_it_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NASLINE_EVALUATE_CRON", "15 6 * * *")
    dag = load_dag("evaluate_champion")
    timetable: Any = dag.timetable
    assert timetable.expression == "15 6 * * *" and dag.is_paused_upon_creation
    assert {"start.dataset", "start.model_name", "register.maximum_champion_drop"} <= set(dag.params)
    assert not [key for key in dag.params if key.startswith(("distill.", "gate."))]


def test_a_rollback_is_made_at_once_to_the_version_that_was_checked(fake_nasline: FakeNasline) -> None:
    fake_nasline.plan(rollback=[{"result": PLANNED, "say": "roll back to cells v2"}])
    reason = "'; rm -rf / #"
    state, states = run("promote_or_rollback", {"model": "cells", "reason": reason})
    assert state == "success"
    assert states == {"plan": "success", "decide": "success", "approve": "skipped", "move": "success"}
    plan, move = (call["argv"] for call in fake_nasline.calls())
    assert plan[0] == "rollback" and "--dry-run" in plan and plan[-2:] == ["--", "cells"]
    assert not [word for word in plan if word.startswith("--to")]
    assert "--dry-run" not in move and option(move, "to") == "2" and move[-2:] == ["--", "cells"]
    assert option(plan, "reason") == option(move, "reason") == reason
    assert option(move, "by") == "dag_test"
    assert option(move, "instead-of") == "3" and not [word for word in plan if word.startswith("--instead-of")]


@pytest.mark.slow
def test_a_refused_promotion_fails_with_the_commands_sentence_and_nothing_moves(
    fake_nasline: FakeNasline, capfd: pytest.CaptureFixture[str]
) -> None:
    fake_nasline.plan(promote=[{"exit": 65, "say": "cells v9 did not pass the gate (rejected); it cannot be champion"}])
    state, states = run("promote_or_rollback", {"action": "promote", "model": "cells", "version": "9", "reason": "try"})
    assert (state, states["plan"], states["move"]) == ("failed", "failed", "upstream_failed")
    (call,) = fake_nasline.calls()
    assert call["argv"][0] == "promote" and call["argv"][-3:] == ["--", "cells", "9"]
    assert "cells v9 did not pass the gate (rejected); it cannot be champion" in capfd.readouterr().out


def test_a_promotion_waits_for_a_person_and_a_move_to_the_champion_for_nobody() -> None:
    load_dag("promote_or_rollback")
    next_task = importlib.import_module("promote_or_rollback").next_task
    assert next_task({**PLANNED, "kind": "promote"}) == ["approve"]
    assert next_task(PLANNED) == ["move"]
    assert next_task({**PLANNED, "version": "3"}) == []
    dag = load_dag("promote_or_rollback")
    approve: Any = dag.get_task("approve")
    assert approve.downstream_task_ids == {"move"} and approve.defaults == ["Reject"]
    assert approve.response_timeout.days == 7
    move: Any = dag.get_task("move")
    assert dag.max_active_runs > 16 and move.max_active_tis_per_dag == 1, "a rollback waits for no promotion"


def test_an_approved_version_replaces_the_champion_that_was_shown_and_no_other(fake_nasline: FakeNasline) -> None:
    operator = importlib.import_module("promotion_operator").PromotionOperator(task_id="move", plan_only=False)
    for before, told in (("3", "3"), (None, "none")):
        pulled = {"plan": {**PLANNED, "kind": "promote", "before": before}, "approve": {"chosen_options": ["Approve"]}}
        instance = SimpleNamespace(xcom_pull=lambda task_ids, key=None, pulled=pulled: pulled[task_ids])
        form = {"action": "promote", "model": "cells", "version": "2", "reason": "x"}
        run_of = SimpleNamespace(triggering_user_name="ada")
        words = operator.argv({"params": form, "ti": instance, "dag_run": run_of})
        assert option(words, "instead-of") == told and "--dry-run" not in words


def test_who_asked_and_who_approved_is_told() -> None:
    who = importlib.import_module("promotion_operator").who
    answered = {"responded_by_user": {"id": "7", "name": "bob"}}
    for answer, told in ((answered, "ada, approved by bob"), (None, "ada")):
        instance = SimpleNamespace(xcom_pull=lambda task_ids, answer=answer: answer)
        assert who({"dag_run": SimpleNamespace(triggering_user_name="ada"), "ti": instance}) == told


def test_a_promotion_that_nobody_approved_is_refused_also_when_its_task_is_cleared() -> None:
    require_approval = importlib.import_module("promotion_operator").require_approval
    require_approval({"chosen_options": ["Approve"]})
    for answer in (None, {}, {"chosen_options": ["Reject"]}):
        with pytest.raises(AirflowFailException, match="nobody approved this promotion"):
            require_approval(answer)


def test_a_failure_is_told_with_its_first_line_and_where_to_look(monkeypatch: pytest.MonkeyPatch) -> None:
    alerts = importlib.import_module("alerts")
    sent: list[Any] = []
    monkeypatch.setattr(alerts, "send", lambda *message: sent.append(message))
    instance = SimpleNamespace(dag_id="train_yolo_nas", task_id="teach", run_id="manual__2026-11-22T07:00:00+00:00")
    error = ValueError("image a.jpg is truncated (teach: bad data or parameters, exit 65)\nsecond line")
    task = SimpleNamespace(mlflow_url="http://mlflow/#/experiments/1/runs/7")
    alerts.task_failed({"ti": instance, "exception": error, "task": task})
    ((subject, lines),) = sent
    assert subject == "train_yolo_nas: teach failed"
    assert lines[0] == "image a.jpg is truncated (teach: bad data or parameters, exit 65)"
    assert "MLflow http://mlflow/#/experiments/1/runs/7" in lines
    assert lines[-1].endswith("/dags/train_yolo_nas/runs/manual__2026-11-22T07%3A00%3A00%2B00%3A00/tasks/teach")


@pytest.mark.parametrize("dag_id", ALL_DAGS)
def test_every_dag_and_task_has_an_owner_documentation_tags_and_a_failure_callback(dag_id: str) -> None:
    dag = load_dag(dag_id)
    assert dag.doc_md and dag.description and {"nasline"} <= set(dag.tags)
    for task in dag.tasks:
        assert task.owner == "nasline" and task.doc_md, task.task_id
        assert [callback.__name__ for callback in task.on_failure_callback] == ["task_failed"], task.task_id


def test_a_deadline_is_there_when_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not load_dag("train_yolo_nas").deadline
    monkeypatch.setenv("NASLINE_DEADLINE_HOURS", "1.5")
    (deadline,) = load_dag("train_yolo_nas").deadline
    assert deadline.interval.total_seconds() == 5400
    assert deadline.callback.path == "pipeline_tasks.notification.deadline_missed"
