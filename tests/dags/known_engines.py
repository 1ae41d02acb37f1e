"""A run that has come as far as the gate without any training, and engines whose accuracy is known beforehand.

Such an engine knows the test pictures by the sum of their bytes and answers with their labelled boxes, for the classes
it is meant to find; one quantized convolution, whose result hardly counts, makes it an INT8 engine.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from typed_chain import Terminal

from model.data.image_set import ImageSet
from model.data.tables import read_dataset
from model.preprocessing import Preprocessing
from pipeline_tasks.images import make_open_image
from pipeline_tasks.keys import RunKeys
from pipeline_tasks.workspace import Workspace

PREPROCESSING = Preprocessing(64)
SCORE = 0.9
NEGLIGIBLE = 1e-6
BEFORE_EXPORT = (
    ("pretrain", "student", "checkpoint"), ("pretrain", "teacher", "checkpoint"), ("teach", "", "checkpoint"),
    ("pseudo_label", "", "tables"), ("distill", "", "checkpoint"), ("quantize", "", "checkpoint"),
)  # fmt: skip
"""Steps between `validate_data` and `export`, and the folder of each that later steps read."""


@dataclass(frozen=True)
class Known:
    """An engine to be made: classes its INT8 form finds, whether that form is one, and what it calls its classes."""

    finds: Sequence[str]
    quantized: bool = True
    class_names: Sequence[str] = ()


def publish_before_export(terminal: Terminal, run: str) -> None:
    """Empty work in place of all that would be trained: the gate reads none of it, and `register` only copies it."""
    workspace = Workspace(terminal.workspace)
    for step, part, folder in BEFORE_EXPORT:
        key = RunKeys(workspace, workspace.read_run(run)).of(step, part).key
        output = workspace.partial_directory(step, key) / "output" / folder
        output.mkdir(parents=True)
        (output / "untrained.txt").write_text(f"{step}\n")  # student and teacher have one key here: equal content
        workspace.publish(step, key, _manifest(step, part, key, {}))


def publish_export(terminal: Terminal, run: str, engine: Known, mark: int) -> dict[str, Any]:
    """The engine as what `export` made, under the key of a parameter without effect; gives that parameter for `start`.

    mark: tells engines apart.
    """
    workspace = Workspace(terminal.workspace)
    frozen = workspace.read_run(run)
    frozen["parameters"]["export"]["nms_sweeps"] = mark
    key = RunKeys(workspace, frozen).of("export").key
    target = terminal.published(run, "validate_data") / "target"
    output = workspace.partial_directory("export", key) / "output" / "engine"
    output.mkdir(parents=True)
    _write_engine(output, read_dataset(target).split("test"), terminal.data / "target", engine)
    summary = {"int8_box_error_mean_px": 0.0, "int8_confident_anchors": 1}
    workspace.publish("export", key, _manifest("export", "", key, summary))
    return {"export.nms_sweeps": mark}


def _manifest(step: str, part: str, key: str, summary: dict[str, Any]) -> dict[str, Any]:
    return {
        "schema_version": 1, "step": step, "part": part, "key": key, "key_content": {}, "summary": summary,
        "made_by_run": "a test", "code_version": "a test",
    }  # fmt: skip


def _write_engine(folder: Path, images: ImageSet, root: Path, engine: Known) -> None:
    names = images.class_names
    answers = _answers(images, root)
    known = np.array([name in engine.finds for name in names], np.float32)
    _write_onnx(folder / "model.onnx", answers, known, engine.quantized)
    _write_onnx(folder / "model.float.onnx", answers, np.ones_like(known), quantized=False)
    content = {
        "schema_version": 1, "variant": "pico", "class_names": list(engine.class_names or names),
        "preprocessing": PREPROCESSING.to_json(), "score_threshold": 0.25, "iou_threshold": 0.7,
        "lineage": {
            "weights": ["random initialisation"], "annotations": ["CC0-1.0"], "images": {"target": {"CC BY 4.0": 24}}
        },
    }  # fmt: skip
    (folder / "engine.json").write_text(json.dumps(content))


@dataclass(frozen=True)
class _Answers:
    """Of N pictures: sum of the bytes (1, N), boxes in input pixels (N, A * 4), and scores (N, A, C)."""

    sums: NDArray[np.int64]
    boxes: NDArray[np.float32]
    scores: NDArray[np.float32]


def _answers(images: ImageSet, root: Path) -> _Answers:
    open_image = make_open_image({"target": root})
    most = int(images.box_counts.max())
    sums = np.zeros((1, len(images)), np.int64)
    boxes = np.zeros((len(images), most, 4), np.float32)
    scores = np.zeros((len(images), most, len(images.class_names)), np.float32)
    for row in range(len(images)):
        pixels, letterbox = PREPROCESSING.apply(open_image(images.path(row)))
        labelled = images.subset([row]).all_boxes()
        count = len(labelled.labels)
        sums[0, row] = int(pixels.sum(dtype=np.int64))
        boxes[row, :count] = letterbox.to_input(labelled.boxes_xyxy)
        scores[row, np.arange(count), labelled.labels] = SCORE
    assert len(np.unique(sums)) == len(images) and sums.max() < 2**24, "a picture is known by its sum, exact in float"
    return _Answers(sums, boxes.reshape(len(images), -1), scores)


def _write_onnx(file: Path, answers: _Answers, known: NDArray[np.float32], quantized: bool) -> None:
    _, anchors, classes = answers.scores.shape
    constants: dict[str, Any] = {
        "axes": np.array([1, 2, 3]), "sums": answers.sums, "boxes": answers.boxes,
        "answers": (answers.scores * known).reshape(len(answers.scores), -1),
        "boxes_shape": np.array([-1, anchors, 4]), "scores_shape": np.array([-1, anchors, classes]),
        "column": np.array([-1, 1]), "cell": np.array([-1, 1, 1]), "fraction": np.array(1 / 255, np.float32),
        "negligible": np.array(NEGLIGIBLE, np.float32), "kernel": np.full((4, 3, 3, 3), 64, np.int8),
        "kernel_scale": np.full(4, 0.01, np.float32), "kernel_zero": np.zeros(4, np.int8),
        "scale": np.array(1 / 127, np.float32), "zero": np.array(0, np.int8),
    }  # fmt: skip
    nodes = [
        helper.make_node("Cast", ["images"], ["float"], to=TensorProto.FLOAT),
        *_recognise(),
        *_convolution(quantized),
        helper.make_node("ReduceMean", ["seen", "axes"], ["mean"], keepdims=0),
        helper.make_node("Mul", ["mean", "negligible"], ["little"]),
        helper.make_node("Reshape", ["little", "cell"], ["nothing"]),
        helper.make_node("Add", ["found_scores", "nothing"], ["scores"]),
    ]
    tensors = [numpy_helper.from_array(array, name) for name, array in constants.items()]
    images = helper.make_tensor_value_info("images", TensorProto.UINT8, ["batch", 3, 64, 64])
    outputs = [
        helper.make_tensor_value_info("boxes_xyxy", TensorProto.FLOAT, ["batch", anchors, 4]),
        helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["batch", anchors, classes]),
    ]
    graph = helper.make_graph(nodes, "known", [images], outputs, tensors)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), file)


def _recognise() -> list[onnx.NodeProto]:
    """Boxes (B, A, 4) and scores (B, A, C) of the picture whose sum this is; zeros for another picture."""
    return [
        helper.make_node("ReduceSum", ["float", "axes"], ["sum"], keepdims=0),
        helper.make_node("Cast", ["sum"], ["whole"], to=TensorProto.INT64),
        helper.make_node("Reshape", ["whole", "column"], ["of_each"]),
        helper.make_node("Equal", ["of_each", "sums"], ["equal"]),
        helper.make_node("Cast", ["equal"], ["which"], to=TensorProto.FLOAT),
        helper.make_node("MatMul", ["which", "boxes"], ["flat_boxes"]),
        helper.make_node("Reshape", ["flat_boxes", "boxes_shape"], ["boxes_xyxy"]),
        helper.make_node("MatMul", ["which", "answers"], ["flat_scores"]),
        helper.make_node("Reshape", ["flat_scores", "scores_shape"], ["found_scores"]),
    ]


def _convolution(quantized: bool) -> list[onnx.NodeProto]:
    weights = helper.make_node("DequantizeLinear", ["kernel", "kernel_scale", "kernel_zero"], ["weights"], axis=0)
    start = [
        helper.make_node("Mul", ["float", "fraction"], ["scaled"]),
        helper.make_node("Relu", ["scaled"], ["positive"]),
    ]
    pair = [
        helper.make_node("QuantizeLinear", ["positive", "scale", "zero"], ["rounded"]),
        helper.make_node("DequantizeLinear", ["rounded", "scale", "zero"], ["input"]),
    ]
    source = "input" if quantized else "positive"
    convolution = helper.make_node("Conv", [source, "weights"], ["seen"], kernel_shape=[3, 3], pads=[1, 1, 1, 1])
    return [*start, *(pair if quantized else []), weights, convolution]
