"""Keys, reuse, missing inputs and resumed state: what holds for every step."""

from __future__ import annotations

import json
import shutil
import signal
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from pipeline_tasks import digests, execution
from pipeline_tasks.errors import DataError, TemporaryError, UsageError
from pipeline_tasks.execution import StepContext, assist, execute
from pipeline_tasks.keys import key_content
from pipeline_tasks.params import Parameters, resolve
from pipeline_tasks.process import Stopper
from pipeline_tasks.steps import definition
from pipeline_tasks.team import Helped, Team
from pipeline_tasks.tracking.registry import bundle_digest
from pipeline_tasks.workspace import Workspace


class SilentTracker:
    """Tracking has tests of its own."""

    def __init__(self, *_: object) -> None:
        from pipeline_tasks.tracking.mirror import StepRecord

        self.record = StepRecord("")
        self.run_id = None

    def deliver(self) -> None:
        """Nothing to do."""


@pytest.fixture(autouse=True)
def no_tracking(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(execution, "Tracker", SilentTracker)


def start(workspace: Workspace, run: str, options: dict[str, Any] | None = None, target: str = "t1") -> None:
    workspace.write_run(
        run,
        {
            "run": run,
            "parameters": resolve(None, options or {}).to_json(),
            "datasets": {
                "target": {"path": "/nowhere/target", "digest": target, "dvc_revision": None},
                "pretrain": {"path": "/nowhere/pretrain", "digest": "p1", "dvc_revision": None},
                "unlabeled": None,
            },
            "champion": None,
            "registry": "workspace",
            "code_version": "test",
            "steps": {},
        },
    )


def validate(context: StepContext) -> dict[str, Any]:
    """Each set's content follows from its digest alone."""
    for role in ("target", "pretrain", "unlabeled"):
        (context.output / role).mkdir()
        entry = context.run["datasets"][role]
        (context.output / role / "images.parquet").write_text(entry["digest"] if entry else "none")
    return {}


def pretrain(context: StepContext) -> dict[str, Any]:
    (context.output / "checkpoint").mkdir()
    source = (context.inputs["pretrain"] / "images.parquet").read_text()
    (context.output / "checkpoint" / "model.safetensors").write_text(source + context.part)
    return {"map50_95": 0.5}


def test_no_step_works_with_an_edited_champion(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path / "workspace")
    start(workspace, "run")
    bundle = tmp_path / "bundle"
    (bundle / "engine").mkdir(parents=True)
    frozen = workspace.read_run("run")
    champion = {"name": "yolo", "version": "7", "digest": "0", "directory": str(bundle)}
    champion |= {"bundle": bundle_digest(bundle), "data": {"target": "t1", "statistics": None}}
    workspace.write_run("run", {**frozen, "champion": champion})
    (bundle / "lineage.json").write_text("{}")
    with pytest.raises(DataError, match="is not the bundle of yolo v7"):
        execute(workspace, "run", "validate_data", validate, Stopper())
    (bundle / "lineage.json").unlink()
    execute(workspace, "run", "validate_data", validate, Stopper())


def run_both(workspace: Workspace, run: str) -> list[bool]:
    first = execute(workspace, run, "validate_data", validate, Stopper())
    second = execute(workspace, run, "pretrain", pretrain, Stopper(), part="teacher")
    return [first.reused, second.reused]


def test_second_run_with_equal_facts_reuses_everything(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    start(workspace, "one")
    start(workspace, "two", {"gate.minimum_map": 0.9, "start.threads": 3})
    assert run_both(workspace, "one") == [False, False]
    assert run_both(workspace, "two") == [True, True]
    assert workspace.read_run("one")["steps"] == workspace.read_run("two")["steps"]


def test_pretraining_alone_is_reused_when_only_the_target_changes(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    start(workspace, "one")
    start(workspace, "two", target="t2")
    run_both(workspace, "one")
    assert run_both(workspace, "two") == [False, True]


def test_student_and_teacher_of_one_variant_are_kept_apart_only_by_part_and_variant(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    start(workspace, "one", {"start.student_variant": "n", "start.teacher_variant": "s"})
    execute(workspace, "one", "validate_data", validate, Stopper())
    student = execute(workspace, "one", "pretrain", pretrain, Stopper(), part="student")
    teacher = execute(workspace, "one", "pretrain", pretrain, Stopper(), part="teacher")
    assert student.key != teacher.key


@pytest.mark.parametrize(
    ("option", "value", "changes"),
    [
        ("pretrain.epochs", 3, True),
        ("start.seed", 1, True),
        ("start.device", "cuda", False),
        ("teach.epochs", 3, False),
    ],
)
def test_key_follows_what_the_result_depends_on(option: str, value: object, changes: bool) -> None:
    frozen = {"datasets": {}, "champion": None}
    step = definition("pretrain")
    keys = [
        digests.of_json(key_content(step, parameters, "student", {}, frozen))
        for parameters in (Parameters(), resolve(None, {option: value}))
    ]
    assert (keys[0] != keys[1]) is changes


def test_missing_input_names_the_command_that_makes_it(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    start(workspace, "one")
    with pytest.raises(
        UsageError, match=r"pretrain needs validate_data of run 'one'.*`nasline validate_data --run one`"
    ):
        execute(workspace, "one", "pretrain", pretrain, Stopper(), part="student")
    execute(workspace, "one", "validate_data", validate, Stopper())
    with pytest.raises(UsageError, match="`nasline pretrain --role teacher --run one` first"):
        execute(workspace, "one", "teach", pretrain, Stopper())


INPUT = "pretrain/images.parquet"


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        (INPUT, "p1, edited", rf"{INPUT} was changed after it was published \(\w+ is not \w+\): remove the folder"),
        (INPUT, None, rf"{INPUT} cannot be read \(No such file or directory\): remove the folder"),
        ("pretrain/more.parquet", "x", r"pretrain/more\.parquet is not of this output: move it elsewhere"),
        ("manifest.json", "{", "manifest.json is damaged: remove the folder"),
    ],
)
def test_input_that_is_not_as_it_was_published_is_refused(
    tmp_path: Path, name: str, content: str | None, sentence: str
) -> None:
    workspace = Workspace(tmp_path)
    start(workspace, "one")
    key = execute(workspace, "one", "validate_data", validate, Stopper()).key
    folder = workspace.step_directory("validate_data", key)
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_text(content)
    with pytest.raises(DataError, match=sentence) as refused:
        execute(workspace, "one", "pretrain", pretrain, Stopper(), part="teacher")
    assert refused.value.exit_code == 65 and not list((tmp_path / "steps" / "pretrain").glob("*/manifest.json"))
    if "remove the folder" in sentence:
        assert f"remove the folder {folder} and run the step validate_data again" in str(refused.value)
        shutil.rmtree(folder)
    else:
        (folder / name).unlink()
    assert run_both(workspace, "one")[1] is False


def test_manifest_whose_list_was_edited_is_refused(tmp_path: Path) -> None:
    """As by who edits a file and its digest in the list, but not the digest of the whole."""
    workspace = Workspace(tmp_path)
    start(workspace, "one")
    execute(workspace, "one", "validate_data", validate, Stopper())
    (file,) = tmp_path.glob("steps/validate_data/*/manifest.json")
    (file.parent / INPUT).write_text("edited")
    manifest = json.loads(file.read_text())
    manifest["files"][INPUT]["sha256"] = digests.of_file(file.parent / INPUT)
    file.write_text(json.dumps(manifest))
    with pytest.raises(DataError, match=r"manifest\.json does not have the digest of the files it lists"):
        execute(workspace, "one", "pretrain", pretrain, Stopper(), part="teacher")


def test_what_a_step_does_not_read_is_not_compared(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    start(workspace, "one")
    key = execute(workspace, "one", "validate_data", validate, Stopper()).key
    folder = workspace.step_directory("validate_data", key)
    (folder / "target/images.parquet").write_text("edited")
    (folder / "pretrain/.DS_Store").write_text("of a desktop")
    assert not execute(workspace, "one", "pretrain", pretrain, Stopper(), part="teacher").reused


def test_output_that_decides_is_compared_when_it_is_reused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The exit code of `gate` and `register` is read from it; here another step stands for them."""
    assert execution.JUDGES == ("gate", "register")
    monkeypatch.setattr(execution, "JUDGES", ("validate_data",))
    workspace = Workspace(tmp_path)
    start(workspace, "one")
    key = execute(workspace, "one", "validate_data", validate, Stopper()).key
    assert execute(workspace, "one", "validate_data", validate, Stopper()).reused
    (workspace.step_directory("validate_data", key) / INPUT).write_text("edited")
    with pytest.raises(DataError, match="was changed after it was published"):
        execute(workspace, "one", "validate_data", validate, Stopper())


def test_told_to_stop_while_tracking_waits_for_its_server_stops(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tracking takes whatever interrupts it for a server that is away, and the step would go on to its end."""
    stopper = Stopper()

    def interrupted(self: SilentTracker) -> None:
        with suppress(TemporaryError):
            stopper._handle(signal.SIGTERM, None)

    monkeypatch.setattr(SilentTracker, "deliver", interrupted)
    workspace = Workspace(tmp_path)
    start(workspace, "one")
    with pytest.raises(TemporaryError, match="told to stop; nothing was published"):
        execute(workspace, "one", "validate_data", validate, stopper)
    assert not list((tmp_path / "steps" / "validate_data").glob("*/manifest.json"))


def test_failed_attempt_publishes_nothing_and_its_state_is_found_again(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    start(workspace, "one")
    attempts: list[list[str]] = []

    def flaky(context: StepContext) -> dict[str, Any]:
        attempts.append([path.name for path in [*context.state.iterdir(), *context.output.iterdir()]])
        (context.state / "checkpoint").write_text("half way")
        (context.output / "half").write_text("written")
        if len(attempts) == 1:
            raise DataError("the data ended")
        return validate(context)

    with pytest.raises(DataError):
        execute(workspace, "one", "validate_data", flaky, Stopper())
    assert workspace.read_run("one")["steps"] == {}
    assert not list((tmp_path / "steps" / "validate_data").glob("*/manifest.json"))
    execute(workspace, "one", "validate_data", flaky, Stopper())
    assert attempts == [[], ["checkpoint"]]


def test_manifest_lists_what_made_it_but_no_time_and_no_place(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    start(workspace, "one")
    before = time.time()
    result = execute(workspace, "one", "validate_data", validate, Stopper())
    published = workspace.published("validate_data", result.key)
    assert published is not None
    text = (published.directory / "manifest.json").read_text()
    assert published.manifest["key_content"]["inputs"] == {"target": "t1", "pretrain": "p1"}
    assert str(tmp_path) not in text and str(int(before))[:6] not in text


class ListeningTeam(Team):
    """Remembers what the first process told the others."""

    def __init__(self) -> None:
        self.told: list[int | None] = []

    def tell(self, exit_code: int | None) -> None:
        if not self.told:
            self.told.append(exit_code)


def test_other_processes_are_told_whether_there_is_work(tmp_path: Path) -> None:
    workspace, first, second = Workspace(tmp_path), ListeningTeam(), ListeningTeam()
    start(workspace, "one")
    for team in (first, second):
        execute(workspace, "one", "validate_data", validate, Stopper(), team=team)
    assert (first.told, second.told) == ([None], [0])


def test_helping_process_leaves_nothing_in_the_workspace(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    start(workspace, "one")
    execute(workspace, "one", "validate_data", validate, Stopper())
    before = sorted(tmp_path.rglob("*"))
    scratch: list[Path] = []

    def train(context: StepContext) -> dict[str, Any]:
        scratch.extend([context.output, context.state])
        pretrain(context)
        context.save_state()
        raise Helped

    assist(workspace, "one", "pretrain", train, Stopper(), part="student")
    assert sorted(tmp_path.rglob("*")) == before
    assert len(scratch) == 2 and not any(folder.exists() for folder in scratch)
