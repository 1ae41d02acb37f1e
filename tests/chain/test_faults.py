"""Faults of the machine and of its services, between real processes: nothing half-published, one sentence as the error,
and in the end the bits of the undisturbed run.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sqlite3
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
from tracking_server import Server
from typed_chain import Terminal, copy_of, errors, require_equal_training, wait_for_checkpoint

pytestmark = pytest.mark.slow

DISTILL = ("distill", "--run", "one")
TEACH = ("teach", "--run", "one")
STUDENT = ("pretrain", "--role", "student", "--run", "one")


def wait_until(condition: Callable[[], object], process: subprocess.Popen[str], seconds: float = 600) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.002)


# a full disk --------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, 256 MiB of memory: what does not fit is refused by the kernel. Needs root."""
    place = tmp_path / "disk"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256m", "tmpfs", str(place)], check=True)
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


def fill(disk: Path, left: int) -> Path:
    """Leave so many bytes."""
    free = os.statvfs(disk)
    filler = disk / "filler"
    with filler.open("wb") as file:
        file.write(b"x" * (free.f_bavail * free.f_frsize - left))
    return filler


@pytest.mark.parametrize("left", [64_000, 700_000])
def test_a_full_disk_is_one_sentence_and_with_room_the_training_goes_on(
    finished: Terminal, small_disk: Path, left: int
) -> None:
    """Full before the first save, or at a later one."""
    terminal = copy_of(finished, small_disk, "distill")
    filler = fill(small_disk, left)
    output = terminal.nasline(*DISTILL, code=75)
    (sentence,) = errors(output)
    assert "No space left on device" in sentence and "make room" in sentence
    assert str(small_disk) in sentence, "the sentence says where"
    assert not terminal.published("one", "distill").exists()
    filler.unlink()
    terminal.nasline(*DISTILL)
    require_equal_training(terminal, finished, "distill")


# the clock ----------------------------------------------------------------------------------------------------

FAKETIME = next(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"), None)


def test_a_clock_that_jumps_changes_nothing(finished: Terminal, tmp_path: Path) -> None:
    """A month back in mid-training, then two years ahead; killed there, and continued with the right time."""
    assert FAKETIME is not None, "libfaketime is missing; apt-get install faketime"
    clock = tmp_path / "clock"
    faked = {
        "LD_PRELOAD": str(FAKETIME),
        "FAKETIME_TIMESTAMP_FILE": str(clock),
        "FAKETIME_NO_CACHE": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
    }
    terminal = copy_of(finished, tmp_path, "teach")
    clock.write_text("+0d\n")
    process = terminal.popen(TEACH, **faked)
    wait_for_checkpoint(terminal.workspace, "teach", process)
    clock.write_text("-30d\n")
    metrics = partial_metrics(terminal, "teach")
    wait_until(lambda: lines(metrics) >= 2, process)
    clock.write_text("+730d\n")
    wait_until(lambda: lines(metrics) >= 3, process)
    process.kill()
    process.communicate()
    output = terminal.nasline(*TEACH)
    assert "training goes on from step" in output
    warnings = [line for line in output.splitlines() if "WARNING" in line]
    assert [line for line in warnings if "get no pseudo-labels" not in line] == []  # the tiny teacher misses classes
    require_equal_training(terminal, finished, "teach")


def partial_metrics(terminal: Terminal, step: str) -> Path:
    folder = terminal.published("one", step)
    return folder.with_name(folder.name + ".partial") / "state" / "metrics.jsonl"


def lines(path: Path) -> int:
    return len(path.read_text().splitlines()) if path.exists() else 0


# the tracking server ------------------------------------------------------------------------------------------


def test_a_tracking_server_gone_for_a_minute_of_the_training_gets_all_of_it_in_order_and_once(
    finished: Terminal, tmp_path: Path
) -> None:
    """The training stands still for most of the minute, so that it lasts that long; two of its epochs end meanwhile."""
    from mlflow.tracking import MlflowClient

    server = Server(tmp_path)
    server.start()
    terminal = copy_of(finished, tmp_path / "terminal", "teach")
    shutil.rmtree(terminal.workspace / "runs" / "one" / "tracking")  # what another store was told
    environment = {"MLFLOW_TRACKING_URI": server.address, "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1"}
    try:
        process = terminal.popen(TEACH, **environment)
        metrics = partial_metrics(terminal, "teach")
        wait_until(lambda: lines(metrics) >= 1, process)
        process.send_signal(signal.SIGSTOP)
        server.kill()
        gone = time.monotonic()
        for epochs in (2, 3):
            process.send_signal(signal.SIGCONT)
            wait_until(lambda epochs=epochs: lines(metrics) >= epochs, process)  # type: ignore[misc]
            process.send_signal(signal.SIGSTOP)
            time.sleep(max(0.0, 30 * (epochs - 1) - (time.monotonic() - gone)))
        assert time.monotonic() - gone >= 60 and lines(metrics) < 6
        server.start()
        process.send_signal(signal.SIGCONT)
        output, _ = process.communicate()
        assert process.returncode == 0, output
        assert output.count("tracking server at") == 1 and not errors(output)
        require_equal_training(terminal, finished, "teach")
        client = MlflowClient(server.address)
        experiment = client.get_experiment_by_name("nasline")
        assert experiment is not None
        (run,) = client.search_runs([experiment.experiment_id], "tags.`nasline.step` = 'teach'")
        assert run.info.status == "FINISHED"
        points = client.get_metric_history(run.info.run_id, "loss")
        assert [point.step for point in points] == [1, 2, 3, 4, 5, 6]
        assert [point.timestamp for point in points] == sorted(point.timestamp for point in points)
        rows = map(json.loads, (terminal.published("one", "teach") / "metrics.jsonl").read_text().splitlines())
        assert [point.value for point in points] == [row["loss"] for row in rows]
    finally:
        server.kill()


# the registry -------------------------------------------------------------------------------------------------


def count(database: Path, question: str) -> int:
    with closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True, timeout=10)) as connection:
        return int(connection.execute(question).fetchone()[0])


def test_registering_that_is_killed_at_any_moment_makes_one_version_with_all_its_tags(
    finished: Terminal, tmp_path: Path
) -> None:
    terminal = copy_of(finished, tmp_path)
    terminal.start("two", "--start.model_name", "killed_digits")
    terminal.nasline("gate", "--run", "two")
    register, database = ("register", "--run", "two"), terminal.workspace / "mlflow.db"
    moments = (
        "select count(*) from registered_models where name = 'killed_digits'",
        "select count(*) from model_versions where name = 'killed_digits'",
    )
    for moment in moments:
        process = terminal.popen(register)
        wait_until(lambda moment=moment: count(database, moment), process)  # type: ignore[misc]
        process.kill()
        process.communicate()
        untagged = (
            "select count(*) from model_versions v where name = 'killed_digits' and not exists (select * from"
            " model_version_tags t where t.name = v.name and t.version = v.version and t.key = 'nasline.engine_digest')"
        )
        assert count(database, untagged) == 0, "a version that nobody can tell"
    assert "registered models:/killed_digits/1, now @champion" in terminal.nasline(*register)
    assert count(database, moments[1]) == 1
    aliases = "select count(*) from registered_model_aliases where name = 'killed_digits' and version = 1"
    assert count(database, aliases) == 2


def test_a_rejected_gate_is_rejected_again_with_the_same_words(finished: Terminal, tmp_path: Path) -> None:
    terminal = copy_of(finished, tmp_path)
    terminal.start("rejected", "--gate.minimum_map", "0.9876")
    versions = "select count(*) from model_versions where name = 'chain_digits'"
    before, gate = count(terminal.workspace / "mlflow.db", versions), ("gate", "--run", "rejected")
    process = terminal.popen(gate)
    wait_until(lambda: list(terminal.workspace.glob("steps/gate/*.partial/output/*")), process)
    process.kill()
    process.communicate()
    outputs = [terminal.nasline(*gate, code=99) for _ in range(2)]
    assert "gate published" in outputs[0] and "gate reused" in outputs[1]
    sentences = [json.loads(output.rsplit("NASLINE_RESULT ", 1)[1])["summary"]["verdict"] for output in outputs]
    assert sentences[0] == sentences[1] and sentences[0].startswith("rejected: ")
    for _ in range(2):
        terminal.nasline("register", "--run", "rejected", code=99)
    assert count(terminal.workspace / "mlflow.db", versions) == before


# two at once --------------------------------------------------------------------------------------------------


def test_two_runs_at_once_on_one_machine_do_not_disturb_each_other(finished: Terminal, tmp_path: Path) -> None:
    """The same run is started twice at the same moment, then it and another one train side by side."""
    terminal = copy_of(finished, tmp_path, "distill")
    starts = [
        terminal.popen(["start", "--run", "other", "--params", "params.yaml", "--distill.learning_rate", "0.003",
                        "--start.dataset", str(terminal.data / "target"), "--start.pretrain_dataset",
                        str(terminal.data / "pretrain"), "--start.unlabeled_dataset", str(terminal.data / "unlabeled")])
        for _ in range(2)
    ]  # fmt: skip
    outputs = [process.communicate()[0] for process in starts]
    assert [process.returncode for process in starts] == [0, 0], outputs
    both = [terminal.popen(("distill", "--run", run)) for run in ("one", "other")]
    outputs = [process.communicate()[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert all("distill published" in output and "WARNING" not in output for output in outputs)
    require_equal_training(terminal, finished, "distill")
    assert terminal.published("other", "distill") != terminal.published("one", "distill")
