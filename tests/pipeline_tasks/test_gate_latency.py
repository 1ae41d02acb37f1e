"""The gate's stopwatch: noise is refused where a rule would judge by it, kept and marked where none does."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest
from gate_findings import record

from model.data.image_set import ImageSet
from model.engines import EngineOutput, latency
from model.preprocessing import Preprocessing
from pipeline_tasks import gate_latency
from pipeline_tasks.engine_table import EngineRow, engine_table
from pipeline_tasks.errors import TemporaryError
from pipeline_tasks.params import resolve

IMAGES = ImageSet.from_arrays(("cat",), ["target/images/a.jpg"], [(40, 30)])


class OneBoxEngine:
    name, runtime_version, precision, threads = "fake", "1", "int8", 1
    fixed_batch = None

    def run(self, images: np.ndarray) -> EngineOutput:
        return np.array([[[1, 1, 9, 9]]], np.float32), np.array([[[0.9]]], np.float32)


@pytest.fixture
def context(tmp_path: Path) -> Any:
    (tmp_path / "target/images").mkdir(parents=True)
    assert cv2.imwrite(str(tmp_path / "target/images/a.jpg"), np.zeros((30, 40, 3), np.uint8))
    (tmp_path / "engine").mkdir()
    (tmp_path / "engine/engine.json").write_text(json.dumps({"score_threshold": 0.25, "iou_threshold": 0.7}))
    return SimpleNamespace(
        inputs={"engine": tmp_path / "engine"},
        parameters=resolve(None, {"gate.latency_repeats": 10, "gate.latency_warmup_seconds": 0.0}),
        dataset_roots=lambda: {"target": tmp_path / "target"},
    )


def with_options(context: Any, **options: Any) -> Any:
    values = {**context.parameters.to_json()["gate"], **options}
    context.parameters = resolve(None, {f"gate.{name}": value for name, value in values.items()})
    return context


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the stopwatch was asked for; its INT8 record is noisy."""
    told: dict[str, Any] = {}

    def measure(engines: Any, images: Any, **options: Any) -> dict[str, Any]:
        told.update(options, engines=list(engines), shape=images.shape)
        return {"int8": replace(record("int8", 5.0), noisy=True, spread=0.9), "float": record("float", 10.0)}

    monkeypatch.setattr(latency, "measure_latency", measure)
    return told


def measure(context: Any) -> gate_latency.GateLatency:
    engines: Any = {"int8": OneBoxEngine(), "float": OneBoxEngine()}
    return gate_latency.measure(context, engines, Preprocessing(32), IMAGES)


@pytest.mark.parametrize("rule", ["maximum_latency_ms", "minimum_speedup"])
def test_a_rule_may_not_judge_noise(context: Any, asked: dict[str, Any], rule: str) -> None:
    with pytest.raises(TemporaryError, match=r"spreads by 90% .*gate\.maximum_spread") as refused:
        measure(with_options(context, **{rule: 1000.0}))
    assert refused.value.exit_code == 75


def test_without_a_rule_noise_is_kept_and_marked(
    context: Any, asked: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    found = measure(context)
    assert found.to_json()["int8"]["noisy"] is True
    assert "no latency rule is on" in caplog.text


def test_the_parameters_reach_the_stopwatch(context: Any, asked: dict[str, Any]) -> None:
    measure(with_options(context, latency_attempts=5, maximum_spread=0.2, latency_warmup_seconds=0.5))
    assert asked == {
        "engines": ["int8", "float"], "shape": (1, 3, 32, 32), "warmup_seconds": 0.5, "repeats": 10,
        "spread_limit": 0.2, "attempts": 5, "kind": "cpu",
    }  # fmt: skip


@pytest.mark.parametrize(("given", "made"), [(10, 1000), (3000, 3000)])
def test_a_gpu_is_measured_long_enough_to_show_what_it_holds(
    context: Any, asked: dict[str, Any], given: int, made: int
) -> None:
    measure(with_options(context, target="t4", latency_repeats=given))
    assert (asked["repeats"], asked["kind"]) == (made, "gpu")


def test_a_fixed_batch_is_what_the_gate_measures_and_tells(context: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OneBoxEngine, "fixed_batch", 8)
    found = measure(with_options(context, maximum_spread=1000.0))
    assert {record.batch for record in found.engines.values()} == {8}
    heading, row = engine_table([EngineRow(found.engines["int8"])])[1:]
    assert row[: heading.index("batch") + len("batch")].endswith("    8")


def test_the_file_has_engines_and_what_is_around_them(context: Any) -> None:
    found = measure(with_options(context, maximum_spread=1000.0))
    content = json.loads(json.dumps(found.to_json()))
    assert list(content) == ["int8", "float", "preprocessing", "postprocessing"]
    assert content["postprocessing"]["images"] == 1 and content["int8"]["repeats"] == 10
    assert found.speedup == content["float"]["min_ms"] / content["int8"]["min_ms"]
