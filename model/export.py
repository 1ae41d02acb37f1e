"""Export of a folded network, float or quantized, to one ONNX file that every runtime reads.

The file: opset 20; input ``images`` uint8 (N, 3, S, S) RGB, N free unless it is fixed, divided by 255 inside; outputs
``boxes_xyxy`` float32 (N, A, 4) in input pixels and ``scores`` float32 (N, A, C). Non-maximum suppression stays
outside, so that all runtimes share one. A quantized layer is written as QuantizeLinear/DequantizeLinear pairs on its
input and its weight; what has no pair runs in float. Box decoding is float32 always.

A JSON object in the file's metadata (key ``nasline``) says what the file needs to be used alone. ``model.onnx_half``
and ``model.onnx_suppression`` make further forms of the file.
"""

from __future__ import annotations

import contextlib
import copy
import json
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from model.onnx_file import METADATA_KEY, METADATA_SCHEMA_VERSION, fix_batch, write_onnx
from model.onnx_structure import convolutions
from model.preprocessing import Preprocessing
from model.quantization.quantize import freeze, precision_per_layer
from model.yolo_nas import YoloNAS

if TYPE_CHECKING:
    import onnx

OPSET = 20  # the first with everything a later conversion to FP16 scales needs (19) that every runtime here reads
INPUT_NAME = "images"
OUTPUT_NAMES = ("boxes_xyxy", "scores")
TRACING_BATCH = 2  # a traced batch of one would be taken for a constant


class UInt8Detector(nn.Module):
    """The network behind the interface of an engine: bytes in, boxes and scores out.

    Legend: N batch, S input side in pixels, A anchors, C classes.
    """

    def __init__(self, network: YoloNAS) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: UInt8[Tensor, "N 3 S S"]) -> tuple[Float[Tensor, "N A 4"], Float[Tensor, "N A C"]]:
        """Boxes (xyxy, input pixels) and scores (after sigmoid)."""
        decoded, _ = self.network(images.to(torch.float32) / 255)
        boxes_xyxy, scores = decoded
        return boxes_xyxy, scores


def export_onnx(
    model: YoloNAS,
    path: Path,
    *,
    preprocessing: Preprocessing,
    class_names: Sequence[str],
    extra_metadata: Mapping[str, Any] | None = None,
    batch: int | None = None,
) -> None:
    """Write a folded network, float or quantized, as ONNX; the given model is left as it is.

    extra_metadata: JSON values added to the metadata; they may not replace its own keys. batch: the only batch size the
    file shall take; None leaves it free.
    Raises ValueError for a network that is not folded or whose class count differs from ``class_names``.
    """
    if not model.fused:
        raise ValueError("only a folded network can be exported: call fuse() first")
    if model.num_classes != len(class_names):
        raise ValueError(f"the network has {model.num_classes} classes but {len(class_names)} class names were given")
    detector = UInt8Detector(copy.deepcopy(model)).eval().cpu().requires_grad_(False)
    freeze(detector)
    proto = _trace(detector, preprocessing.input_size)
    _clean(proto)
    metadata = _metadata(model, preprocessing, class_names, extra_metadata or {})
    _finish(proto if batch is None else fix_batch(proto, batch), metadata, path)


def _trace(detector: UInt8Detector, input_size: int) -> onnx.ModelProto:
    example = torch.zeros(TRACING_BATCH, 3, input_size, input_size, dtype=torch.uint8)
    with quiet_exporter(), _fake_quantize_shapes():
        program = torch.onnx.export(
            detector,
            (example,),
            dynamo=True,
            opset_version=OPSET,
            input_names=[INPUT_NAME],
            output_names=list(OUTPUT_NAMES),
            dynamic_shapes={"images": {0: torch.export.Dim("batch", min=1)}},
            verbose=False,
        )
    assert program is not None
    return program.model_proto


def _clean(proto: onnx.ModelProto) -> None:
    """Name the convolutions after their layers and drop the exporter's stack traces, which hold machine paths."""
    for layer, node in convolutions(proto).items():
        node.name = layer
    for node in proto.graph.node:
        del node.metadata_props[:]
        node.doc_string = ""
    for value in [*proto.graph.input, *proto.graph.output, *proto.graph.initializer]:
        del value.metadata_props[:]
        value.doc_string = ""
    del proto.graph.value_info[:], proto.graph.metadata_props[:], proto.metadata_props[:]
    proto.graph.name = METADATA_KEY


def _metadata(
    model: YoloNAS, preprocessing: Preprocessing, class_names: Sequence[str], extra: Mapping[str, Any]
) -> dict[str, Any]:
    own: dict[str, Any] = {
        "schema_version": METADATA_SCHEMA_VERSION,
        "variant": model.architecture.variant,
        "class_names": list(class_names),
        "preprocessing": preprocessing.to_json(),
        "precision": precision_per_layer(model),
    }
    taken = sorted(set(own) & set(extra))
    if taken:
        raise ValueError(f"extra_metadata may not replace {', '.join(taken)}")
    return {**own, **extra}


def _finish(proto: onnx.ModelProto, metadata: Mapping[str, Any], path: Path) -> None:
    from onnx import helper

    helper.set_model_props(proto, {METADATA_KEY: json.dumps(metadata, sort_keys=True)})
    write_onnx(proto, path)


@contextlib.contextmanager
def _fake_quantize_shapes() -> Iterator[None]:
    """Tell the tracer what shape rounding gives: torch has no answer for a free batch size.

    Without this torch.export raises UnsupportedOperatorException (torch 2.13). The registration lasts as long as the
    library object, hence the block.
    """

    def same_shape(values: Tensor, *_: object) -> tuple[Tensor, Tensor]:
        return torch.empty_like(values), torch.empty_like(values, dtype=torch.bool)

    library = torch.library.Library("aten", "IMPL")  # type: ignore[no-untyped-call]
    for granularity in ("tensor", "channel"):
        library.impl(f"fake_quantize_per_{granularity}_affine_cachemask", same_shape, "Meta")  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        del library


@contextlib.contextmanager
def quiet_exporter() -> Iterator[None]:
    """Silence what the exporter says about optional packages and its own internals; errors still come through."""
    exporter_log = logging.getLogger("torch.onnx")
    level = exporter_log.level
    exporter_log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            warnings.simplefilter("ignore", FutureWarning)
            warnings.filterwarnings("ignore", message="# The axis name", category=UserWarning)
            yield
    finally:
        exporter_log.setLevel(level)
