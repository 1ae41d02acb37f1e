"""ONNX Runtime: the numerical reference, and the float fallback where OpenVINO is not wanted.

With its graph optimisations off it computes a Q/DQ file literally, operator by operator. It is no fast INT8 engine for
the signed file: without VNNI it was measured slower than in float.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from model.engines import EngineOutput, check_images, run_in_batches


class OnnxRuntimeEngine:
    """An exported file in ONNX Runtime on the CPU; ``optimise=False`` is the reference setting."""

    name = "onnxruntime"
    runtime_version: str = onnxruntime.__version__

    def __init__(self, path: Path, threads: int = 0, *, optimise: bool = True) -> None:
        self.threads = threads
        try:
            self._session = onnxruntime.InferenceSession(
                str(path), _options(threads, optimise), providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # the runtime's own exception types are not part of its public interface
            raise ValueError(f"ONNX Runtime cannot read {path}: {error}") from error
        self.precision = _precision(path)
        shape = self._session.get_inputs()[0].shape
        self._input_size = int(shape[2])
        self._batch = shape[0] if isinstance(shape[0], int) else None  # a free one has a name

    def run(self, images: NDArray[np.uint8]) -> EngineOutput:
        """Boxes (xyxy, input pixels) and scores, float32; batch by batch where the file's batch size is fixed."""
        check_images(images, self._input_size)
        return self._run(images) if self._batch is None else run_in_batches(self._run, images, self._batch)

    def _run(self, images: NDArray[np.uint8]) -> EngineOutput:
        boxes_xyxy, scores = self._session.run(["boxes_xyxy", "scores"], {"images": images})
        return boxes_xyxy, scores


def _options(threads: int, optimise: bool) -> onnxruntime.SessionOptions:
    levels = onnxruntime.GraphOptimizationLevel
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimise else levels.ORT_DISABLE_ALL
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return options


def _precision(path: Path) -> str:
    import onnx

    proto = onnx.load(path)
    quantized = any(node.op_type == "QuantizeLinear" for node in proto.graph.node)
    return "int8" if quantized else "float32"
