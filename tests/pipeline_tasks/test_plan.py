"""`nasline start --dry-run`, and the full-size recipe that it resolves."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from pipeline_tasks import execution
from pipeline_tasks.__main__ import main
from pipeline_tasks.execution import StepContext, execute
from pipeline_tasks.params import Parameters, resolve
from pipeline_tasks.plan import Plan, plan, text
from pipeline_tasks.process import Stopper
from pipeline_tasks.start import start
from pipeline_tasks.steps import STEPS, reference
from pipeline_tasks.workspace import Workspace

if TYPE_CHECKING:
    from tests.pipeline_tasks.conftest import CocoFolder

REFERENCES = [reference(step.name, part) for step in STEPS[1:] for part in step.parts or ("",)]
T4_INT8_MS = {"s": 2.36, "m": 3.78, "l": 4.78}


@pytest.fixture(autouse=True)
def no_tracking(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


class SilentTracker:
    """Tracking has tests of its own."""

    def __init__(self, *_: object) -> None:
        from pipeline_tasks.tracking.mirror import StepRecord

        self.record = StepRecord("")

    def deliver(self) -> None:
        """Nothing to do."""


def step_of(found: Plan, name: str) -> Any:
    return {step.reference: step for step in found.steps}[name]


def with_data(folder: CocoFolder, **options: object) -> Parameters:
    return resolve(None, {"start.dataset": str(folder.path), **options})


def test_plan_of_a_run_that_has_not_begun_writes_nothing(coco_folder: CocoFolder, tmp_path: Path) -> None:
    found = plan(Workspace(tmp_path / "workspace"), with_data(coco_folder))
    assert [step.reference for step in found.steps] == REFERENCES
    assert not (tmp_path / "workspace").exists()
    assert found.sentence() == ""
    first = step_of(found, "validate_data")
    assert first.key and not first.finished and first.waits_for == ()
    distill = step_of(found, "distill")
    assert distill.key is None
    assert distill.waits_for == ("validate_data", "pretrain/student", "teach", "pseudo_label")
    assert distill.inputs["teacher"] == "teach"


def test_plan_says_what_would_be_reused(
    coco_folder: CocoFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(execution, "Tracker", SilentTracker)
    workspace, parameters = Workspace(tmp_path / "workspace"), with_data(coco_folder)

    def make(context: StepContext) -> dict[str, Any]:
        for name in ("target", "pretrain", "unlabeled", "checkpoint"):
            (context.output / name).mkdir()
            (context.output / name / "content").write_text(name + context.part)
        return {}

    start(workspace, "one", parameters)
    made = {}
    for step, part in (("validate_data", ""), ("pretrain", "teacher")):
        made[reference(step, part)] = execute(workspace, "one", step, make, Stopper(), part).key
    before = sorted(workspace.root.rglob("*"))
    found = plan(workspace, with_data(coco_folder, **{"distill.epochs": 9}))
    assert {step.reference: step.key for step in found.steps if step.finished} == made
    teach, student = step_of(found, "teach"), step_of(found, "pretrain/student")
    assert teach.key and not teach.finished
    assert re.fullmatch("pretrain/teacher [0-9a-f]{12}", teach.inputs["weights"])
    assert student.key and not student.finished
    assert step_of(found, "distill").waits_for == ("pretrain/student", "teach", "pseudo_label")
    lines = text(found, parameters)
    assert f"pretrain/teacher  reused  key {made['pretrain/teacher'][:12]}" in lines
    assert "teach             to do   key " in lines and "epochs=9" in lines
    assert sorted(workspace.root.rglob("*")) == before


def test_missing_paths_are_named_in_one_sentence_and_the_chain_is_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    options = ["--start.pretrain_dataset", "data/nowhere", "--start.initial_checkpoint", "no/checkpoint"]
    assert main(["start", "--dry-run", *options]) == 0
    output = capsys.readouterr().out
    (sentence,) = [line for line in output.splitlines() if " WARNING " in line]
    assert "start.dataset (empty), start.pretrain_dataset data/nowhere, start.initial_checkpoint: folder" in sentence
    assert "without them the run cannot start" in sentence
    assert all(f"\n  {name} " in output for name in REFERENCES)
    assert list(tmp_path.iterdir()) == []


def test_a_step_of_which_all_is_at_its_default_says_so(coco_folder: CocoFolder, tmp_path: Path) -> None:
    """`export` has parameters of its own and none that is shown in any case."""
    found = plan(Workspace(tmp_path / "workspace"), with_data(coco_folder))
    export = step_of(found, "export")
    assert export.parameters and not export.shown
    lines = text(found, with_data(coco_folder)).splitlines()
    assert "    with  defaults" in lines
    assert not [line for line in lines if line.startswith("    with  (")]


def test_without_a_champion_a_run_that_needs_one_is_refused(coco_folder: CocoFolder, tmp_path: Path) -> None:
    from pipeline_tasks.errors import UsageError

    with pytest.raises(UsageError, match="'yolo_nas' has no champion to start from"):
        plan(Workspace(tmp_path / "workspace"), with_data(coco_folder, **{"start.from_champion": True}))


def test_start_needs_a_run_unless_it_is_dry(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["start", "--workspace", str(tmp_path)]) == 2
    assert "--run is missing; give the run an id, or look at it first with --dry-run" in capsys.readouterr().out


@pytest.fixture
def recipe_commands(repository: Path) -> dict[str, list[str]]:
    """The commands that the full-size recipe gives in its first lines, by student variant."""
    lines = (repository / "params.coco.yaml").read_text().splitlines()
    commands = [shlex.split(line.lstrip("# ")) for line in lines if line.startswith("#   nasline start --run ")]
    return {command[3].removeprefix("coco-"): command[1:] for command in commands}


def test_full_size_recipe_resolves_every_step_of_every_variant(
    recipe_commands: dict[str, list[str]],
    repository: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert list(recipe_commands) == ["s", "m", "l"]
    monkeypatch.chdir(tmp_path)
    teachers = []
    for variant, words in recipe_commands.items():
        words[words.index("params.coco.yaml")] = str(repository / "params.coco.yaml")
        assert main([*words, "--dry-run"]) == 0
        output = capsys.readouterr().out
        told = json.loads(output.splitlines()[-1].removeprefix("NASLINE_RESULT "))
        steps = {step["reference"]: step for step in told["steps"]}
        assert list(steps) == REFERENCES
        assert steps["pretrain/student"]["parameters"]["variant"] == variant
        assert 25 <= steps["pretrain/student"]["parameters"]["epochs"] <= 40
        gate = steps["gate"]["parameters"]
        assert (gate["target"], gate["maximum_latency_ms"]) == ("t4", T4_INT8_MS[variant]), "where it holds"
        assert "start.dataset data/coco, start.pretrain_dataset data/objects365, start.unlabeled_dataset" in output
        teachers.append([steps[name]["parameters"] for name in ("pretrain/teacher", "teach", "pseudo_label")])
    assert teachers[0] == teachers[1] == teachers[2], "made once, reused by the other runs"


def test_full_size_recipe_is_for_eight_gpus_and_gives_reasons(repository: Path) -> None:
    parameters = resolve(repository / "params.coco.yaml", {})
    assert (parameters.start.processes, parameters.start.device, parameters.start.precision) == (8, "cuda", "bfloat16")
    assert parameters.pretrain.batch_size % parameters.start.processes == 0
    lines = (repository / "params.coco.yaml").read_text().splitlines()
    pretrain = lines[lines.index(next(line for line in lines if line.startswith("pretrain:"))) + 1 :]
    values = pretrain[: next(i for i, line in enumerate(pretrain) if not line.startswith("  "))]
    assert len(values) > 15 and all(" # " in line for line in values), "a value without a reason or a source"
