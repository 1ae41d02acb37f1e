"""Exported ONNX files as a whole: reading, writing, their metadata, a fixed batch size.

A JSON object in the file's metadata (key ``nasline``) says what the file needs to be used alone.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import onnx

METADATA_KEY = "nasline"
METADATA_SCHEMA_VERSION = 1


def load_onnx(path: Path) -> onnx.ModelProto:
    """The graph in a file; ValueError names a file that is missing, not ONNX or without a graph."""
    import onnx

    try:
        proto = onnx.load(path)
    except FileNotFoundError as error:
        raise ValueError(f"there is no file {path}; `nasline export` writes it") from error
    except Exception as error:  # protobuf's own error types are not part of onnx's interface
        raise ValueError(f"{path} is not a readable ONNX file: {error}") from error
    if not proto.graph.node:  # an empty file is a valid message without content
        raise ValueError(f"{path} ({path.stat().st_size} bytes) holds no graph; export or copy it again")
    return proto


def write_onnx(proto: onnx.ModelProto, path: Path) -> None:
    """Check the graph and write it beside its place first, so that a broken file never stands there."""
    import onnx

    onnx.checker.check_model(proto, full_check=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(proto.SerializeToString(deterministic=True))
    partial.replace(path)


def read_metadata(path: Path) -> dict[str, Any]:
    """The JSON object inside an exported file; ValueError when the file was not exported by this product."""
    import onnx

    proto = onnx.load(path, load_external_data=False)
    for entry in proto.metadata_props:
        if entry.key == METADATA_KEY:
            metadata = json.loads(entry.value)
            assert isinstance(metadata, dict)
            return metadata
    raise ValueError(f"{path} holds no {METADATA_KEY!r} metadata: it was not written by `nasline export`")


def fixed_batch(proto: onnx.ModelProto) -> int | None:
    """The only batch size a graph takes; None when it takes any."""
    first = proto.graph.input[0].type.tensor_type.shape.dim[0]
    return int(first.dim_value) if first.HasField("dim_value") else None


def fix_batch(proto: onnx.ModelProto, batch: int) -> onnx.ModelProto:
    """Copy of a graph with a free batch size that takes exactly ``batch`` images.

    Raises ValueError for a batch below 1, or when the graph is already fixed to another.
    """
    import onnx

    if batch < 1:
        raise ValueError(f"the batch size must be at least 1, got {batch}")
    fixed = onnx.ModelProto()
    fixed.CopyFrom(proto)
    for value in fixed.graph.input:
        first = value.type.tensor_type.shape.dim[0]
        if first.HasField("dim_value") and first.dim_value != batch:
            raise ValueError(f"the file takes batches of {first.dim_value} only, it cannot be fixed to {batch}")
        free_name = first.dim_param
        first.dim_value = batch
        for output in fixed.graph.output:
            for axis in output.type.tensor_type.shape.dim:
                if free_name and axis.dim_param == free_name:
                    axis.dim_value = batch
    del fixed.graph.value_info[:]
    return fixed
