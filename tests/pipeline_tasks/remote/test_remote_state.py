"""Steps on many machines: state that travels, shards that meet, a store that is away for a while."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from model.training_state import write_atomically
from pipeline_tasks import digests, execution
from pipeline_tasks.errors import TemporaryError, UnavailableError
from pipeline_tasks.execution import StepContext, execute
from pipeline_tasks.params import Parameters
from pipeline_tasks.process import Stopper
from pipeline_tasks.remote_state import INTERVAL_VARIABLE, upload_seconds
from pipeline_tasks.remote_workspace import RemoteWorkspace
from pipeline_tasks.store import ObjectStore
from pipeline_tasks.workspace import Workspace


class SilentTracker:
    """Tracking has tests of its own."""

    def __init__(self, *_: object) -> None:
        from pipeline_tasks.tracking.mirror import StepRecord

        self.record = StepRecord("")

    def deliver(self) -> None:
        """Nothing to do."""


def start_run(workspace: Workspace, shards: int = 1) -> None:
    parameters = Parameters().to_json()
    parameters["pseudo_label"]["shards"] = shards
    datasets = {"target": {"path": "/nowhere", "digest": "t", "dvc_revision": None}, "pretrain": None}
    facts = {"run": "r1", "datasets": datasets, "champion": None, "registry": "w", "code_version": "test"}
    workspace.write_run("r1", {**facts, "parameters": parameters, "steps": {}})


@pytest.mark.slow
def test_work_stopped_on_one_machine_goes_on_from_its_state_on_another(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(execution, "Tracker", SilentTracker)
    found: list[dict[str, str]] = []

    def train(context: StepContext) -> dict[str, Any]:
        """Two epochs on each machine; the file of the first is replaced, as checkpoints are."""
        found.append({path.name: path.read_text() for path in context.state.iterdir()})
        first = len(found) * 2 - 1
        for epoch in (first, first + 1):
            (context.state / f"state-{epoch}").write_text(f"weights {epoch}")
            (context.state / f"state-{epoch - 1}").unlink(missing_ok=True)
            (context.state / "left.partial").write_text("torn")
            if epoch == first:
                context.on_epoch_end({})
        if len(found) == 3:
            (context.output / "weights").write_text("done")
            return {}
        raise TemporaryError("told to stop")

    a, b = (RemoteWorkspace(uri, tmp_path / name) for name in "ab")
    start_run(a)
    for machine in (a, b):
        with pytest.raises(TemporaryError, match="told to stop"):
            execute(machine, "r1", "validate_data", train, Stopper())
    result = execute(a, "r1", "validate_data", train, Stopper())
    assert found == [{}, {"state-2": "weights 2"}, {"state-4": "weights 4"}]
    assert not ObjectStore(uri).sizes(f"steps/validate_data/{result.key}.partial/")
    assert execute(b, "r1", "validate_data", train, Stopper()).reused


@pytest.mark.slow
def test_half_uploaded_state_is_never_used_and_a_newer_one_here_is_kept(uri: str, tmp_path: Path) -> None:
    a, b = (RemoteWorkspace(uri, tmp_path / name) for name in "ab")
    here, there = (workspace.partial_directory("teach", "k") / "state" for workspace in (a, b))
    here.mkdir(parents=True)
    (here / "state-1").write_text("1")
    with a.lease("teach", "k"):
        a.save_state("teach", "k")
        (here / "state-2").write_text("2")  # saved here; the upload of its list never happened
        a._store.upload("steps/teach/k.partial/files/" + digests.of_file(here / "state-2"), here / "state-2")
        a.load_state("teach", "k")
    b.load_state("teach", "k")
    assert [path.name for path in there.iterdir()] == ["state-1"]
    assert sorted(path.name for path in here.iterdir()) == ["state-1", "state-2"]


@pytest.mark.parametrize(("given", "seconds"), [("", 300), ("0.2", 0.2), ("soon", 300), ("0", 300), ("inf", 300)])
def test_an_interval_that_is_none_is_the_default_and_told(
    given: str, seconds: float, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(INTERVAL_VARIABLE, given)
    assert upload_seconds() == seconds
    assert ("no number of seconds above 0; it is 300" in caplog.text) is (given in ("soon", "0", "inf"))


@pytest.mark.slow
def test_state_is_uploaded_while_the_work_goes_on_and_only_whole(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Checkpoints as a training writes them, faster than they are copied: what another machine gets is one of them."""
    monkeypatch.setenv("NASLINE_STATE_UPLOAD_SECONDS", "0.2")
    here, there = (RemoteWorkspace(uri, tmp_path / name) for name in "ab")
    state = here.partial_directory("teach", "k") / "state"
    state.mkdir(parents=True)
    fetched = there.partial_directory("teach", "k") / "state"
    seen = set()
    deadline = time.monotonic() + 60
    with here.lease("teach", "k"):
        number = 0
        while len(seen) < 3:
            assert time.monotonic() < deadline
            number += 1
            write_atomically(state / f"state-{number}", b"weights" * 100_000 + str(number).encode())
            write_atomically(state / "state.json", str(number).encode())
            (state / f"state-{number - 1}").unlink(missing_ok=True)
            time.sleep(0.01 if number % 40 else 1.0)
            there.load_state("teach", "k")
            if fetched.exists():
                named = (fetched / "state.json").read_text()
                assert (fetched / f"state-{named}").read_bytes().endswith(b"weights" + named.encode())
                seen.add(named)
        (state.with_name("output")).mkdir()
        here.publish("teach", "k", {"key": "k"})
    time.sleep(0.5)
    assert not ObjectStore(uri).sizes("steps/teach/k.partial/"), "no upload comes after the end"


@pytest.mark.slow
def test_inputs_and_shards_of_other_machines_are_here_when_a_step_reads_them(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(execution, "Tracker", SilentTracker)
    a, b, c = (RemoteWorkspace(uri, tmp_path / name) for name in "abc")
    start_run(a, shards=2)

    def make(context: StepContext) -> dict[str, Any]:
        for folder in ("pretrain", "target", "unlabeled", "checkpoint"):
            (context.output / folder).mkdir()
            (context.output / folder / "content").write_text(folder)
        return {}

    def label(context: StepContext) -> dict[str, Any]:
        assert (context.inputs["unlabeled"] / "content").read_text() == "unlabeled"
        (context.output / "boxes").write_text(context.published.name)
        return {}

    def merge(context: StepContext) -> dict[str, Any]:
        shards = context.published.with_name(context.published.name + ".shards")
        (context.output / "all").write_text(" ".join(sorted(path.read_text() for path in shards.glob("*/boxes"))))
        return {}

    for step, part in (("validate_data", ""), ("pretrain", "teacher"), ("teach", "")):
        execute(a, "r1", step, make, Stopper(), part=part)
    for index, machine in enumerate((a, b)):
        execute(machine, "r1", "pseudo_label", label, Stopper(), shard=f"{index}-of-2")
    result = execute(c, "r1", "pseudo_label", merge, Stopper())
    assert (c.step_directory("pseudo_label", result.key) / "all").read_text() == "0-of-2 1-of-2"
    fetched = {path.parent.parent.name for path in c.root.glob("steps/*/*/manifest.json")}
    assert fetched == {"validate_data", "teach", "pseudo_label"}  # pretrain is no input, its manifest was enough


@pytest.mark.slow
def test_training_goes_on_while_the_store_is_away(uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    workspace = RemoteWorkspace(uri, tmp_path / "a")
    workspace.write_run("r1", {"steps": {}})
    state = workspace.partial_directory("teach", "k") / "state"
    state.mkdir(parents=True)
    (state / "state-1").write_text("1")

    def away(*_: object, **__: object) -> None:
        raise workspace._store._away("test")

    with workspace.lease("teach", "k"):
        with monkeypatch.context() as patch:
            patch.setattr(ObjectStore, "_put", away)
            patch.setattr(ObjectStore, "read", away)
            workspace.save_state("teach", "k")
            assert workspace.read_run("r1") == {"steps": {}}
            (state.with_name("output")).mkdir()
            with pytest.raises(UnavailableError):
                workspace.publish("teach", "k", {"key": "k"})
        assert workspace.publish("teach", "k", {"key": "k"}).manifest["key"] == "k"
