"""`nasline reproduce` on a whole chain: from the run's id alone, by its own code and data, equal to the bit."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from typed_chain import REPOSITORY, Terminal, copy_of

pytestmark = pytest.mark.slow

UNTIMED = ("--quantize.selection_evaluations", "0")
"""Else the float layers are chosen by times, and no two runs need to agree."""
NETWORKS = ("pretrain/student", "pretrain/teacher", "teach", "distill")
FILES = {
    **{step: ("checkpoint/model.safetensors", "metrics.jsonl") for step in NETWORKS},
    "pseudo_label": ("tables/boxes.parquet",),
    "export": ("engine/model.onnx", "engine/model.float.onnx"),
    "gate": ("accuracy.json",),
}


@pytest.fixture
def code(tmp_path: Path) -> Path:
    """The code under test as the only commit of a repository of its own."""
    folder = tmp_path / "code"
    listed = ["git", "-C", REPOSITORY, "ls-files", "-co", "--exclude-standard", "model", "pipeline_tasks", ".gitignore"]
    for name in subprocess.run(listed, capture_output=True, text=True, check=True).stdout.splitlines():
        if (REPOSITORY / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(REPOSITORY / name, folder / name)
    subprocess.run("git init -q && git add -A && git commit -qm one", shell=True, check=True, cwd=folder)
    return folder


@pytest.fixture
def terminal(finished: Terminal, code: Path, tmp_path: Path) -> Terminal:
    """A terminal with a workspace in which much is done already, a tracking server of its own, and that code."""
    own = copy_of(finished, tmp_path / "terminal")
    own.environment |= {"MLFLOW_TRACKING_URI": "sqlite:///tracking.db", "PYTHONPATH": str(code)}
    own.data = tmp_path / "project/data"
    own.nasline("init", str(tmp_path / "project"), "--remote", str(tmp_path / "store"))
    for role in ("target", "pretrain", "unlabeled"):
        own.nasline("data", "add", str(finished.data / role), "--to", str(own.data / role), "--no-announce")
    push = "git add -A && git commit -qm one && dvc push -q"
    subprocess.run(push, shell=True, check=True, cwd=tmp_path / "project", env=own.environment)
    return own


@pytest.fixture(autouse=True)
def identity(monkeypatch: pytest.MonkeyPatch) -> None:
    for who in ("AUTHOR", "COMMITTER"):
        for what in ("NAME", "EMAIL"):
            monkeypatch.setenv(f"GIT_{who}_{what}", "test@example.org")


def published(workspace: Path, run: str, step: str) -> Path:
    steps: dict[str, str] = json.loads((workspace / "runs" / run / "run.json").read_text())["steps"]
    return workspace / "steps" / step.split("/")[0] / steps[step]


def test_a_whole_run_is_repeated_from_its_id_when_workspace_data_and_code_have_gone_on(
    terminal: Terminal, code: Path, tmp_path: Path
) -> None:
    terminal.start("versioned", *UNTIMED)
    terminal.chain("versioned", until="gate")
    frozen = json.loads((terminal.workspace / "runs/versioned/run.json").read_text())
    assert not frozen["code_version"].endswith("-dirty")
    before = tmp_path / "before"
    shutil.move(terminal.workspace, before)
    (code / "pipeline_tasks/distill.py").write_text("raise SystemExit('code of later')\n")
    subprocess.run(["git", "commit", "-qam", "two"], check=True, cwd=code)
    shutil.rmtree(tmp_path / "project/.dvc/cache")
    annotations = terminal.data / "target/annotations/instances_train.json"
    content = json.loads(annotations.read_text())
    content["annotations"].pop()
    annotations.unlink()
    annotations.write_text(json.dumps(content))

    output = terminal.nasline("reproduce", "versioned", "--into", "again")
    again = terminal.folder / "again"
    for step, names in FILES.items():
        folders = published(before, "versioned", step), published(again / "workspace", "versioned-again", step)
        for name in names:
            assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes(), (step, name)
    assert "target: " in output and "from the cache or remote of" in output
    report: dict[str, Any] = json.loads((again / "reproduction.json").read_text())
    assert report["code_version"] == frozen["code_version"]
    assert set(report["differing_files"]) == {step for step in frozen["steps"] if "/shard-" not in step}
    differing = {one["name"] for one in report["numbers"] if one["difference"] != 0}
    assert all(word.endswith("_ms") or word == "speedup" for word in differing), differing
    assert "reproduced: of " in output and " are equal to the bit; " in output
    assert "gate int8_map50_95 " in " ".join(output.split()) and "a time, not compared" in output
