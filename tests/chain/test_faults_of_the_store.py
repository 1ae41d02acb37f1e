"""An object store that is gone, slow or damaged on the way, and a machine that is lost, between real processes and a
real S3 server: nothing half-published, one sentence, and in the end the bits of the undisturbed run.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from faulty_line import FaultyLine
from object_server import CREDENTIALS, new_workspace, object_server
from typed_chain import Terminal, errors, wait_for_checkpoint

from pipeline_tasks.remote_workspace import RemoteWorkspace
from pipeline_tasks.store import ObjectStore
from pipeline_tasks.workspace import Workspace

pytestmark = pytest.mark.slow

STUDENT = ("pretrain", "--role", "student", "--run", "one")
TRAINED = ("checkpoint/model.safetensors", "metrics.jsonl", "history.csv")


@dataclass
class Machines:
    """Machines that work in one workspace in the store, all through the same line."""

    uri: str
    line: FaultyLine
    finished: Terminal
    folder: Path

    def machine(self, name: str, **environment: str) -> Terminal:
        """A machine of its own: another cache, and so nothing but what the store has."""
        terminal = Terminal(self.folder / name, self.finished.data)
        kept = {key: value for key, value in terminal.environment.items() if not key.startswith("AWS_")}
        terminal.environment = {
            **kept,
            **CREDENTIALS,
            "AWS_ENDPOINT_URL": self.line.address,
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_MAX_ATTEMPTS": "2",
            "NASLINE_CACHE": str(terminal.workspace),
            "NASLINE_WORKSPACE": self.uri,
            "MLFLOW_TRACKING_URI": f"sqlite:///{self.finished.workspace}/mlflow.db",
            **environment,
        }
        return terminal

    def cache(self, name: str) -> Path:
        """The workspace's copy on a machine."""
        (folder,) = (self.folder / name / "workspace").iterdir()
        return folder

    def require_equal(self, name: str) -> None:
        """What a machine has of the student is what the undisturbed run published, and the state is gone."""
        unbroken = self.finished.published("one", "pretrain/student")
        for file in TRAINED:
            ours = self.cache(name) / "steps" / "pretrain" / unbroken.name / file
            assert ours.read_bytes() == (unbroken / file).read_bytes(), file
        assert "/manifest.json" in self.objects() and not any(".partial" in name for name in self.objects())

    def objects(self) -> list[str]:
        """What the store has of the student, without the key."""
        return [name.removeprefix(self._student) for name in ObjectStore(self.uri).sizes(self._student)]

    def uploaded_state(self) -> list[str]:
        """Files of the state from which another machine would go on."""
        stored = ObjectStore(self.uri).read(f"{self._student}.partial/state.json")
        return list(json.loads(stored.content)) if stored else []

    @property
    def _student(self) -> str:
        return f"steps/pretrain/{self.finished.published('one', 'pretrain/student').name}"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of the S3 server, which this process asks without the faulty line."""
    with (
        object_server(tmp_path_factory.mktemp("weed")) as address,
        pytest.MonkeyPatch.context() as patch,
    ):
        for name, value in {**CREDENTIALS, "AWS_ENDPOINT_URL": address}.items():
            patch.setenv(name, value)
        yield address


@pytest.fixture
def machines(server: str, finished: Terminal, tmp_path: Path) -> Iterator[Machines]:
    """A run in the store whose data have been validated on another machine."""
    uri, validated = new_workspace(), finished.published("one", "validate_data")
    workspace, key = RemoteWorkspace(uri, tmp_path / "another"), validated.name
    workspace.write_run("one", {**finished_run(finished), "steps": {"validate_data": key}})
    output = workspace.partial_directory("validate_data", key) / "output"
    shutil.copytree(validated, output)
    (output / "manifest.json").unlink()
    with workspace.lease("validate_data", key):
        workspace.publish("validate_data", key, finished.manifest("one", "validate_data"))
    line = FaultyLine(server)
    yield Machines(uri, line, finished, tmp_path)
    line.cut()


def finished_run(finished: Terminal) -> dict[str, object]:
    return dict(Workspace(finished.workspace).read_run("one"))


def test_a_slow_store_only_takes_longer(machines: Machines) -> None:
    machines.line.slow_seconds = 0.1
    machines.machine("first").nasline(*STUDENT)
    assert machines.line.pieces > 50, "it all went through the line"
    machines.require_equal("first")


def test_a_store_that_is_gone_in_mid_training_is_waited_for(machines: Machines) -> None:
    first = machines.machine("first")
    process = first.popen(STUDENT)
    while not (machines.folder / "first" / "workspace").exists():
        time.sleep(0.01)
    wait_for_checkpoint(machines.cache("first"), "pretrain", process)
    machines.line.cut()
    output, _ = process.communicate()
    assert process.returncode == 69, output
    assert "epoch 2/2" in output and "only this machine can go on from it" in output, "the training went on"
    assert errors(output)[-1].startswith(f"the object store at {machines.line.address} does not answer")
    assert not any("manifest" in name for name in machines.objects())
    machines.line.mend()
    assert "training goes on from step 10 of 10" in first.nasline(*STUDENT)
    machines.require_equal("first")


def test_flipped_bits_on_the_way_are_noticed_and_nothing_is_published(machines: Machines) -> None:
    first = machines.machine("first")
    machines.line.corrupt = "download"
    output = first.nasline(*STUDENT, code=69)
    (sentence,) = errors(output)
    assert machines.line.flipped > 0 and "arrived damaged" in sentence
    machines.line.corrupt, machines.line.flipped = "upload", 0
    output = first.nasline(*STUDENT, code=69)
    (sentence,) = errors(output)
    assert machines.line.flipped > 0 and "arrived damaged" in sentence
    assert not any("manifest" in name for name in machines.objects())
    machines.line.corrupt = ""
    assert "training goes on from step 10 of 10" in first.nasline(*STUDENT)
    machines.require_equal("first")


def test_a_lost_machine_costs_no_more_than_what_was_learned_since_the_last_upload(machines: Machines) -> None:
    """It is gone in its first epoch, at whose end alone the state was uploaded before."""
    lost = machines.machine("lost", NASLINE_STATE_UPLOAD_SECONDS="0.1")
    process = lost.popen(STUDENT)
    while "state.json" not in machines.uploaded_state():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
    process.kill()
    output, _ = process.communicate()
    assert "epoch 2/2" not in output
    output = machines.machine("other", NASLINE_LEASE_WAIT_SECONDS="120").nasline(*STUDENT)
    assert "state of another machine fetched" in output and "training goes on from step" in output
    machines.require_equal("other")
