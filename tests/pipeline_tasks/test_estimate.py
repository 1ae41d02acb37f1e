"""`nasline plan`: the probe and what is computed from it."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline_tasks import estimate as module
from pipeline_tasks import probe as probe_module
from pipeline_tasks.commands import plan_run
from pipeline_tasks.data.sets import open_set
from pipeline_tasks.errors import DataError, TemporaryError
from pipeline_tasks.estimate import Estimate, StepEstimate, estimate, text
from pipeline_tasks.params import Parameters, resolve
from pipeline_tasks.plan import plan
from pipeline_tasks.probe import STEPS, Measured, Training, probe, sample
from pipeline_tasks.workspace import Workspace

PROBED = Measured(
    seconds_per_step=0.5, seconds_per_image=0.1, memory_bytes=2 * 10**9, state_bytes=10**8, weights_bytes=10**7
)


@pytest.fixture(autouse=True)
def no_tracking(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def parameters_of(folder: Any, **options: object) -> Parameters:
    small = {"start.student_variant": "pico", "start.teacher_variant": "pico", "start.image_size": 64}
    values = {**small, "start.threads": 1, "start.cache_megabytes": 1, "start.dataset": str(folder.path), **options}
    return resolve(None, values)


def estimated(folder: Any, tmp_path: Path, probe_steps: int = STEPS, **options: object) -> dict[str, StepEstimate]:
    parameters, workspace = parameters_of(folder, **options), Workspace(tmp_path / "workspace")
    found = estimate(workspace, parameters, plan(workspace, parameters), probe_steps)
    return {step.reference: step for step in found.steps}


@pytest.mark.slow
def test_probe_trains_some_steps_and_leaves_nothing(coco_folder: Any, tmp_path: Path) -> None:
    parameters = parameters_of(coco_folder, **{"distill.batch_size": 2})
    before = sorted(tmp_path.rglob("*"))
    with open_set(str(coco_folder.path)) as opened:
        found = probe(opened, parameters, Training("pico", "pico", parameters.distill), steps=4)
    assert sorted(tmp_path.rglob("*")) == before
    assert 0 < found.seconds_per_step < 60 and 0 < found.seconds_per_image < 60
    assert found.state_bytes > 3 * found.weights_bytes > 10**6  # weights, their average and AdamW's two moments
    assert found.memory_bytes > 10**7


def test_probe_times_epochs_with_mosaic(coco_folder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[Any] = []
    monkeypatch.setattr(probe_module, "_times", lambda context, task: tried.append(task.parameters) or [0.0, 1.0, 2.0])
    monkeypatch.setattr(probe_module, "_evaluation_seconds", lambda *_: 0.1)
    options = {"teach.batch_size": 2, "teach.mosaic": 1.0, "teach.close_mosaic_epochs": 5}
    parameters = parameters_of(coco_folder, **options)
    with open_set(str(coco_folder.path)) as opened:
        probe(opened, parameters, Training("pico", None, parameters.teach), steps=4)
    assert (tried[0].mosaic, tried[0].close_mosaic_epochs, tried[0].epochs) == (1.0, 0, 3)


def test_sample_leaves_out_what_is_no_picture(coco_folder: Any) -> None:
    coco_folder.image("train", 0).unlink()
    coco_folder.image("train", 1).write_bytes(b"no picture")
    with open_set(str(coco_folder.path)) as opened:
        images = sample(opened, 100, 4)
        assert len(images) == 4 and images.box_counts.tolist() == [2] * 4
        assert images.size(0) == (48, 32) and images.class_names == opened.class_names
        with pytest.raises(DataError, match="has 4 usable training pictures, a batch needs 5"):
            sample(opened, 100, 5)


def test_hours_follow_from_steps_and_evaluations(
    make_coco_folder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    probed: list[Training] = []
    monkeypatch.setattr(module, "probe", lambda opened, parameters, training, steps: probed.append(training) or PROBED)
    folder, unlabeled = make_coco_folder(train=20, val=5), make_coco_folder("unlabeled", train=10, val=1, test=1)
    shutil.rmtree(unlabeled.path / "annotations")
    given = {
        "start.pretrain_dataset": str(folder.path), "start.unlabeled_dataset": str(unlabeled.path),
        "start.teacher_variant": "t", "pretrain.epochs": 3, "teach.epochs": 10, "teach.batch_size": 4,
        "teach.evaluate_every_epochs": 4, "distill.epochs": 2, "distill.batch_size": 8, "distill.accumulate_steps": 2,
    }  # fmt: skip
    found = estimated(folder, tmp_path, **given)
    teach, distill = found["teach"], found["distill"]
    assert (teach.images, teach.steps) == (20, 50)
    assert teach.hours == pytest.approx((50 * 0.5 + 3 * 5 * 0.1) / 3600)
    assert (distill.images, distill.steps) == (20 + 12, 2 * 2)
    assert found["pseudo_label"].hours == pytest.approx(12 * 0.1 / 3600)
    assert found["pretrain/student"].images == 20 and found["quantize"].hours is None
    assert teach.disk_bytes == 2 * 10**8 + 2 * 10**7 and (teach.memory_bytes or 0) > 2 * 10**9
    assert [(one.variant, one.teacher) for one in probed] == [("pico", None), ("t", None), ("t", None), ("pico", "t")]
    probed.clear()
    same = {**given, "start.teacher_variant": "pico", "teach.batch_size": 8}
    found = estimated(folder, tmp_path, **same)
    assert found["pretrain/teacher"].basis == "that of pretrain/student" and found["pretrain/teacher"].hours == 0
    assert len(probed) == 2  # a shared one, and the one with the teacher


def test_a_time_budget_shortens_a_training_and_never_lengthens_it(
    make_coco_folder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "probe", lambda opened, parameters, training, steps: PROBED)
    folder = make_coco_folder(train=20, val=5)
    given = {"start.teacher_variant": "pico", "teach.epochs": 10, "teach.batch_size": 8}

    def teach(**options: object) -> tuple[int | None, float, str]:
        step = estimated(folder, tmp_path, **given, **options)["teach"]
        assert step.hours is not None
        return step.steps, step.hours * 3600, step.basis

    whole = (20, pytest.approx(20 * 0.5 + 10 * 5 * 0.1), "0.5 s/step")
    assert teach() == teach(**{"teach.budget_minutes": 60.0}) == whole  # 10 epochs of 2 steps
    # 6 s at 0.5 s a step and 0.5 s for the evaluation after each 2 steps
    assert teach(**{"teach.budget_minutes": 0.1}) == (8, pytest.approx(6.0), "0.5 s/step, time budget")


def test_without_a_probe_there_are_steps_but_no_hours(coco_folder: Any, tmp_path: Path) -> None:
    found = estimated(coco_folder, tmp_path, probe_steps=0, **{"distill.batch_size": 2, "distill.epochs": 7})
    assert (found["distill"].steps, found["distill"].hours) == (21, None)
    assert found["pretrain/student"].basis == "nothing to train"
    with pytest.raises(DataError, match=r"start\.dataset names no folder that is there"):
        estimated(type(coco_folder)(tmp_path / "nowhere"), tmp_path, probe_steps=0)


def test_short_disk_is_refused() -> None:
    step = StepEstimate("distill", 10, 5, 1.0, 10**9, 5 * 10**9, "0.1 s/step")
    found = Estimate([step], 20, "cpu", free_bytes=7 * 10**9, place=Path("/data"))
    found.require_disk()
    lines = [" ".join(line.split()) for line in text(found, Parameters()).splitlines()]
    assert "distill 10 5 1.00 1.0 GB 5.0 GB 0.1 s/step" in lines
    with pytest.raises(TemporaryError, match=r"about 6\.0 GB below /data, which has 5\.5 GB free"):
        replace(found, free_bytes=5_500_000_000).require_disk()


def test_command_takes_parameters_and_refuses_nonsense(coco_folder: Any, nasline: Any) -> None:
    options = ("--probe-steps", 0, "--set", f"start.dataset={coco_folder.path}")
    output = nasline("plan", *options, "--set", "distill.batch_size=2", code=0)
    assert "estimate without a probe: no hours" in output and "12 images" not in output
    assert "must be 0 or at least 3" in nasline("plan", "--probe-steps", 2, code=2)
    assert plan_run.PROBE_STEPS == STEPS
