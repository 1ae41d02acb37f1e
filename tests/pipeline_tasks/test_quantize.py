"""`quantize` on a made-up set: what is measured decides what is published, and a second attempt goes on."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pytest
import torch

import model
from model.checkpoint import CheckpointMetadata, save_checkpoint
from model.data.tables import BOXES_SCHEMA, IMAGES_SCHEMA, DatasetMetadata, write_dataset
from model.preprocessing import Preprocessing
from model.quantization.quantize import calibration_digest, float_layers, quantized_layers
from model.quantization.storage import load_quantized, read_report
from pipeline_tasks import quantization_search
from pipeline_tasks import quantize as step
from pipeline_tasks.params import resolve

SIDE = 64
FLOAT_MAP = 0.6
STEM, HEAD = "backbone.stem.conv.rbr_reparam", "heads.head1.stem.seq.conv"
OPTIONS: dict[str, Any] = {
    "start.threads": 1, "gate.target": "gpu", "quantize.observer": "percentile",
    "quantize.calibration_images": 4, "quantize.sensitivity_images": 2, "quantize.map_budget": 0.5,
    "quantize.maximum_float_share": 1.0,
}  # fmt: skip
"""A GPU is the target: nothing is profiled, so no test waits for an export."""

Measure = Callable[[Any], float]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def make_context(tmp_path: Path) -> Callable[..., Any]:
    """A step's context with the given options; contexts of one test share the state."""
    rows = []
    for index in range(8):
        picture = np.random.default_rng(index).integers(0, 256, (SIDE, SIDE, 3), np.uint8)
        assert cv2.imwrite(str(tmp_path / f"{index}.png"), picture)
        rows.append(
            {
                "image_id": index, "original_id": str(index), "root": 0, "path": f"{index}.png", "width": SIDE,
                "height": SIDE, "split": "train" if index < 6 else "val", "sha256": None, "licence": "MIT",
            }
        )  # fmt: skip
    metadata = DatasetMetadata("target", ("a", "b"), (1, 2), ("target",), licences={"images": {}, "annotations": ""})
    tables = pa.Table.from_pylist(rows, IMAGES_SCHEMA), pa.Table.from_pylist([], BOXES_SCHEMA)
    write_dataset(tmp_path / "target", *tables, metadata)
    torch.manual_seed(0)
    network = model.build("pico", 2)
    save_checkpoint(tmp_path / "student", network, CheckpointMetadata("pico", ("a", "b"), Preprocessing(SIDE), 1))
    (tmp_path / "state").mkdir()

    def make(name: str = "output", **options: Any) -> Any:
        (tmp_path / name).mkdir()
        named = {f"quantize.{key}": value for key, value in options.items()}
        return SimpleNamespace(
            parameters=resolve(None, {**OPTIONS, **named}),
            inputs={"target": tmp_path / "target", "student": tmp_path / "student"},
            output=tmp_path / name,
            state=tmp_path / "state",
            dataset_roots=lambda: {"target": tmp_path},
            save_state=lambda: None,
        )

    return make


def losing(**points: float) -> Measure:
    """A validation mAP that loses so many points for each of these layers in INT8."""
    by_name = {"stem": STEM, "head": HEAD}

    def measure(network: Any) -> float:
        layers = quantized_layers(network)
        lost = [value for key, value in points.items() if layers and layers[by_name[key]].quantizing]
        return FLOAT_MAP - sum(lost) / 100

    return measure


@pytest.fixture
def judged_by(monkeypatch: pytest.MonkeyPatch) -> Callable[[Measure], None]:
    def use(measure: Measure) -> None:
        monkeypatch.setattr(step, "_validation_map", lambda *_: measure)

    return use


def test_ptq_is_published_where_it_keeps_the_budget(
    make_context: Callable[..., Any], judged_by: Callable[[Measure], None]
) -> None:
    judged_by(losing(stem=0.4))
    context = make_context(qat="auto")
    summary = step.quantize(context)
    assert summary["published"] == "ptq" and summary["budget_met"]
    assert summary["float_layers"] == 6 and summary["quantized_layers"] == 70
    assert summary["selective_map50_95"] == summary["ptq_map50_95"] == pytest.approx(0.596)
    frontier = json.loads((context.output / "frontier.json").read_text())
    assert [len(row["added"]) for row in frontier][:2] == [0, 0]
    assert [row["published"] for row in frontier] == [False, True] + [False] * (len(frontier) - 2)
    assert frontier[0]["predicted"] > frontier[1]["predicted"] and frontier[1]["measured_cpu"] is None
    assert (context.output / "plots" / "frontier.png").stat().st_size > 5000
    with (context.output / "frontier.csv").open() as file:
        assert [int(row["layers_added"]) for row in csv.DictReader(file)] == [len(row["added"]) for row in frontier]


def test_harmful_layers_stay_in_float_with_their_figures(
    make_context: Callable[..., Any], judged_by: Callable[[Measure], None]
) -> None:
    judged_by(losing(stem=0.4, head=0.4))
    context = make_context(map_budget=0.1, selection_evaluations=40)
    summary = step.quantize(context)
    assert summary["published"] == "selective" and summary["budget_met"]
    assert summary["ptq_map50_95"] == pytest.approx(0.592) and summary["selective_map50_95"] == FLOAT_MAP
    network, _ = load_quantized(context.output / "checkpoint")
    chosen = {name: reason for name, reason in float_layers(network).items() if not name.endswith("_pred")}
    assert {STEM, HEAD} <= set(chosen) and len(chosen) < 60
    assert all(reason.startswith("sensitive: alone in INT8") for reason in chosen.values())
    assert "predicted from multiply-adds" in chosen[STEM]
    by_layer = {row["layer"]: row for row in read_report(context.output / "checkpoint")["layers_in_float"]}
    assert by_layer[STEM]["chosen_by"] == "search" and by_layer[STEM]["error"] > 0
    assert by_layer["heads.head1.cls_pred"]["chosen_by"] == "rule"


def test_training_follows_where_selection_cannot_keep_the_budget(
    make_context: Callable[..., Any], judged_by: Callable[[Measure], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    judged_by(losing(stem=2.0))
    started_from = []

    def trained(subject: Any, network: Any) -> Any:
        started_from.append(float_layers(network))
        judged = losing(stem=0.0)
        object.__setattr__(subject, "measure", judged)
        return network

    monkeypatch.setattr(step, "_trained", trained)
    summary = step.quantize(make_context(maximum_float_share=0.0))
    assert len(started_from) == 1 and len(started_from[0]) == 6, "from PTQ, with nothing else in float"
    assert summary["published"] == "qat" and summary["budget_met"] and summary["float_layers"] == 6
    assert "qat_selective_map50_95" not in summary


def test_what_training_does_not_recover_is_searched_again(
    make_context: Callable[..., Any], judged_by: Callable[[Measure], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Selection alone may give up no layer; after training a larger share is allowed by hand, to see it used."""
    judged_by(losing(stem=2.0))

    def trained(subject: Any, network: Any) -> Any:
        given = subject.context.parameters.quantize.model_copy(update={"maximum_float_share": 1.0})
        subject.context.parameters = subject.context.parameters.model_copy(update={"quantize": given})
        return network

    monkeypatch.setattr(step, "_trained", trained)
    context = make_context(maximum_float_share=0.0, selection_evaluations=20)
    summary = step.quantize(context)
    assert summary["published"] == "qat_selective" and summary["budget_met"]
    rows = json.loads((context.output / "frontier.json").read_text())
    assert [row["weights"] for row in rows if row["published"]] == ["qat"]
    assert {row["weights"] for row in json.loads((context.output / "sensitivity.json").read_text())} == {"ptq", "qat"}


def test_ranges_are_those_with_the_least_error(
    make_context: Callable[..., Any], judged_by: Callable[[Measure], None]
) -> None:
    judged_by(losing())
    context = make_context(observer="auto", selection_evaluations=0)
    step.quantize(context)
    errors = json.loads((context.output / "quantization.json").read_text())["observer_errors"]
    assert set(errors) == {"max", "mse", "percentile 99.99", "percentile 99.999"}
    best = min(errors, key=errors.get)
    name, _, percentile = best.partition(" ")
    named = make_context("named", observer=name, percentile=float(percentile or 99.0), selection_evaluations=0)
    step.quantize(named)
    auto, plain = (load_quantized(folder / "checkpoint")[0] for folder in (context.output, named.output))
    assert calibration_digest(auto) == calibration_digest(plain)


def test_no_search_and_no_training_when_told_so(
    make_context: Callable[..., Any], judged_by: Callable[[Measure], None]
) -> None:
    judged_by(losing(stem=2.0))
    context = make_context(selection_evaluations=0, qat="never")
    summary = step.quantize(context)
    assert summary["published"] == "ptq" and not summary["budget_met"]
    assert not (context.output / "frontier.json").exists()


def test_a_second_attempt_goes_on_with_the_same_choice(
    make_context: Callable[..., Any], judged_by: Callable[[Measure], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    judged_by(losing(stem=0.7))
    first, second = make_context("first", qat="never"), make_context("second", qat="never")
    expected = step.quantize(first)
    monkeypatch.setattr(quantization_search, "_decide", None)
    assert step.quantize(second) == expected
    for name in ("checkpoint/quantized.safetensors", "checkpoint/quantized.json", "frontier.json"):
        assert (first.output / name).read_bytes() == (second.output / name).read_bytes()


def test_transposed_convolutions_stay_when_asked(
    make_context: Callable[..., Any], judged_by: Callable[[Measure], None]
) -> None:
    judged_by(losing())
    context = make_context(merge_upsampling=False, selection_evaluations=0, float_layers=["backbone.stem*"])
    assert step.quantize(context)["float_layers"] == 9
    reasons = json.loads((context.output / "quantization.json").read_text())["float_layer_reasons"]
    assert "can be negative" in reasons["neck.neck1.reduce_after_concat.conv"]
    assert "asked for" in reasons[STEM]


def test_the_fastest_network_within_the_budget_is_published() -> None:
    def stage(name: str, map50_95: float, met: bool, time: float) -> step.Stage:
        return step.Stage(name, "ptq", None, map50_95, met, time)  # type: ignore[arg-type]

    ptq, selective, qat = (
        stage("ptq", 0.50, False, 1.0),
        stage("selective", 0.58, True, 2.0),
        stage("qat", 0.57, True, 1.0),
    )
    assert step._best([ptq, selective, qat]) is qat
    assert step._best([ptq, selective]) is selective
    assert step._best([ptq, stage("selective", 0.55, False, 2.0)]).name == "selective"
    assert step._best([stage("ptq", 0.59, True, 1.0), stage("qat", 0.60, True, 1.0)]).name == "qat"
