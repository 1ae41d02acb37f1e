"""Non-maximum suppression inside an exported file, on request; the file it is made from stays as it is.

static: ``model.suppression`` in the graph. Fixed shapes, plain operators, so every runtime takes it. Outputs
``detection_boxes_xyxy`` float32 (N, M, 4) in input pixels, ``detection_scores`` (N, M), ``detection_labels`` int64
(N, M), best first, then rows of 0, 0 and -1, and ``detection_counts`` int64 (N,).

onnx: the operator NonMaxSuppression. As many rows as there are detections: ``detection_images`` int64 (n,) with the
place in the batch, ``detection_boxes_xyxy`` (n, 4), ``detection_scores`` (n,) and ``detection_labels`` (n,), image by
image, in it class by class, best first. Every score above the threshold is a candidate, and ``max_detections`` holds
for each class of an image apart: the operator has no other limits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from model.boxes import postprocess
from model.export import OPSET, OUTPUT_NAMES, TRACING_BATCH, quiet_exporter
from model.onnx_file import fixed_batch
from model.suppression import StaticSuppression, SuppressionConfig

if TYPE_CHECKING:
    import onnx

SuppressionKind = Literal["static", "onnx"]
STATIC_OUTPUTS = ("detection_boxes_xyxy", "detection_scores", "detection_labels", "detection_counts")
ONNX_OUTPUTS = ("detection_images", "detection_boxes_xyxy", "detection_scores", "detection_labels")
PREFIX = "suppression/"


@dataclass(frozen=True)
class SuppressionReport:
    """differing: places of the images with other detections than outside. detections: how many were found in all."""

    differing: tuple[int, ...]
    detections: int


def add_suppression(
    proto: onnx.ModelProto, kind: SuppressionKind, config: SuppressionConfig, *, keep_raw_outputs: bool = False
) -> onnx.ModelProto:
    """Copy of an exported graph that ends in detections; with ``keep_raw_outputs`` also in boxes and scores.

    Raises ValueError when the graph does not end in ``boxes_xyxy`` and ``scores``.
    """
    from onnx import compose

    anchors, classes = _anchors_and_classes(proto)
    tail = _static_tail(anchors, classes, config) if kind == "static" else _operator_tail(anchors, classes, config)
    tail.ir_version = proto.ir_version
    outputs = [value.name for value in tail.graph.output]
    tail = compose.add_prefix(tail, PREFIX, rename_inputs=True, rename_outputs=False)
    merged = compose.merge_models(
        proto,
        tail,
        io_map=[(name, PREFIX + name) for name in OUTPUT_NAMES],
        outputs=[*(OUTPUT_NAMES if keep_raw_outputs else ()), *outputs],
    )
    merged.graph.name, merged.producer_name = proto.graph.name, proto.producer_name
    merged.producer_version = proto.producer_version
    return merged


def expected_detections(
    boxes_xyxy: NDArray[np.float32], scores: NDArray[np.float32], kind: SuppressionKind, config: SuppressionConfig
) -> list[NDArray[np.float32]]:
    """What ``boxes.postprocess`` finds within the limits of this kind: one array (n, 6) an image."""
    everything = scores.shape[1] * scores.shape[2]
    static = kind == "static"
    tables = [
        postprocess(
            image_boxes,
            image_scores,
            score_threshold=config.score_threshold,
            iou_threshold=config.iou_threshold,
            multi_label=config.multi_label,
            pre_nms_top_k=config.candidates if static else everything,
            max_detections=config.max_detections if static else everything,
        )
        for image_boxes, image_scores in zip(boxes_xyxy, scores, strict=True)
    ]
    return tables if static else [_best_of_each_class(rows, config.max_detections) for rows in tables]


def read_detections(
    outputs: Mapping[str, NDArray[Any]], kind: SuppressionKind, images: int
) -> list[NDArray[np.float32]]:
    """The outputs of a graph with suppression as one array (n, 6) an image: x1, y1, x2, y2, score, label."""
    columns = (outputs["detection_boxes_xyxy"], outputs["detection_scores"], outputs["detection_labels"])
    boxes, scores, labels = (np.asarray(column, dtype=np.float32) for column in columns)
    table = np.concatenate([boxes, scores[..., None], labels[..., None]], axis=-1)
    if kind == "static":
        return [rows[:count] for rows, count in zip(table, outputs["detection_counts"], strict=True)]
    tables = [table[outputs["detection_images"] == index] for index in range(images)]
    return [rows[np.argsort(-rows[:, 4], kind="stable")] for rows in tables]


def differing_images(found: Sequence[NDArray[np.float32]], expected: Sequence[NDArray[np.float32]]) -> tuple[int, ...]:
    """Places of the images whose detections are not the same set; detections of equal score have no order."""
    pairs = enumerate(zip(found, expected, strict=True))
    return tuple(index for index, (ours, theirs) in pairs if not np.array_equal(_sorted(ours), _sorted(theirs)))


def check_suppression(
    proto: onnx.ModelProto, kind: SuppressionKind, config: SuppressionConfig, images: NDArray[np.uint8]
) -> SuppressionReport:
    """Compare a graph with raw outputs, run by ONNX Runtime operator by operator, with suppression outside of it."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    batch = fixed_batch(proto) or 1
    differing: set[int] = set()
    detections = 0
    for start in range(0, len(images), batch):
        places = np.arange(start, start + batch) % len(images)  # the last batch is filled from the front
        answer = session.run(names, {session.get_inputs()[0].name: images[places]})
        outputs = dict(zip(names, answer, strict=True))
        found = read_detections(outputs, kind, batch)
        expected = expected_detections(outputs["boxes_xyxy"], outputs["scores"], kind, config)
        differing.update(int(places[index]) for index in differing_images(found, expected))
        detections += sum(map(len, found))
    return SuppressionReport(tuple(sorted(differing)), detections)


def _best_of_each_class(rows: NDArray[np.float32], most: int) -> NDArray[np.float32]:
    """No more than ``most`` rows of one label; the rows come best first."""
    within = np.zeros(len(rows), dtype=np.bool_)
    for label in np.unique(rows[:, 5]):
        within[np.flatnonzero(rows[:, 5] == label)[:most]] = True
    return rows[within]


def _sorted(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    return rows[np.lexsort(rows.T)]


def _anchors_and_classes(proto: onnx.ModelProto) -> tuple[int, int]:
    shapes = {value.name: value.type.tensor_type.shape.dim for value in proto.graph.output}
    if set(shapes) != set(OUTPUT_NAMES):
        found = ", ".join(shapes)
        raise ValueError(f"suppression needs a graph that ends in {' and '.join(OUTPUT_NAMES)}, this one: {found}")
    return shapes[OUTPUT_NAMES[1]][1].dim_value, shapes[OUTPUT_NAMES[1]][2].dim_value


def _static_tail(anchors: int, classes: int, config: SuppressionConfig) -> onnx.ModelProto:
    example = (torch.zeros(TRACING_BATCH, anchors, 4), torch.zeros(TRACING_BATCH, anchors, classes))
    batch = torch.export.Dim("batch", min=1)
    with quiet_exporter():
        program = torch.onnx.export(
            StaticSuppression(config).eval(),
            example,
            dynamo=True,
            opset_version=OPSET,
            input_names=list(OUTPUT_NAMES),
            output_names=list(STATIC_OUTPUTS),
            dynamic_shapes={"boxes_xyxy": {0: batch}, "scores": {0: batch}},
            verbose=False,
        )
    assert program is not None
    proto = program.model_proto
    for node in proto.graph.node:  # the exporter's stack traces hold machine paths
        del node.metadata_props[:]
        node.doc_string = ""
    for value in [*proto.graph.input, *proto.graph.output, *proto.graph.initializer]:
        del value.metadata_props[:]
    del proto.graph.value_info[:], proto.graph.metadata_props[:], proto.metadata_props[:]
    return proto


def _operator_tail(anchors: int, classes: int, config: SuppressionConfig) -> onnx.ModelProto:
    from onnx import TensorProto, helper

    floats, integers = TensorProto.FLOAT, TensorProto.INT64
    inputs = [
        helper.make_tensor_value_info("boxes_xyxy", floats, ["batch", anchors, 4]),
        helper.make_tensor_value_info("scores", floats, ["batch", anchors, classes]),
    ]
    kinds: dict[str, tuple[int, list[Any]]] = {
        "detection_images": (integers, ["detections"]),
        "detection_boxes_xyxy": (floats, ["detections", 4]),
        "detection_scores": (floats, ["detections"]),
        "detection_labels": (integers, ["detections"]),
    }
    outputs = [helper.make_tensor_value_info(name, *kinds[name]) for name in ONNX_OUTPUTS]
    nodes, constants = _operator_nodes(classes, config)
    graph = helper.make_graph(nodes, "suppression", inputs, outputs, constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)])


def _operator_nodes(classes: int, config: SuppressionConfig) -> tuple[list[onnx.NodeProto], list[onnx.TensorProto]]:
    from onnx import helper, numpy_helper

    # The operator wants more than the threshold; the best class of an anchor passes from the threshold on.
    threshold = np.float32(config.score_threshold)
    least = threshold if config.multi_label else np.nextafter(threshold, np.float32(-1))
    arrays: dict[str, NDArray[Any]] = {
        "most": np.array([config.max_detections], np.int64),
        "iou_threshold": np.array([config.iou_threshold], np.float32),
        "score_threshold": np.array([least], np.float32),
        "classes": np.arange(classes, dtype=np.int64),
        "no_score": np.array(-1, np.float32),
        "image_and_anchor": np.array([0, 2], np.int64),
        "first": np.array(0, np.int64),
        "second": np.array(1, np.int64),
    }
    make = helper.make_node
    candidates = "scores" if config.multi_label else "best_scores"
    best_only = [
        make("ArgMax", ["scores"], ["best_class"], axis=2, keepdims=1),
        make("Equal", ["classes", "best_class"], ["is_best"]),
        make("Where", ["is_best", "scores", "no_score"], ["best_scores"]),
    ]
    nodes = [
        *([] if config.multi_label else best_only),
        make("Transpose", [candidates], ["class_scores"], perm=[0, 2, 1]),
        make(
            "NonMaxSuppression",
            ["boxes_xyxy", "class_scores", "most", "iou_threshold", "score_threshold"],
            ["selected"],  # (n, 3): image, class, anchor
        ),
        make("Gather", ["selected", "first"], ["detection_images"], axis=1),
        make("Gather", ["selected", "second"], ["detection_labels"], axis=1),
        make("Gather", ["selected", "image_and_anchor"], ["selected_anchors"], axis=1),
        make("GatherND", ["boxes_xyxy", "selected_anchors"], ["detection_boxes_xyxy"]),
        make("GatherND", ["class_scores", "selected"], ["detection_scores"]),
    ]
    for place, node in enumerate(nodes):
        node.name = f"{node.op_type}_{place}"
    used = {name for node in nodes for name in node.input}
    return nodes, [numpy_helper.from_array(array, name) for name, array in arrays.items() if name in used]
