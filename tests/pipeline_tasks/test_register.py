"""What `register` refuses: a gate whose files contradict each other, and an engine that the gate did not judge."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from model.data.image_set import ImageSet
from pipeline_tasks import digests, register
from pipeline_tasks.errors import DataError
from pipeline_tasks.gate import gate, require_boxes, require_float
from pipeline_tasks.params import resolve
from pipeline_tasks.tracking.champions import Compared

FILES = {"int8": "model.onnx", "float": "model.float.onnx"}
RULE = {"name": "INT8 mAP50-95", "passed": True}
ACCEPTED = {"passed": True, "sentence": "accepted: all 1 rules passed", "rules": [RULE]}
REJECTED = {"passed": False, "sentence": "rejected: INT8 mAP50-95", "rules": [{**RULE, "passed": False}]}


def write(file: Path, content: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content))


@pytest.fixture
def context(tmp_path: Path) -> Any:
    """An accepted engine, its gate by OpenVINO, and no champion."""
    engine, gate_folder = tmp_path / "export/engine", tmp_path / "gate"
    engine.mkdir(parents=True)
    for name, file in FILES.items():
        (engine / file).write_text(name)
        built = {"source_sha256": digests.of_file(engine / file)}
        write(gate_folder / "target" / name / "build.json", built)
    write(engine.parent / "manifest.json", {"files": digests.of_folder(engine.parent)})
    write_verdict(gate_folder, ACCEPTED, told=ACCEPTED)
    output = tmp_path / "output"
    output.mkdir()
    inputs = {"engine": engine, "gate": gate_folder}
    return SimpleNamespace(inputs=inputs, output=output, parameters=resolve(None, {}), champion=None, run={})


def write_verdict(folder: Path, verdict: dict[str, Any], told: dict[str, Any]) -> None:
    write(folder / "verdict.json", verdict)
    write(folder / "manifest.json", {"summary": {"passed": int(told["passed"]), "verdict": told["sentence"]}})


@pytest.fixture
def reached(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ends the step where it has found nothing to refuse."""

    def end(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(register, "_bundle", end)


def test_the_engine_that_was_judged_is_registered(context: Any, reached: None) -> None:
    with pytest.raises(KeyboardInterrupt):
        register.register(context)


@pytest.mark.parametrize(
    ("verdict", "told", "contradicts"),
    [
        ({**REJECTED, "passed": True, "rules": [RULE]}, REJECTED, "the manifest beside it"),
        (ACCEPTED, REJECTED, "the manifest beside it"),
        ({**ACCEPTED, "sentence": REJECTED["sentence"]}, ACCEPTED, "the manifest beside it"),
        ({**REJECTED, "passed": True}, {**REJECTED, "passed": True}, "its own rules"),
    ],
)
def test_a_verdict_that_contradicts_what_the_gate_told_registers_nothing(
    context: Any, reached: None, verdict: dict[str, Any], told: dict[str, Any], contradicts: str
) -> None:
    write_verdict(context.inputs["gate"], verdict, told)
    with pytest.raises(DataError, match=rf"verdict\.json contradicts {contradicts} .*run the step gate again"):
        register.register(context)
    assert not list(context.output.iterdir())


def test_a_rejection_is_still_a_result(context: Any) -> None:
    write_verdict(context.inputs["gate"], REJECTED, told=REJECTED)
    assert register.register(context) == {"registered": 0, "because": REJECTED["sentence"]}


@pytest.mark.parametrize("name", FILES)
def test_an_engine_that_the_gate_did_not_build_from_is_refused(context: Any, reached: None, name: str) -> None:
    write(context.inputs["gate"] / "target" / name / "build.json", {"source_sha256": "0" * 64})
    with pytest.raises(DataError, match=rf"{name}/build\.json does not name .*{FILES[name]} as what was built \(0000"):
        register.register(context)


@pytest.mark.parametrize("report", [None, "[]", "{}", "{"])
def test_an_engine_of_which_nothing_tells_what_it_was_built_of_is_refused(
    context: Any, reached: None, report: str | None
) -> None:
    file = context.inputs["gate"] / "target/int8/build.json"
    file.unlink()
    if report is not None:
        file.write_text(report)
    with pytest.raises(DataError, match=r"build\.json does not name .*model\.onnx as what was built \(nothing is not"):
        register.register(context)


def write_network(file: Path, quantized: bool) -> None:
    """One activation, with or without a quantization behind it; the weights are stored in INT8 in both."""
    constants: dict[str, Any] = {
        "scale": np.array(0.1, np.float32),
        "zero": np.array(0, np.int8),
        "weight": np.ones(1, np.int8),
    }
    nodes = [
        helper.make_node("DequantizeLinear", ["weight", "scale", "zero"], ["float_weight"]),
        helper.make_node("Mul", ["images", "float_weight"], ["product"]),
        *([helper.make_node("QuantizeLinear", ["product", "scale", "zero"], ["rounded"])] if quantized else []),
    ]
    output = ("rounded", TensorProto.INT8) if quantized else ("product", TensorProto.FLOAT)
    graph = helper.make_graph(
        nodes, "network", [helper.make_tensor_value_info("images", TensorProto.FLOAT, [1])],
        [helper.make_tensor_value_info(*output, [1])],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )  # fmt: skip
    onnx.save(helper.make_model(graph), file)


def test_the_gate_refuses_a_float_engine_that_is_quantized(context: Any) -> None:
    file = context.inputs["engine"] / FILES["float"]
    write_network(file, quantized=False)
    require_float(file)
    write_network(file, quantized=True)
    with pytest.raises(DataError, match=rf"{file} must be the float engine, but it is quantized \(QuantizeLinear\)"):
        gate(context)
    file.write_text("no network")
    with pytest.raises(DataError, match="not a readable ONNX file"):
        gate(context)


@pytest.mark.parametrize(
    ("margin", "pinned", "compared"),
    [
        (0.5, {"name": "yolo", "version": "3"}, Compared("3")),
        (0.5, None, Compared(None)),
        (None, {"name": "yolo", "version": "3"}, None),
    ],
)
def test_the_champion_that_may_be_followed_is_the_one_the_gate_compared_with(
    context: Any, monkeypatch: pytest.MonkeyPatch, margin: float | None, pinned: Any, compared: Compared | None
) -> None:
    told = []

    def moved(*_: object, **given: Any) -> dict[str, Any]:
        told.append(given["compared"])
        return {"model": "yolo", "version": "4", "aliases": ["candidate"], "not_champion": "because"}

    (context.output / "bundle").mkdir()
    monkeypatch.setattr(register, "_bundle", lambda *_: (context.output / "bundle", "itself"))
    monkeypatch.setattr(register, "_measured", lambda *_: ())
    monkeypatch.setattr(register, "_tags", lambda *_: {})
    monkeypatch.setattr(register.version_page, "description", lambda *_: "")
    monkeypatch.setattr(register.registration, "register_bundle", moved)
    context.parameters = resolve(None, {"gate.champion_margin": margin})
    context.run, context.workspace, context.tracker = {"champion": pinned}, None, SimpleNamespace(run_id=None)
    assert register.register(context)["not_champion"] == "because"
    assert told == [compared]


def test_the_gate_refuses_a_test_split_without_a_box_that_counts() -> None:
    boxes = [(5.0, 5.0, 20.0, 20.0)] * 2

    def split(crowd: list[bool]) -> ImageSet:
        count = len(crowd)
        images = range(count), boxes[:count], [0] * count
        return ImageSet.from_arrays(("cat",), ["a", "b"], [(64, 64)] * 2, *images, is_crowd=crowd)

    require_boxes(split([True, False]))
    for crowd in ([True, True], []):
        with pytest.raises(DataError, match="test split has 2 images but no box beside crowd regions"):
            require_boxes(split(crowd))
