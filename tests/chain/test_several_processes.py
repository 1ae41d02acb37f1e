"""`--processes 2`: one step, done together, published once; whatever ends one process ends all, and none is left."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typed_chain import Terminal

pytestmark = pytest.mark.slow

PRETRAIN = ("pretrain", "--role", "student", "--run", "one")
TOGETHER = (*PRETRAIN, "--processes", "2")
TASK = """
import os, subprocess, sys, time
environment = {**os.environ, "NASLINE_DIE_WITH_PARENT": str(os.getpid())}
words = [sys.executable, "-m", "pipeline_tasks", *sys.argv[1:]]
child = subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
for line in child.stdout:
    pass
time.sleep(600)
"""


@pytest.fixture(scope="module")
def validated(tmp_path_factory: pytest.TempPathFactory, small_digits: Path) -> Terminal:
    """A workspace whose run `one` has its data and nothing else."""
    terminal = Terminal(tmp_path_factory.mktemp("validated"), small_digits)
    terminal.start("one")
    terminal.nasline("validate_data", "--run", "one")
    return terminal


@pytest.fixture(scope="module")
def unbroken(validated: Terminal, tmp_path_factory: pytest.TempPathFactory) -> tuple[Terminal, str]:
    """The same after two processes have pretrained the student, and what they said."""
    terminal = copy_of(validated, tmp_path_factory.mktemp("unbroken"))
    return terminal, terminal.nasline(*TOGETHER)


def copy_of(terminal: Terminal, folder: Path) -> Terminal:
    other = Terminal(folder, terminal.data)
    shutil.copytree(terminal.workspace, other.workspace)
    return other


def descendants(pid: int) -> Iterator[int]:
    """Processes below one, by /proc."""
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, task.read_text().split()):
            yield child
            yield from descendants(child)


def wait_for_checkpoint(terminal: Terminal, process: subprocess.Popen[Any], command: int | None = None) -> list[int]:
    """Until the training has saved a step in the middle of an epoch; gives the training processes' ids.

    `command` is the process id of `nasline` where `process` is another one above it.
    """
    deadline = time.monotonic() + 240
    while not list(terminal.workspace.glob("steps/pretrain/*.partial/state/state.json")):
        assert time.monotonic() < deadline, "no checkpoint was written"
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)
    found = sorted(descendants(command or process.pid))
    assert len(found) == 2, "two training processes below the command, and no other"
    return found


def wait_until_gone(pids: list[int]) -> None:
    """A zombie is dead: the state comes from /proc."""
    deadline = time.monotonic() + 20
    while any(is_running(pid) for pid in pids):
        assert time.monotonic() < deadline, f"of {pids} some are still running"
        time.sleep(0.05)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def errors(output: str) -> list[str]:
    return [line.split(" ERROR ", 1)[1] for line in output.splitlines() if " ERROR " in line]


def test_the_first_process_alone_tells_and_publishes(unbroken: tuple[Terminal, str]) -> None:
    terminal, output = unbroken
    assert "2 processes train together" in output
    assert output.count("pretrain/student published: key ") == 1 and output.count("NASLINE_RESULT") == 1
    assert output.count("epoch 2/2") == 1 and "Warning" not in output
    published = terminal.published("one", "pretrain/student")
    assert len((published / "metrics.jsonl").read_text().splitlines()) == 2
    assert terminal.manifest("one", "pretrain/student")["summary"]["steps"] == 10, "5 batches of 8 images, twice"
    assert not list(terminal.workspace.glob("steps/*/*.partial"))


def test_finished_work_is_reused_without_starting_processes(unbroken: tuple[Terminal, str]) -> None:
    output = unbroken[0].nasline(*TOGETHER)
    assert "pretrain/student reused: key " in output and "train together" not in output


def test_stopped_training_saves_and_ends_with_the_bits_of_an_unbroken_one(
    validated: Terminal, unbroken: tuple[Terminal, str], tmp_path: Path
) -> None:
    terminal = copy_of(validated, tmp_path)
    process = terminal.popen(TOGETHER)
    pids = wait_for_checkpoint(terminal, process)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 75, output
    assert len(errors(output)) == 1 and errors(output)[0].startswith("told to stop: stopped and saved after step")
    wait_until_gone(pids)
    assert "training goes on from step" in terminal.nasline(*TOGETHER)
    folders = [each.published("one", "pretrain/student") for each in (terminal, unbroken[0])]
    for name in ("checkpoint/model.safetensors", "metrics.jsonl"):
        assert folders[0].joinpath(name).read_bytes() == folders[1].joinpath(name).read_bytes(), name


def test_one_killed_process_ends_all_and_one_process_may_go_on(validated: Terminal, tmp_path: Path) -> None:
    terminal = copy_of(validated, tmp_path)
    process = terminal.popen(TOGETHER)
    pids = wait_for_checkpoint(terminal, process)
    subprocess.run(["kill", "-KILL", str(pids[1])], check=True)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 75, output
    (sentence,) = errors(output)
    assert sentence.startswith("training process ") and "was ended by SIGKILL; run the same command again" in sentence
    assert "Traceback" not in output
    wait_until_gone(pids)
    assert "training goes on from step" in terminal.nasline(*PRETRAIN, "--processes", "1")


def test_killed_command_leaves_no_process(validated: Terminal, tmp_path: Path) -> None:
    terminal = copy_of(validated, tmp_path)
    process = terminal.popen(TOGETHER)
    pids = wait_for_checkpoint(terminal, process)
    process.kill()
    process.communicate(timeout=60)
    wait_until_gone(pids)


def test_killed_airflow_task_ends_them_after_a_save(validated: Terminal, tmp_path: Path) -> None:
    """The task's process is killed and its pipe with it: the command is told by the kernel, and tells the others."""
    terminal = copy_of(validated, tmp_path)
    task = subprocess.Popen([sys.executable, "-c", TASK, *TOGETHER], cwd=terminal.folder, env=terminal.environment)
    deadline = time.monotonic() + 60
    while not (command := list(descendants(task.pid))):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    pids = wait_for_checkpoint(terminal, task, command[0])
    task.kill()
    task.wait()
    wait_until_gone([command[0], *pids])
    assert "training goes on from step" in terminal.nasline(*TOGETHER)


def test_refused_data_end_all_with_their_code_and_one_sentence(validated: Terminal, tmp_path: Path) -> None:
    terminal = copy_of(validated, tmp_path)
    data = tmp_path / "data"
    shutil.copytree(validated.data, data)
    run = terminal.workspace / "runs" / "one" / "run.json"
    run.write_text(run.read_text().replace(str(validated.data), str(data)))
    annotations = json.loads((data / "pretrain" / "annotations" / "instances_train.json").read_text())
    picture = data / "pretrain" / "images" / annotations["images"][7]["file_name"]
    picture.write_bytes(b"no picture any more")
    output = terminal.nasline(*TOGETHER, code=65)
    (sentence,) = errors(output)
    assert picture.name in sentence


def test_step_joins_the_processes_of_a_torchrun_of_the_users(validated: Terminal, tmp_path: Path) -> None:
    terminal = copy_of(validated, tmp_path)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*torchrun, "-m", "--", "pipeline_tasks", *PRETRAIN], cwd=terminal.folder, env=terminal.environment,
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("pretrain/student published: key ") == 1 and "train together" not in done.stdout
    assert terminal.published("one", "pretrain/student").is_dir()


def test_student_is_distilled_and_quantized_together(finished: Terminal, tmp_path: Path) -> None:
    terminal = copy_of(finished, tmp_path)
    for step in ("distill", "quantize"):
        shutil.rmtree(terminal.published("one", step))
        output = terminal.nasline(step, "--run", "one", "--processes", "2")
        assert "2 processes train together" in output and output.count(f"{step} published: key ") == 1
    assert {"ptq_map50_95", "qat_map50_95"} <= set(terminal.manifest("one", "quantize")["summary"])
