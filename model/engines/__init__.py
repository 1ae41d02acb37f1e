"""Engines: one interface over the runtimes that can run an exported detector.

Legend: B batch, S input side in pixels, A anchors, C classes. An engine takes the letterboxed bytes and gives boxes in
input pixels; pre-processing and non-maximum suppression are the caller's, the same for every runtime.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal, Protocol, get_args

import numpy as np
from jaxtyping import Float32, UInt8
from numpy.typing import NDArray

__all__ = [
    "INPUT_NAME",
    "OUTPUT_NAMES",
    "Engine",
    "EngineOutput",
    "MissingRuntimeError",
    "Runtime",
    "check_images",
    "load_engine",
    "run_in_batches",
]

Runtime = Literal["openvino", "onnxruntime", "tensorrt", "torch"]
EngineOutput = tuple[Float32[NDArray[np.float32], "B A 4"], Float32[NDArray[np.float32], "B A C"]]

INPUT_NAME, OUTPUT_NAMES = "images", ("boxes_xyxy", "scores")
ONNX_FILE = "model.onnx"
OPENVINO_FILE = "model.xml"
TENSORRT_FILE = "model.plan"


class MissingRuntimeError(ValueError):
    """The machine or installation lacks a runtime's device or package; the message says which, and a remedy."""


class Engine(Protocol):
    """A detector ready to run.

    name: the runtime. runtime_version: its version. precision: that of the convolutions, "int8" if any is, else
    "float16" or "float32"; "simulated int8" where a quantized network is computed in float (torch, ONNX Runtime).
    threads: 0 means the runtime's own choice.
    """

    name: str
    runtime_version: str
    precision: str
    threads: int

    @property
    def fixed_batch(self) -> int | None:
        """Images that every call of the network computes, where it takes no other number; None: as many as given.

        Fewer are filled up with black ones, more run in several calls.
        """
        ...

    def run(self, images: UInt8[NDArray[np.uint8], "B 3 S S"]) -> EngineOutput:
        """Boxes (xyxy, input pixels) and scores of RGB images; ValueError for images of another kind."""
        ...


def load_engine(path: str | Path, runtime: Runtime = "openvino", threads: int = 0) -> Engine:
    """Load an engine directory or a file with the given runtime; ValueError says what is missing or unreadable.

    openvino: ``model.xml`` where there is one, else ``model.onnx``, which is prepared as ``build_openvino`` does.
    onnxruntime: ``model.onnx``. tensorrt: ``model.plan`` where there is one, else ``model.onnx``, which is built for
    the GPU at hand first (minutes; the plan is kept in the user's cache). torch: a checkpoint directory, float or
    quantized. A file of any of these names works too, whatever it is called. MissingRuntimeError, a ValueError, says
    which device or package is not there.
    """
    if threads < 0:
        raise ValueError(f"threads must be 0 (the runtime's choice) or more, got {threads}")
    path = Path(path)
    if runtime == "openvino":
        from model.engines.openvino_engine import OpenVINOEngine

        return OpenVINOEngine.from_file(_model_file(path, (OPENVINO_FILE, ONNX_FILE)), threads)
    if runtime == "onnxruntime":
        from model.engines.onnxruntime_engine import OnnxRuntimeEngine

        return OnnxRuntimeEngine(_model_file(path, (ONNX_FILE,)), threads)
    if runtime == "tensorrt":
        from model.engines.tensorrt_engine import TensorRTEngine

        return TensorRTEngine.from_file(_model_file(path, (TENSORRT_FILE, ONNX_FILE)))
    if runtime == "torch":
        from model.engines.torch_engine import TorchEngine

        return TorchEngine.from_checkpoint(path, threads)
    raise ValueError(f"unknown runtime {runtime!r}; choose one of {', '.join(get_args(Runtime))}")


def check_images(images: NDArray[np.uint8], input_size: int) -> None:
    """Raise ValueError unless this is a batch of RGB byte images of the engine's input size."""
    if images.ndim != 4 or images.shape[1:] != (3, input_size, input_size) or images.dtype != np.uint8:
        expected = f"uint8 (B, 3, {input_size}, {input_size})"
        raise ValueError(f"the engine takes images as {expected}, got {images.dtype} {images.shape}")


def run_in_batches(
    run: Callable[[NDArray[np.uint8]], EngineOutput], images: NDArray[np.uint8], batch: int
) -> EngineOutput:
    """Run an engine that takes exactly ``batch`` images at once; the last batch is filled with black ones."""
    missing = -len(images) % batch
    filled = np.concatenate([images, np.zeros((missing, *images.shape[1:]), np.uint8)]) if missing else images
    results = [run(np.ascontiguousarray(filled[start : start + batch])) for start in range(0, len(filled), batch)]
    boxes_xyxy, scores = (np.concatenate(parts)[: len(images)] for parts in zip(*results, strict=True))
    return boxes_xyxy, scores


def _model_file(path: Path, names: tuple[str, ...]) -> Path:
    if path.is_file():
        suffixes = {Path(name).suffix for name in names}
        if path.suffix not in suffixes:
            raise ValueError(f"{path} is not a model this runtime reads (expected {' or '.join(sorted(suffixes))})")
        return path
    for name in names:
        if (path / name).is_file():
            return path / name
    raise ValueError(f"no engine at {path}: expected {' or '.join(names)} there")
