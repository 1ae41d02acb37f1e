"""`nasline reproduce`."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from pipeline_tasks import reproduction
from pipeline_tasks.data.project import init
from pipeline_tasks.data.versioning import add
from pipeline_tasks.errors import ConfigurationError, DataError, UsageError
from pipeline_tasks.reproduction import reproduce
from pipeline_tasks.reproduction_report import ComparedNumber, Reproduction, text
from pipeline_tasks.tracking.mirror import metric_name
from pipeline_tasks.workspace import Workspace


def test_times_are_told_but_not_judged() -> None:
    numbers = [
        ComparedNumber("gate", "int8_map50_95", 0.501, 0.503),
        ComparedNumber("gate", "latency_p50_ms", 4.0, 9.0),
        ComparedNumber("gate", "speedup", 2.0, 1.0),
        ComparedNumber("teach", "images", 250, None),
    ]
    assert [one.judged for one in numbers] == [True, False, False, True]
    found = Reproduction("r", Path(), "0.1.0", {"teach": (), "gate": ("latency.json",)}, numbers)
    assert found.differing(0.005) == [numbers[3]]
    assert found.differing(0.001) == [numbers[0], numbers[3]]
    lines = [" ".join(line.split()) for line in text(found, 0.005).splitlines()]
    assert lines == [
        "run r repeated by code 0.1.0",
        "teach the same to the bit",
        "gate the same to the bit, but for the times in latency.json",
        "number recorded reproduced difference",
        "gate int8_map50_95 0.501 0.503 0.002 within 0.005",
        "gate latency_p50_ms 4 9 5 a time, not compared",
        "gate speedup 2 1 -1 a time, not compared",
        "teach images 250 - - IS MISSING",
        "NOT reproduced: 1 of 2 numbers differ by more than 0.005; 2 times, or chosen by times, are not compared",
    ]
    assert "0.002 DIFFERS by more than 0.001" in " ".join(text(found, 0.001).split())


def test_what_was_chosen_by_times_is_explained() -> None:
    numbers = [
        ComparedNumber("quantize", "float_layers", 6, 8),
        ComparedNumber("quantize", "ptq_map50_95", 0.5, 0.5),
        ComparedNumber("export", "megabytes", 1.5, 1.5),
        ComparedNumber("teach", "map75", float("nan"), float("nan")),
        ComparedNumber("teach", "map50", 0.5, 0.501),
    ]
    files = ("frontier.csv", "checkpoint/model.safetensors")
    found = Reproduction("r", Path(), "0.1.0", {"quantize": files, "teach": None}, numbers)
    shown = text(found, 0.005)
    assert "chosen by times, not compared" in shown and "quantize.selection_evaluations 0" in shown
    assert "2 files with other bytes: checkpoint/model.safetensors" in shown and "no files to compare with" in shown
    assert shown.endswith(
        "reproduced: of 3 numbers 2 are equal to the bit, 1 within 0.005; 2 times, or chosen by times, are not compared"
    )
    assert found.to_json()["numbers"][3] == {
        "step": "teach", "name": "map75", "recorded": None, "reproduced": None, "difference": 0.0, "judged": True,
    }  # fmt: skip


def test_the_exit_code_tells_whether_the_numbers_agree(
    tmp_path: Path, nasline: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = Reproduction("r", tmp_path, "0.1.0", {"teach": ()}, [ComparedNumber("teach", "map50", 0.5, 0.51)])
    monkeypatch.setattr(reproduction, "reproduce", lambda *_: found)
    told = nasline("reproduce", "r", "--into", tmp_path / "again", code=65)
    assert "1 of 1 numbers differ by more than 0.005, the first is map50 of teach: 0.5 became 0.51; " in told
    assert "reproduced: " in nasline("reproduce", "r", "--tolerance", 0.02, code=0)


def started(nasline: Any, folder: Path) -> None:
    nasline("start", "--run", "one", "--start.dataset", folder, "--validate_data.maximum_bad_box_fraction", 0.2, code=0)


def test_other_code_is_checked_out_or_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reproduction, "code_version", lambda: "0.1.0+abc")
    assert reproduction._code("0.1.0+abc", tmp_path, False).checkout is None
    for wanted in ("0.1.0+abc-dirty", "0.0.9"):
        with pytest.raises(ConfigurationError, match="--any-code"):
            reproduction._code(wanted, tmp_path, False)
        assert reproduction._code(wanted, tmp_path, True) == reproduction._Code("0.1.0+abc", None)
    repository = tmp_path / "repository"
    subprocess.run(["git", "init", "--quiet", repository], check=True)
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
    subprocess.run(["git", "-C", repository, *identity, "commit", "--allow-empty", "-qm", "one"], check=True)
    head = subprocess.run(["git", "-C", repository, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    target = reproduction._worktree(repository, head.stdout.strip()[:12], tmp_path / "code")
    assert (target / ".git").exists() and reproduction._worktree(repository, head.stdout.strip(), target) == target
    (target / "changed").write_text("by hand")
    with pytest.raises(ConfigurationError, match=r"is not the code .* as it was committed; remove that folder"):
        reproduction._worktree(repository, head.stdout.strip(), target)
    shutil.rmtree(target)
    assert reproduction._worktree(repository, head.stdout.strip(), target) == target
    with pytest.raises(ConfigurationError, match="cannot be checked out"):
        reproduction._worktree(repository, "0123456789ab", tmp_path / "other")


def test_run_that_nobody_knows_and_set_that_is_gone(coco_folder: Any, tmp_path: Path, nasline: Any) -> None:
    started(nasline, coco_folder.path)
    workspace = Workspace(tmp_path / "workspace")
    with pytest.raises(UsageError, match="run 'one' has finished no step, so there is nothing to repeat"):
        reproduce(workspace, "one", tmp_path / "again")
    frozen = workspace.read_run("one")
    workspace.write_run("one", {**frozen, "steps": {"validate_data": "0" * 32, "register": "1" * 32}})
    source = reproduction._source(workspace, "one")  # a step whose output was removed is repeated too
    assert source.references == ["validate_data"] and source.numbers == {}
    with pytest.raises(UsageError, match=r"is neither in workspace .* nor, with its run\.json, on the tracking server"):
        reproduce(workspace, "unheard-of", tmp_path / "again")
    with coco_folder.edit("val") as content:
        content["annotations"].pop()
    with pytest.raises(DataError, match=r"the set target of the run \(.*.dir\) is not at .* any more"):
        reproduce(workspace, "one", tmp_path / "again", any_code=True)


@pytest.mark.slow
def test_a_run_is_repeated_with_its_own_data_also_from_the_tracking_server_alone(
    coco_folder: Any, tmp_path: Path, nasline: Any, git_identity: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    # a server of its own: the tests' common one holds other runs of this name
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'tracking.db'}")
    project = tmp_path / "project"
    init(project, remote=str(tmp_path / "store"))
    add(coco_folder.path, to=project / "data/set")
    subprocess.run("git add -A && git commit -qm one", shell=True, check=True, cwd=project)
    folder = type(coco_folder)(project / "data/set")
    started(nasline, folder.path)
    frozen = Workspace(tmp_path / "workspace").read_run("one")
    entry = frozen["datasets"]["target"]
    assert entry["dvc_remote"] == f"storage {tmp_path / 'store'}" and len(entry["dvc_revision"]) == 40
    nasline("validate_data", "--run", "one", code=0)
    manifest = next((tmp_path / "workspace/steps/validate_data").glob("*/manifest.json"))
    assert json.loads(manifest.read_text())["datasets"]["target"] == {k: entry[k] for k in entry if k != "path"}
    with folder.edit("train") as content:  # the data goes on; the run's version is in the cache
        content["annotations"].pop()
    options = ("--any-code", "--workspace", tmp_path / "workspace")
    output = nasline("reproduce", "one", *options, "--into", tmp_path / "again", code=0)
    assert "validate_data  the same to the bit" in output and "are equal to the bit" in output
    report = json.loads((tmp_path / "again/reproduction.json").read_text())
    assert report["differing_files"] == {"validate_data": []} and len(report["numbers"]) > 5
    workspace = Workspace(tmp_path / "workspace")
    before = reproduction._source(workspace, "one")
    shutil.rmtree(workspace.root)
    from_server = reproduction._source(workspace, "one")
    assert from_server.frozen == {**before.frozen, "steps": {}}
    tracked = {metric_name(name): value for name, value in before.numbers["validate_data"].items()}
    assert from_server.numbers == {"validate_data": tracked} and from_server.files == {}
