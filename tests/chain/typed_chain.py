"""The chain by typed commands, on a small version of the demo's digits."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
SMALL = """
start: {student_variant: pico, teacher_variant: pico, image_size: 64, model_name: chain_digits, threads: 1}
pretrain: &short
  {epochs: 2, batch_size: 8, learning_rate: 0.004, warmup_steps: 5, ema_decay: 0.9, mosaic: 0.0, flip: 0.0,
  checkpoint_every_steps: 3}
teach: {<<: *short, epochs: 6, minimum_precision: 0.0, minimum_threshold: 0.0}
pseudo_label: {shards: 2}
distill: {<<: *short, epochs: 3}
quantize:
  calibration_images: 16
  sensitivity_images: 8
  qat: always
  training: {epochs: 1, batch_size: 8, warmup_steps: 1}
gate: {minimum_map: 0.0, maximum_map_drop: 100.0, latency_repeats: 20, latency_threads: 1, maximum_spread: 1000.0,
  maximum_box_error_pixels: null}
"""
"""Seconds per step; neither pseudo-labels nor the gate ask for anything, since nothing can be learned in that time."""

CHAIN = (
    ("validate_data",),
    ("pretrain", "--role", "student"),
    ("pretrain", "--role", "teacher"),
    ("teach",),
    ("pseudo_label", "--shard", "all"),
    ("pseudo_label", "--merge"),
    ("distill",),
    ("quantize",),
    ("export",),
    ("gate",),
    ("register",),
)


@dataclass
class Terminal:
    """A shell in which `nasline` commands are typed, with a workspace of its own."""

    folder: Path
    data: Path
    environment: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("MLFLOW", "NASLINE_"))}
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        self.environment = {**kept, "OMP_NUM_THREADS": "1", "PATH": path, "NASLINE_WORKSPACE": str(self.workspace)}
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "params.yaml").write_text(SMALL, encoding="utf-8")

    @property
    def workspace(self) -> Path:
        return self.folder / "workspace"

    def popen(self, command: Sequence[str], **environment: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "pipeline_tasks", *command], cwd=self.folder, text=True,
            env={**self.environment, **environment}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def nasline(self, *command: str, code: int = 0, **environment: str) -> str:
        process = self.popen(command, **environment)
        output, _ = process.communicate()
        assert process.returncode == code, output
        assert "Traceback" not in output
        return output

    def start(self, run: str, *options: str, code: int = 0, **environment: str) -> str:
        sets = {"dataset": "target", "pretrain_dataset": "pretrain", "unlabeled_dataset": "unlabeled"}
        named = [word for name, folder in sets.items() for word in (f"--start.{name}", str(self.data / folder))]
        arguments = ["start", "--run", run, "--params", "params.yaml", *named, *options]
        return self.nasline(*arguments, code=code, **environment)

    def chain(self, run: str, until: str = "register", **environment: str) -> dict[str, str]:
        """Every step up to one, each with its output."""
        outputs = {}
        for command in CHAIN:
            name = " ".join(command)
            outputs[name] = self.nasline(*command, "--run", run, **environment)
            if command[0] == until and name != "pseudo_label --shard all":
                break
        return outputs

    def published(self, run: str, step: str) -> Path:
        steps: dict[str, str] = json.loads((self.workspace / "runs" / run / "run.json").read_text())["steps"]
        return self.workspace / "steps" / step.split("/")[0] / steps[step]

    def manifest(self, run: str, step: str) -> dict[str, Any]:
        content: dict[str, Any] = json.loads((self.published(run, step) / "manifest.json").read_text())
        return content


def copy_of(terminal: Terminal, folder: Path, *without: str) -> Terminal:
    """Another terminal, in whose copy of the workspace the named steps of the run `one` are not published."""
    other = Terminal(folder, terminal.data)
    shutil.copytree(terminal.workspace, other.workspace, dirs_exist_ok=True)
    for step in without:
        shutil.rmtree(other.published("one", step))
    return other


def require_equal_training(terminal: Terminal, undisturbed: Terminal, step: str) -> None:
    """Weights, metrics and summary of a training of the run `one` are the undisturbed ones to the bit."""
    ours, theirs = terminal.published("one", step), undisturbed.published("one", step)
    for name in ("checkpoint/model.safetensors", "metrics.jsonl", "history.csv"):
        assert (ours / name).read_bytes() == (theirs / name).read_bytes(), name
    assert terminal.manifest("one", step)["summary"] == undisturbed.manifest("one", step)["summary"]


def errors(output: str) -> list[str]:
    """The sentences that a command ended with."""
    return [line.split(" ERROR ", 1)[1] for line in output.splitlines() if " ERROR " in line]


def wait_for_checkpoint(workspace: Path, step: str, process: subprocess.Popen[str]) -> None:
    """Until a training step has been saved, which these settings do in the middle of an epoch."""
    deadline = time.monotonic() + 600
    while not list(workspace.glob(f"steps/{step}/*.partial/state/state.json")):
        assert time.monotonic() < deadline, "no checkpoint was written"
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)


def make_small_digits(folder: Path) -> None:
    """A tenth of the demo's pictures."""
    script = (
        "import sys; sys.path.insert(0, 'demo'); from pathlib import Path; import digits\n"
        "sizes = digits.Sizes(target_train=48, target_val=16, target_test=24, pretrain_train=40, pretrain_val=8,"
        " unlabeled=24)\n"
        "digits.generate(Path(sys.argv[1]), 0, sizes)"
    )
    subprocess.run([sys.executable, "-c", script, str(folder)], check=True, cwd=REPOSITORY)


@pytest.fixture(scope="session")
def small_digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pictures, once for all tests."""
    folder = tmp_path_factory.mktemp("data") / "digits"
    make_small_digits(folder)
    return folder


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, small_digits: Path) -> Terminal:
    """A terminal in whose workspace the run `one` went through the whole chain."""
    terminal = Terminal(tmp_path_factory.mktemp("finished"), small_digits)
    terminal.start("one")
    outputs = terminal.chain("one")
    assert "registered models:/chain_digits/1, now @champion" in outputs["register"]
    return terminal
