"""What is said twice is the same: steps, dvc.yaml, README (the DAGs are compared in tests/dags)."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import yaml

from pipeline_tasks.params import Parameters
from pipeline_tasks.steps import STEP_NAMES, STEPS


def test_dvc_stages_are_the_steps_in_order(repository: Path) -> None:
    stages = yaml.safe_load((repository / "dvc.yaml").read_text())["stages"]
    assert tuple(stages) == STEP_NAMES


def test_dvc_stages_run_the_steps_commands_and_follow_their_sections(repository: Path) -> None:
    stages = yaml.safe_load((repository / "dvc.yaml").read_text())["stages"]
    for step in STEPS:
        stage = stages[step.name]
        commands = stage["cmd"] if isinstance(stage["cmd"], list) else [stage["cmd"]]
        assert all(command.startswith(f"nasline {step.name} ") for command in commands), step.name
        if step.name == "start":
            continue
        assert step.name in stage["params"], step.name
        shared = {f"start.{name}" for name in step.shared_parameters}
        assert shared <= set(stage["params"]), step.name
        if not step.parts:
            assert {p for p in stage["params"] if p.startswith("start.")} == shared, step.name


def test_dvc_stages_depend_on_what_the_steps_read(repository: Path) -> None:
    stages = yaml.safe_load((repository / "dvc.yaml").read_text())["stages"]
    for step in STEPS[2:-1]:
        read = {entry.step for entry in step.inputs} | ({"start"} if step.name == "gate" else set())  # the champion
        declared = {path.split("/")[1] for path in stages[step.name]["deps"]}
        assert declared == read, step.name


def test_readme_names_every_step_as_a_command(repository: Path) -> None:
    named = re.findall(r"nasline ([a-z_]+)", (repository / "README.md").read_text())
    assert set(STEP_NAMES) <= set(named)


def test_help_lists_every_step() -> None:
    result = subprocess.run([sys.executable, "-m", "pipeline_tasks", "--help"], capture_output=True, text=True)
    assert result.returncode == 0
    assert all(re.search(rf"^\s+{name}\s", result.stdout, re.MULTILINE) for name in STEP_NAMES)


def test_sections_are_named_like_the_steps() -> None:
    assert tuple(Parameters().to_json()) == STEP_NAMES
