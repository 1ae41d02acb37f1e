"""Publishing: all or nothing, also when the process is killed in the middle."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from pipeline_tasks import digests
from pipeline_tasks.errors import DataError, TemporaryError, UsageError
from pipeline_tasks.workspace import Workspace, write_json


def fill(workspace: Workspace, key: str, content: str) -> None:
    output = workspace.partial_directory("teach", key) / "output"
    output.mkdir(parents=True)
    (output / "weights.bin").write_text(content)


def manifest(key: str) -> dict[str, object]:
    return {"key": key, "summary": {}}


def test_published_folder_is_complete_and_its_digest_is_its_content(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    fill(workspace, "k1", "abc")
    published = workspace.publish("teach", "k1", manifest("k1"))
    assert published.directory == tmp_path / "steps" / "teach" / "k1"
    assert published.manifest["files"]["weights.bin"]["sha256"] == digests.of_file(published.directory / "weights.bin")
    assert not workspace.partial_directory("teach", "k1").exists()
    again = workspace.published("teach", "k1")
    assert again is not None and again.digest() == published.digest()


def test_digest_of_a_subfolder_does_not_depend_on_its_siblings(tmp_path: Path) -> None:
    files = {"a/x": {"sha256": "1"}, "b/y": {"sha256": "2"}}
    other = {"a/x": {"sha256": "1"}, "b/y": {"sha256": "3"}}
    assert digests.of_files(files, "a") == digests.of_files(other, "a")
    assert digests.of_files(files) != digests.of_files(other)


def test_publishing_other_content_under_the_same_key_is_refused(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    fill(workspace, "k1", "abc")
    first = workspace.publish("teach", "k1", manifest("k1"))
    fill(workspace, "k1", "something else")
    with pytest.raises(DataError, match="published meanwhile with other content"):
        workspace.publish("teach", "k1", manifest("k1"))
    assert (first.directory / "weights.bin").read_text() == "abc"


def test_equal_content_published_twice_is_fine(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    for _ in range(2):
        fill(workspace, "k1", "abc")
        published = workspace.publish("teach", "k1", manifest("k1"))
    assert (published.directory / "weights.bin").read_text() == "abc"


@pytest.mark.parametrize("delay", [0.0, 0.01, 0.03, 0.06, 0.1])
def test_kill_while_publishing_leaves_nothing_half_written(tmp_path: Path, delay: float) -> None:
    script = textwrap.dedent(
        """
        import sys
        from pathlib import Path
        from pipeline_tasks.workspace import Workspace
        workspace = Workspace(Path(sys.argv[1]))
        output = workspace.partial_directory("teach", "k") / "output"
        output.mkdir(parents=True)
        for index in range(300):
            (output / f"{index}.bin").write_bytes(bytes([index % 256]) * 20000)
        print("ready", flush=True)
        workspace.publish("teach", "k", {"key": "k", "summary": {}})
        """
    )
    process = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    time.sleep(delay)
    process.kill()
    process.wait()
    published = Workspace(tmp_path).published("teach", "k")
    if published is not None:
        assert digests.of_folder(published.directory).keys() == {*published.manifest["files"], "manifest.json"}
    else:
        assert not (tmp_path / "steps" / "teach" / "k").exists()


def test_lease_keeps_a_second_process_out_and_names_the_holder(tmp_path: Path) -> None:
    script = textwrap.dedent(
        """
        import sys, time
        from pathlib import Path
        from pipeline_tasks.workspace import Workspace
        with Workspace(Path(sys.argv[1])).lease("teach", "k"):
            print("held", flush=True)
            time.sleep(60)
        """
    )
    process = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    try:
        lease = Workspace(tmp_path).lease("teach", "k", wait_seconds=0.3)
        with pytest.raises(TemporaryError, match=f"worked on by process {process.pid}"), lease:
            pass
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    with Workspace(tmp_path).lease("teach", "k", wait_seconds=5):
        pass


def test_run_ids_that_are_no_file_names_are_refused(tmp_path: Path) -> None:
    for bad in ("../x", "", "a/b", ".hidden"):
        with pytest.raises(UsageError, match="no run id"):
            Workspace(tmp_path).run_directory(bad)


def test_unknown_and_damaged_runs_are_named(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    with pytest.raises(UsageError, match="nasline start --run r1"):
        workspace.read_run("r1")
    path = workspace.run_directory("r1") / "run.json"
    path.parent.mkdir(parents=True)
    path.write_text('{"steps": \n')
    with pytest.raises(DataError, match=r"run\.json:2: run\.json is damaged"):
        workspace.read_run("r1")


def test_keys_recorded_by_many_processes_are_all_there(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    workspace.write_run("r1", {"steps": {}})
    script = (
        "import sys; from pathlib import Path; from pipeline_tasks.workspace import Workspace\n"
        "w = Workspace(Path(sys.argv[1]))\n"
        "for i in range(20): w.record_step('r1', f'{sys.argv[2]}-{i}', 'k')\n"
    )
    processes = [subprocess.Popen([sys.executable, "-c", script, str(tmp_path), name]) for name in "abc"]
    assert [process.wait() for process in processes] == [0, 0, 0]
    assert len(workspace.read_run("r1")["steps"]) == 60


def test_written_json_has_no_leftovers(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"x": 1})
    write_json(tmp_path / "a.json", {"x": 2})
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": 2}
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
