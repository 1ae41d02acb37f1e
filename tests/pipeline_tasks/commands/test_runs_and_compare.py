"""The tables of runs: the same facts from MLflow and from the workspace, and what is said where there are none."""

from __future__ import annotations

import base64
import json
import math
import zlib
from dataclasses import replace
from pathlib import Path

import pytest
from tracked_runs import ACCEPTED, Registry, mirror, write_run

from pipeline_tasks.commands import compare, runs
from pipeline_tasks.errors import UnavailableError, UsageError
from pipeline_tasks.overlaid_curves import draw
from pipeline_tasks.promotion import carry_out, plan_promotion
from pipeline_tasks.run_facts import in_workspace
from pipeline_tasks.tracking.client import connect
from pipeline_tasks.tracking.experiments import find_or_create_experiment
from pipeline_tasks.tracking.mirror import Tracker, deliver_run
from pipeline_tasks.tracking.pipeline_runs import find_run, list_runs
from pipeline_tasks.workspace import Workspace


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """Three runs: one with the champion, one rejected, both in MLflow; and one that MLflow does not know."""
    folder = tmp_path_factory.mktemp("runs")
    workspace = Workspace(folder / "workspace")
    write_run(workspace, "good", 0.5, epochs=3, version="cells v1")
    write_run(workspace, "bad", 0.1, epochs=2)
    write_run(workspace, "local", 0.3, epochs=4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{workspace.root}/mlflow.db")
        for run in ("good", "bad"):
            mirror(workspace, run)
        Registry(connect(workspace), folder / "registered", "cells").add(
            run_id=Tracker(workspace, "good", "register").run_id
        )
        carry_out(workspace, plan_promotion(workspace, "cells", "1"), "ada", "the only one")
    return workspace


@pytest.fixture(autouse=True)
def store(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test asks the store of the module's workspace."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{workspace.root}/mlflow.db")


def test_the_table_tells_data_variants_verdict_champion_and_why(workspace: Workspace) -> None:
    heading, *rows = runs.table(*runs.collect(workspace, 20))
    assert heading.split("  ")[0] == "run"
    assert [row.split()[0] for row in rows[:3]] == ["local", "good", "bad"]  # the newest first, MLflow's or not
    assert "cells abcdef  s < m" in rows[1] and "0.5000" in rows[1]
    assert rows[1].endswith(f"{ACCEPTED}                      cells v1 champion")
    assert "finished" in rows[2] and "rejected: INT8 mAP50-95" in rows[2] and rows[2].endswith("-")
    assert rows[3].startswith("\ncells v1 is champion since 20") and rows[3].endswith("by ada): the only one")


def test_mlflows_table_itself_says_which_run_made_the_champion_and_why(workspace: Workspace) -> None:
    client = connect(workspace)
    experiment = client.get_experiment_by_name("cells")
    (found,) = client.search_runs([experiment.experiment_id], "tags.`nasline.is_champion` LIKE 'cells v1 since%'")
    assert found.data.tags["mlflow.runName"] == "good"
    assert found.data.tags["nasline.is_champion"].endswith("by ada: the only one")


def test_mlflow_draws_curves_of_several_runs_and_shows_the_machine(workspace: Workspace) -> None:
    client = connect(workspace)
    experiment = client.get_experiment_by_name("cells")
    parent, *_ = client.search_runs([experiment.experiment_id], "tags.`nasline.data` = 'cells abcdef'")
    assert parent.data.tags["nasline.variant"] == "s < m"
    assert "- student s, teacher m, 640 pixels, for the model `cells`" in parent.data.tags["mlflow.note.content"]
    points = client.get_metric_history(parent.info.run_id, "curves/distill/loss")
    assert [point.step for point in points] == [1, 2, 3]
    query = f"tags.`mlflow.parentRunId` = '{parent.info.run_id}' and tags.`nasline.step` = 'distill'"
    (child,) = client.search_runs([experiment.experiment_id], query)
    told = client.get_metric_history(child.info.run_id, "system/cpu_utilization_percentage")
    assert [(point.step, point.timestamp, point.value) for point in told] == [(0, 1000, 40.5), (1, 11000, 60.0)]


def test_an_experiment_has_a_saved_view_with_the_columns_that_answer(workspace: Workspace) -> None:
    client = connect(workspace)
    experiment = client.get_experiment_by_name("cells")
    view = json.loads(experiment.tags["mlflow.sharedViewState.nasline"])
    columns = json.loads(zlib.decompress(base64.b64decode(view["state"].removeprefix("deflate;"))))["selectedColumns"]
    (champion,) = client.search_runs([experiment.experiment_id], "tags.`nasline.is_champion` LIKE 'cells v1 since%'")
    shown = {f"tags.`{name}`" for name in champion.data.tags} | {f"metrics.`{name}`" for name in champion.data.metrics}
    assert {"tags.`nasline.data`", "tags.`nasline.is_champion`", "metrics.`gate/int8_map50_95`"} <= set(columns) & shown
    client.set_experiment_tag(experiment.experiment_id, "mlflow.sharedViewState.nasline", "changed by a person")
    find_or_create_experiment(client, "cells")
    kept = client.get_experiment_by_name("cells").tags["mlflow.sharedViewState.nasline"]
    client.set_experiment_tag(experiment.experiment_id, "mlflow.sharedViewState.nasline", json.dumps(view))
    assert kept == "changed by a person"


def test_a_verdict_without_its_files_does_not_end_the_step(
    workspace: Workspace, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tracker = Tracker(workspace, "local", "gate")
    tracker.record.artifacts, tracker.record.status = workspace.step_directory("gate", "key-of-local"), "FINISHED"
    assert tracker.deliver() is not None
    assert "stays without the verdict's table" in caplog.text and "verdict.json" in caplog.text


def test_what_was_delivered_is_not_sent_again(workspace: Workspace) -> None:
    client = connect(workspace)
    before = client.search_runs([client.get_experiment_by_name("cells").experiment_id])
    mirror(workspace, "bad")
    after = client.search_runs([client.get_experiment_by_name("cells").experiment_id])
    assert [one.data.metrics for one in before] == [one.data.metrics for one in after]


def test_both_sources_tell_the_same(workspace: Workspace) -> None:
    for run in ("good", "bad"):
        ours, theirs = in_workspace(workspace, run), find_run(workspace, run)
        assert theirs is not None
        for fact in ("run", "started_ms", "state", "parameters", "datasets", "verdict", "registered", "curves", "data"):
            assert getattr(ours, fact) == getattr(theirs, fact), fact
        assert ours.metrics == {name: value for name, value in theirs.metrics.items() if name in ours.metrics}


def test_a_server_that_is_away_leaves_the_workspaces_runs(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    found, champions = runs.collect(workspace, 2)
    assert [one.run for one in found] == ["local", "good"] and champions == {}
    assert "these are the workspace's runs alone, without champions" in caplog.text
    with pytest.raises(UnavailableError, match=r"run 'nobody' is not in workspace .*, and the model registry at"):
        compare.read(workspace, "nobody")


def test_a_move_that_broke_off_before_the_runs_were_told_is_told_by_the_same_call(workspace: Workspace) -> None:
    client = connect(workspace)
    parent = client.search_runs([client.get_experiment_by_name("cells").experiment_id], "tags.`nasline.run` = 'good'")
    (run_id,) = [one.info.run_id for one in parent if one.data.tags["nasline.step"] == "pipeline"]
    told = client.get_run(run_id).data.tags["nasline.is_champion"]
    client.delete_tag(run_id, "nasline.is_champion")
    carry_out(workspace, plan_promotion(workspace, "cells", "1"), "bob", "again")
    assert client.get_run(run_id).data.tags["nasline.is_champion"] == told


def test_a_damaged_run_does_not_hide_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/none.db")
    workspace = Workspace(tmp_path / "workspace")
    for run in ("cut", "old", "whole"):
        write_run(workspace, run, 0.5)
    (workspace.run_directory("cut") / "run.json").write_text('{"run": "cu')
    old = workspace.read_run("old")
    workspace.write_run("old", {name: value for name, value in old.items() if name != "created_ms"})
    assert [one.run for one in runs.collect(workspace, 5)[0]] == ["whole"]
    assert "run cut is left out: " in caplog.text and "run old is left out: its files lack 'created_ms'" in caplog.text


def test_delivered_late_the_last_step_closes_the_pipeline_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    workspace, store = Workspace(tmp_path / "workspace"), f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    write_run(workspace, "late", 0.5, version="cells v1")
    failed = Tracker(workspace, "late", "teach")
    failed.record.status = "FAILED"
    assert failed.deliver() is not None
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    for step, outcome in (("teach", None), ("register", {"nasline.verdict": ACCEPTED})):
        tracker = Tracker(workspace, "late", step)
        tracker.record.status, tracker.record.outcome = "FINISHED", outcome
        assert tracker.deliver() is None
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    assert deliver_run(workspace, "late") == 2
    (found,) = list_runs(workspace, 1)
    assert (found.state, found.verdict) == ("finished", ACCEPTED)


def test_a_comparison_shows_what_differs(workspace: Workspace) -> None:
    found = [compare.read(workspace, run) for run in ("good", "bad")]
    assert compare.differing_parameters(found) == [("distill.epochs", "3", "2")]
    numbers = {row[0]: row[1:] for row in compare.final_numbers(found)}
    assert numbers["gate/int8_map50_95"] == ("0.5", "0.1")
    assert numbers["distill/steps"] == ("30", "20")
    said = "\n".join(compare.lines(found))
    assert "parameters that differ  good  bad" in said and "start.dataset" not in said
    assert "parameters are equal" in "\n".join(compare.lines([found[0], found[0]]))


def test_what_other_releases_and_broken_measurements_left_is_shown_too(workspace: Workspace, tmp_path: Path) -> None:
    (one,) = [in_workspace(workspace, "good")]
    other = replace(one, metrics={"gate/a": math.nan, "gate/b": math.inf}, curves={"tune": one.curves["distill"]})
    assert draw([one, other], tmp_path / "curves.png")
    assert "gate/a" in "\n".join(compare.lines([one, other]))


def test_curves_of_all_runs_are_in_one_picture(workspace: Workspace, tmp_path: Path) -> None:
    from PIL import Image

    found = [in_workspace(workspace, run) for run in ("good", "bad", "local")]
    assert draw(found, tmp_path / "out" / "curves.png")
    assert Image.open(tmp_path / "out" / "curves.png").width > 600
    bare = [one for one in found if not one.curves.clear()]
    assert not draw(bare, tmp_path / "none.png") and not (tmp_path / "none.png").exists()


def test_the_commands(workspace: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from pipeline_tasks.__main__ import main

    place = ["--workspace", str(workspace.root)]
    assert main(["runs", "--json", *place]) == 0
    told = {one["run"]: one for one in json.loads(capsys.readouterr().out)}
    assert told["good"]["is_champion"] and told["bad"]["verdict"].startswith("rejected")
    assert main(["compare", "good", "bad", "--out", str(tmp_path), *place]) == 0
    assert json.loads((tmp_path / "comparison.json").read_text())[1]["metrics"]["distill/steps"] == 20


def test_unknown_runs_and_single_ones_are_refused(workspace: Workspace) -> None:
    with pytest.raises(UsageError, match=r"is neither in workspace .* nor in MLflow .*`nasline runs` lists"):
        compare.read(workspace, "nobody")
    from pipeline_tasks.__main__ import main

    assert main(["compare", "good", "good", "--workspace", str(workspace.root)]) == 2


def test_an_empty_workspace_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/none.db")
    assert runs.table(*runs.collect(Workspace(tmp_path), 5)) == ["no runs yet; `nasline start` makes the first"]
