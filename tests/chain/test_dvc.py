"""`dvc repro` runs the same commands and ends with the same accuracy; `nasline data add` versions the data."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from typed_chain import REPOSITORY, SMALL, Terminal

from pipeline_tasks.params import resolve

pytestmark = pytest.mark.slow

UNTIMED = {"selection_evaluations": 0}
"""The search for float layers times the engine on this machine, so that two runs of it may choose differently."""


def run(command: list[str], folder: Path, environment: dict[str, str]) -> str:
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def project(finished: Terminal, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """A clone-like project: git, DVC, the shipped dvc.yaml, the data added by `nasline data add`."""
    folder = tmp_path_factory.mktemp("project")
    environment = {k: v for k, v in finished.environment.items() if k != "NASLINE_WORKSPACE"}
    environment |= {
        f"GIT_{who}_{what}": "test@example.org" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")
    }
    for name in ("dvc.yaml", ".dvcignore", ".gitignore"):
        shutil.copy(REPOSITORY / name, folder)
    parameters = yaml.safe_load(SMALL)
    sets = {"dataset": "target", "pretrain_dataset": "pretrain", "unlabeled_dataset": "unlabeled"}
    parameters["quantize"] |= UNTIMED
    parameters["start"] |= {name: f"data/{role}" for name, role in sets.items()}
    (folder / "given.yaml").write_text(yaml.safe_dump(parameters))
    complete = resolve(folder / "given.yaml", {}).to_json()  # DVC follows only what the file names
    (folder / "params.yaml").write_text(yaml.safe_dump(complete))
    for command in (["git", "init", "-q"], ["dvc", "init", "-q"], ["dvc", "config", "core.analytics", "false"]):
        run(command, folder, environment)
    for role in sets.values():
        printed = run(
            ["nasline", "data", "add", str(finished.data / role), "--to", f"data/{role}"], folder, environment
        )
        digest = json.loads((finished.workspace / "runs" / "one" / "run.json").read_text())["datasets"][role]["digest"]
        assert digest in printed, "DVC, MLflow and an unversioned folder give one digest"
    run(["git", "add", "-A"], folder, environment)
    run(["git", "commit", "-q", "-m", "data"], folder, environment)
    return folder, environment


def test_repro_gives_the_accuracy_of_the_typed_chain(finished: Terminal, project: tuple[Path, dict[str, str]]) -> None:
    folder, environment = project
    run([sys.executable, "-m", "dvc", "repro"], folder, environment)
    options = [word for name, value in UNTIMED.items() for word in (f"--quantize.{name}", str(value))]
    finished.start("untimed", *options)
    finished.chain("untimed", until="gate")
    ours = json.loads((folder / "outputs" / "gate" / "accuracy.json").read_text())
    assert ours == json.loads((finished.published("untimed", "gate") / "accuracy.json").read_text())
    run(["git", "add", "-A"], folder, environment)
    run(["git", "commit", "-q", "-m", "first run"], folder, environment)


def test_changed_gate_limit_runs_the_gate_alone_and_metrics_diff_shows_it(
    project: tuple[Path, dict[str, str]],
) -> None:
    folder, environment = project
    parameters = yaml.safe_load((folder / "params.yaml").read_text())
    parameters["gate"]["minimum_map"] = 0.999
    (folder / "params.yaml").write_text(yaml.safe_dump(parameters))
    output = run([sys.executable, "-m", "dvc", "repro"], folder, environment)
    assert "Stage 'distill' didn't change, skipping" in output
    assert "Running stage 'gate'" in output and "misses the limit 0.999" in output
    registration = json.loads((folder / "outputs" / "register" / "registration.json").read_text())
    assert registration["registered"] is False and "misses the limit" in registration["because"]
    difference = json.loads(run([sys.executable, "-m", "dvc", "metrics", "diff", "--json"], folder, environment))
    passed = difference["outputs/gate/verdict.json"]["passed"]
    assert (passed["old"], passed["new"]) == (True, False)
    run([sys.executable, "-m", "dvc", "plots", "diff", "--out", "plots"], folder, environment)
    assert (folder / "plots" / "index.html").stat().st_size > 10000
