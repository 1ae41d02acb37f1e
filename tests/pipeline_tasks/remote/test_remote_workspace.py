"""Workspaces in an object store: a cache folder for each "machine", killed and frozen ones among them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from pipeline_tasks import digests
from pipeline_tasks.errors import DataError, TemporaryError, UsageError
from pipeline_tasks.remote_workspace import RemoteWorkspace
from pipeline_tasks.store import ObjectStore
from pipeline_tasks.tracking.champions import move_champion
from pipeline_tasks.tracking.client import connect
from pipeline_tasks.workspace import Workspace

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient


def fill(workspace: Workspace, content: str, key: str = "k") -> None:
    output = workspace.partial_directory("teach", key) / "output"
    (output / "checkpoint").mkdir(parents=True)
    (output / "checkpoint" / "weights.bin").write_text(content)
    (output / "metrics.json").write_text("{}")


def publish(workspace: Workspace, content: str) -> str:
    fill(workspace, content)
    with workspace.lease("teach", "k", wait_seconds=0.5):
        return workspace.publish("teach", "k", {"key": "k", "summary": {}}).digest()


def start_machine(script: str, *arguments: object) -> subprocess.Popen[str]:
    """Another process with `workspace = RemoteWorkspace(URI, cache, ...)`; returns when it has said "ready"."""
    head = """
        import sys
        from pathlib import Path
        from pipeline_tasks.errors import StepError
        from pipeline_tasks.remote_workspace import RemoteWorkspace
        workspace = RemoteWorkspace(sys.argv[1], Path(sys.argv[2]), lease_seconds=float(sys.argv[3]))
        output = workspace.partial_directory("teach", "k") / "output"
    """
    program = textwrap.dedent(head) + textwrap.dedent(script)
    command = [sys.executable, "-c", program, *map(str, arguments)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


HOLD = """
with workspace.lease("teach", "k"):
    print("ready", flush=True)
    sys.stdin.readline()
    output.mkdir(parents=True)
    (output / "weights.bin").write_text("of the frozen one")
    try:
        workspace.publish("teach", "k", {"key": "k", "summary": {}})
    except StepError as error:
        print(error.exit_code, error)
"""


@pytest.mark.slow
def test_published_work_is_reused_on_another_machine(uri: str, tmp_path: Path) -> None:
    digest = publish(RemoteWorkspace(uri, tmp_path / "a"), "abc")
    elsewhere = RemoteWorkspace(uri, tmp_path / "b").published("teach", "k")
    assert elsewhere is not None and elsewhere.digest() == digest
    assert elsewhere.directory == tmp_path / "b" / "steps" / "teach" / "k"
    assert (elsewhere.directory / "checkpoint" / "weights.bin").read_text() == "abc"
    assert digests.of_folder(elsewhere.directory).keys() == {*elsewhere.manifest["files"], "manifest.json"}
    assert RemoteWorkspace(uri, tmp_path / "c").published("teach", "other") is None


@pytest.mark.slow
def test_damaged_or_missing_objects_are_never_taken_for_an_output(uri: str, tmp_path: Path) -> None:
    digest = publish(RemoteWorkspace(uri, tmp_path / "a"), "abc")
    store, name = ObjectStore(uri), f"steps/teach/k/{digest}/checkpoint/weights.bin"
    store.write(name, b"abd")
    with pytest.raises(DataError, match=r"weights\.bin is damaged"):
        RemoteWorkspace(uri, tmp_path / "b").published("teach", "k")
    store.delete([name])
    with pytest.raises(DataError, match="lacks a file of its manifest"):
        RemoteWorkspace(uri, tmp_path / "b").published("teach", "k")
    assert not (tmp_path / "b" / "steps" / "teach" / "k").exists()


@pytest.mark.slow
def test_damaged_copy_in_the_cache_is_fetched_anew_and_never_shared(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = publish(RemoteWorkspace(uri, tmp_path / "a"), "abc")
    workspace = RemoteWorkspace(uri, tmp_path / "b")
    hashed: list[Path] = []
    of_file = digests.of_file

    def counted(path: Path) -> str:
        hashed.append(path)
        return of_file(path)

    monkeypatch.setattr(digests, "of_file", counted)
    assert workspace.verified("teach", "k", "checkpoint") is not None
    assert len(hashed) == 2  # on their way here, and not again
    file = tmp_path / "b" / "steps" / "teach" / "k" / "checkpoint" / "weights.bin"
    file.write_text("abd")
    found = workspace.verified("teach", "k", "checkpoint")
    assert found is not None and found.digest() == digest and file.read_text() == "abc"
    file.write_text("abd")
    ObjectStore(uri).delete(["steps/teach/k/manifest.json"])
    with pytest.raises(DataError, match=r"weights\.bin was changed after it was published .* run the step teach again"):
        workspace.published("teach", "k")
    assert ObjectStore(uri).read("steps/teach/k/manifest.json") is None


@pytest.mark.slow
@pytest.mark.parametrize("at_the_same_moment", [False, True])
def test_second_writer_is_compared_and_never_overwrites(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_the_same_moment: bool
) -> None:
    first = publish(RemoteWorkspace(uri, tmp_path / "a"), "abc")
    other, equal = (RemoteWorkspace(uri, tmp_path / name) for name in "bc")
    for late in (other, equal) if at_the_same_moment else ():
        monkeypatch.setattr(late, "published", lambda *_: None)  # it looked before the first one had finished
    with pytest.raises(DataError, match=r"steps/teach/k.* was published meanwhile with other content"):
        publish(other, "not abc")
    assert publish(equal, "abc") == first
    found = RemoteWorkspace(uri, tmp_path / "d").published("teach", "k")
    assert found is not None and found.digest() == first


@pytest.mark.slow
def test_kill_while_uploading_publishes_nothing_and_the_next_attempt_goes_on(uri: str, tmp_path: Path) -> None:
    script = """
        import time
        from pipeline_tasks.store import ObjectStore
        upload = ObjectStore.upload
        ObjectStore.upload = lambda *arguments: (upload(*arguments), time.sleep(20))  # it is killed long before
        output.mkdir(parents=True)
        for index in range(30):
            (output / f"{index}.bin").write_bytes(bytes([index]) * 20_000)
        with workspace.lease("teach", "k"):
            print("ready", flush=True)
            workspace.publish("teach", "k", {"key": "k", "summary": {}})
    """
    store, prefix = ObjectStore(uri), "steps/teach/k/"
    process = start_machine(script, uri, tmp_path / "a", 60)
    while not store.sizes(prefix):
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert 0 < len(store.sizes(prefix)) < 30
    assert RemoteWorkspace(uri, tmp_path / "b").published("teach", "k") is None
    again = RemoteWorkspace(uri, tmp_path / "a")
    with again.lease("teach", "k", wait_seconds=0):  # its own dead process holds nobody up
        assert len(again.publish("teach", "k", {"key": "k", "summary": {}}).manifest["files"]) == 30
    assert RemoteWorkspace(uri, tmp_path / "b").published("teach", "k") is not None


@pytest.mark.slow
def test_lease_keeps_another_machine_out_for_as_long_as_it_is_renewed(uri: str, tmp_path: Path) -> None:
    process = start_machine(HOLD, uri, tmp_path / "a", 3)
    other = RemoteWorkspace(uri, tmp_path / "b", lease_seconds=3)
    try:
        refused = pytest.raises(TemporaryError, match=f"teach/k is being worked on by process {process.pid} on ")
        with refused, other.lease("teach", "k", wait_seconds=5):
            pass
    finally:
        process.kill()
        process.wait()
    begun = time.monotonic()
    with other.lease("teach", "k", wait_seconds=20):
        assert time.monotonic() - begun < 8  # 3 s, in the store's clock of full seconds, and a pause between looks


@pytest.mark.slow
def test_frozen_owner_that_lost_its_lease_may_not_publish(uri: str, tmp_path: Path) -> None:
    process = start_machine(HOLD, uri, tmp_path / "a", 1.5)
    assert process.stdin is not None and process.stdout is not None
    os.kill(process.pid, signal.SIGSTOP)
    try:
        other = RemoteWorkspace(uri, tmp_path / "b")
        with other.lease("teach", "k", wait_seconds=10):
            os.kill(process.pid, signal.SIGCONT)
            process.stdin.write("\n")
            process.stdin.flush()
            code, _, sentence = process.stdout.readline().partition(" ")
            assert int(code) == TemporaryError.exit_code
            assert f"lost to process {os.getpid()} on " in sentence
            fill(other, "of the second")
            other.publish("teach", "k", {"key": "k", "summary": {}})
        assert process.wait(10) == 0
    finally:
        process.kill()
        process.wait()
    published = RemoteWorkspace(uri, tmp_path / "c").published("teach", "k")
    assert published is not None and (published.directory / "checkpoint" / "weights.bin").read_text() == "of the second"


@pytest.mark.slow
def test_lease_given_back_is_free_at_once(uri: str, tmp_path: Path) -> None:
    for name in "aba":
        with RemoteWorkspace(uri, tmp_path / name).lease("teach", "k", wait_seconds=0):
            pass


@pytest.mark.slow
def test_keys_recorded_by_many_machines_are_all_there(uri: str, tmp_path: Path) -> None:
    RemoteWorkspace(uri, tmp_path / "a").write_run("r1", {"steps": {}})
    script = """
        print("ready", flush=True)
        for index in range(8):
            workspace.record_step("r1", f"{Path(sys.argv[2]).name}-{index}", "k")
    """
    machines = [start_machine(script, uri, tmp_path / name, 60) for name in "abc"]
    assert [machine.wait(60) for machine in machines] == [0, 0, 0]
    assert len(RemoteWorkspace(uri, tmp_path / "d").read_run("r1")["steps"]) == 24


@pytest.mark.slow
def test_run_is_known_everywhere_and_never_overwritten_unseen(uri: str, tmp_path: Path) -> None:
    here, there = (RemoteWorkspace(uri, tmp_path / name) for name in "ab")
    with pytest.raises(UsageError, match=f"run 'r1' does not exist in workspace {uri}"):
        there.read_run("r1")
    here.write_run("r1", {"steps": {}, "by": "here"})
    with pytest.raises(TemporaryError, match="was changed by another process"):
        there.write_run("r1", {"steps": {}, "by": "there"})
    assert there.read_run("r1")["by"] == "here" and there.run_ids() == ["r1"]
    assert json.loads((there.run_directory("r1") / "run.json").read_text())["by"] == "here"


MOVE = """
from pipeline_tasks.tracking.client import connect
from pipeline_tasks.tracking import champions
version = sys.argv[4]
write = champions._write
def slowly(*arguments):
    print("writing", flush=True)
    sys.stdin.readline()
    write(*arguments)
champions._write = slowly
client = connect(workspace)
print("ready", flush=True)
sys.stdin.readline()
try:
    move = champions.move_champion(client, workspace, "cells", version, "promote", "ada", "better")
    print(f"moved from {move.before}", flush=True)
except StepError as error:
    print(error.exit_code, error, flush=True)
"""


@pytest.mark.slow
def test_of_two_machines_that_move_a_champion_at_once_the_second_knows_of_the_first(uri: str, tmp_path: Path) -> None:
    client = two_versions(tmp_path)
    first, second = (start_machine(MOVE, uri, tmp_path / name, 60, name) for name in "12")
    tell(first)
    assert heard(first) == "writing\n"
    tell(second)
    time.sleep(1.5)
    tell(first)
    assert heard(first) == "moved from None\n"
    assert heard(second) == "writing\n", "only when the first had ended"
    tell(second)
    assert heard(second) == "moved from 1\n"
    assert str(client.get_registered_model("cells").aliases["champion"]) == "2"
    assert [machine.wait(240) for machine in (first, second)] == [0, 0]


@pytest.mark.slow
def test_frozen_machine_that_lost_the_right_to_move_a_champion_does_not_move_it(uri: str, tmp_path: Path) -> None:
    client = two_versions(tmp_path)
    frozen = start_machine(MOVE, uri, tmp_path / "a", 1.5, "1")
    tell(frozen)
    assert heard(frozen) == "writing\n"
    os.kill(frozen.pid, signal.SIGSTOP)
    try:
        other = RemoteWorkspace(uri, tmp_path / "b")
        assert move_champion(client, other, "cells", "2", "promote", "bob", "better") is not None
        os.kill(frozen.pid, signal.SIGCONT)
        tell(frozen)
        assert heard(frozen).startswith(f"{TemporaryError.exit_code} the lease on champions/cells.move was lost to ")
        assert frozen.wait(240) == 0
    finally:
        frozen.kill()
        frozen.wait()
    assert str(client.get_registered_model("cells").aliases["champion"]) == "2"


def two_versions(folder: Path) -> MlflowClient:
    """A registry with versions 1 and 2 of `cells`, and no champion."""
    client = connect(Workspace(folder / "registry"))
    client.create_registered_model("cells")
    for _ in range(2):
        client.create_model_version("cells", folder.as_uri())
    return client


def tell(machine: subprocess.Popen[str]) -> None:
    assert machine.stdin is not None
    machine.stdin.write("\n")
    machine.stdin.flush()


def heard(machine: subprocess.Popen[str]) -> str:
    assert machine.stdout is not None
    return machine.stdout.readline()
