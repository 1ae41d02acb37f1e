"""ONNX Runtime: the numerical reference, and the float fallback where OpenVINO is not wanted.

With its graph optimisations off it computes a Q/DQ file literally, operator by operator. It is no INT8 engine for the
signed file: on x86 its optimiser turns the convolutions into float ones between Q/DQ pairs (1.31, seen in the optimised
graph), which computes the same and saves nothing. ``precision`` says so.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from model.engines import INPUT_NAME, OUTPUT_NAMES, EngineOutput, check_images, run_in_batches
from model.engines.detector_file import load_detector
from model.onnx_file import fixed_batch, load_onnx

if TYPE_CHECKING:
    import onnx

INTEGER_CONVOLUTIONS = frozenset({"QLinearConv", "ConvInteger"})


class OnnxRuntimeEngine:
    """An exported file in ONNX Runtime on the CPU; ``optimise=False`` is the reference setting."""

    name = "onnxruntime"
    runtime_version: str = onnxruntime.__version__

    def __init__(self, path: Path, threads: int = 0, *, optimise: bool = True) -> None:
        """Open the file; ValueError for one that is no exported detector or that ONNX Runtime does not read."""
        proto = load_detector(path)
        self.threads = threads
        with tempfile.TemporaryDirectory(prefix="nasline-optimised-") as scratch:
            optimised = Path(scratch, "optimised.onnx") if optimise and _is_quantized(proto) else None
            self._session = _open(path, _options(threads, optimise, optimised))
            self.precision = _precision(proto if optimised is None else load_onnx(optimised))
        self._input_size = int(self._session.get_inputs()[0].shape[2])
        self.fixed_batch = fixed_batch(proto)

    def run(self, images: NDArray[np.uint8]) -> EngineOutput:
        """Boxes (xyxy, input pixels) and scores, float32; batch by batch where the file's batch size is fixed."""
        check_images(images, self._input_size)
        return self._run(images) if self.fixed_batch is None else run_in_batches(self._run, images, self.fixed_batch)

    def _run(self, images: NDArray[np.uint8]) -> EngineOutput:
        boxes_xyxy, scores = self._session.run(list(OUTPUT_NAMES), {INPUT_NAME: images})
        return boxes_xyxy, scores


def _open(path: Path, options: onnxruntime.SessionOptions) -> onnxruntime.InferenceSession:
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # the runtime's own exception types are not part of its public interface
        raise ValueError(f"ONNX Runtime cannot read {path}: {error}") from error


def _options(threads: int, optimise: bool, optimised: Path | None) -> onnxruntime.SessionOptions:
    """optimised: where to write the graph that will run."""
    levels = onnxruntime.GraphOptimizationLevel
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimise else levels.ORT_DISABLE_ALL
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    if optimised is not None:
        options.optimized_model_filepath = str(optimised)
    return options


def _precision(executed: onnx.ModelProto) -> str:
    """As ``Engine.precision``, of the graph that runs."""
    if any(node.op_type in INTEGER_CONVOLUTIONS for node in executed.graph.node):
        return "int8"
    return "simulated int8" if _is_quantized(executed) else "float32"


def _is_quantized(proto: onnx.ModelProto) -> bool:
    return any(node.op_type == "QuantizeLinear" for node in proto.graph.node)
