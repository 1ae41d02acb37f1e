"""Parameters that are impossible together are refused at `start`, dry run included, with field, value and remedy."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch

import model
from model.quantization.quantize import QuantizationConfig, quantize
from pipeline_tasks import combinations
from pipeline_tasks.__main__ import main
from pipeline_tasks.combinations import require_images_for, require_possible
from pipeline_tasks.errors import ParameterError
from pipeline_tasks.keys import RunKeys
from pipeline_tasks.params import Parameters, resolve
from pipeline_tasks.run_step import processes_to_start
from pipeline_tasks.start import start
from pipeline_tasks.workspace import Workspace

if TYPE_CHECKING:
    from tests.pipeline_tasks.conftest import CocoFolder

PICO = {"start.student_variant": "pico", "start.teacher_variant": "pico"}
EVERYTHING = ["backbone", "neck", "heads"]
MIRRORED = {"teach.flip": 0, "pseudo_label.flip_consistency": "keep"}


def given(**options: Any) -> Parameters:
    return resolve(None, {**PICO, **{name.replace("__", "."): value for name, value in options.items()}})


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"teach__freeze": ["backbon"]}, r"teach\.freeze: 'backbon' matches no layer; .* start\.teacher_variant\)$"),
        (
            {"distill__freeze": ["stem"]},
            r"distill\.freeze: 'stem' matches no layer; .* \(YOLO-NAS pico of start\.student",
        ),
        ({"start__pretrain_dataset": "x", "pretrain__freeze": ["nose"]}, r"^pretrain\.freeze: 'nose' matches"),
        ({"quantize__training__freeze": ["*.branch_3x3"]}, r"quantize\.training\.freeze: '\*\.branch_3x3' matches no"),
        (
            {"distill__freeze": EVERYTHING, "distill__feature_weight": 1.0},
            r"distill\.freeze \['backbone', .*no layer to",
        ),
        ({"quantize__training__freeze": ["*"]}, r"quantize\.training\.freeze \['\*'\] leaves no layer to train"),
        ({"start__unlabeled_dataset": "x", **MIRRORED}, r"flip_consistency is 'keep', but with teach\.flip 0 .* none"),
        (
            {"start__processes": 8, "teach__batch_size": 4, "distill__batch_size": 7},
            r"start\.processes is 8, .* of teach\.batch_size 4, distill\.batch_size 7; give batches at least 8 images",
        ),
        (
            {"start__image_size": 64, "teach__batch_size": 1, "teach__multi_scale": 0.5},
            r"teach\.batch_size 1 leaves .* at 32 pixels \(start\.image_size 64, teach\.multi_scale 0\.5\); raise",
        ),
    ],
)
def test_impossible_together(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ParameterError, match=sentence):
        require_possible(given(**options))


@pytest.mark.parametrize(
    "options",
    [
        {"pretrain__freeze": ["nose"], "pretrain__batch_size": 1, "start__processes": 2},  # nothing is pretrained
        {"teach__source": "champion", "teach__freeze": ["nose"]},
        {"quantize__qat": "never", "quantize__training__freeze": ["nose"]},
        {"distill__freeze": ["feature_adapters*", "backbone"], "distill__feature_weight": 1.0},
        {"quantize__training__freeze": ["backbone.stem"], "teach__freeze": ["backbone.stage[12]", "neck"]},
        {"start__image_size": 64, "teach__batch_size": 1},  # the last map has four pixels
        MIRRORED,  # without unlabelled images nobody asks
        {"start__device": "cuda", "start__processes": 9, **{f"{name}.auto_batch_size": True for name in (
            "teach", "distill", "quantize.training")}},
    ],
)  # fmt: skip
def test_possible(options: dict[str, Any]) -> None:
    require_possible(given(**options))


def test_no_network_is_built_where_nothing_is_frozen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(combinations, "_network")
    require_possible(Parameters())


def test_layers_of_the_quantized_network_are_those_that_are_trained() -> None:
    folded = model.build("pico", 1).eval().fuse()
    trained = quantize(folded, [torch.rand(1, 3, 64, 64)], QuantizationConfig(merge_upsampling=True))
    parameters = given()
    (training,) = [one for one in combinations._trainings(parameters) if one.section == "quantize.training"]
    looked_at = combinations._network(parameters, training)
    assert [name for name, _ in looked_at.named_parameters()] == [name for name, _ in trained.named_parameters()]


def test_start_and_its_dry_run_refuse_and_write_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    workspace = tmp_path / "workspace"
    options = ["--workspace", str(workspace), "--start.processes", "9"]
    assert main(["start", "--dry-run", *options]) == 65
    assert "ERROR start.processes is 9" in capsys.readouterr().out
    with pytest.raises(ParameterError, match=r"start\.processes is 9"):
        start(Workspace(workspace), "one", given(start__processes=9))
    assert not (workspace / "runs").exists()


def test_processes_of_one_step_are_compared_with_its_batch() -> None:
    """`--processes` may differ from step to step."""
    parameters = given(teach__batch_size=2)
    require_images_for(8, parameters, "distill")
    require_images_for(8, parameters, "pretrain")  # there is nothing to train
    with pytest.raises(
        ParameterError, match=r"--processes is 3, .* of a batch of teach\.batch_size 2; give batches at"
    ):
        require_images_for(3, parameters, "teach", "--processes")


def test_the_option_is_refused_before_a_process_is_started(
    tmp_path: Path, coco_folder: CocoFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace = Workspace(tmp_path / "workspace")
    start(workspace, "one", given(start__dataset=str(coco_folder.path)))
    monkeypatch.setattr(RunKeys, "of", lambda *_: SimpleNamespace(key="unfinished"))
    with pytest.raises(ParameterError, match=r"--processes is 9, .* of a batch of teach\.batch_size 8"):
        processes_to_start(workspace, "one", "teach", "", 9)
    assert processes_to_start(workspace, "one", "teach", "", 8) == (8, "cpu")
