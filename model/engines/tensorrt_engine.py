"""TensorRT: the engine on NVIDIA GPUs. The package is an extra (``nasline[tensorrt]``) and imported only here.

A plan belongs to one GPU and one exact version of TensorRT (``tensorrt_build`` makes it on the target). Running it:
images are copied to pinned memory, from there to the device, the network runs, results come back the same way, all on
one stream; the device is waited for once. Memory is taken once, for the largest batch. ``device_ms`` is the time
between two CUDA events around the network alone, without the copies.

With ``cuda_graph`` the launches of one batch size are recorded once and replayed, which spares the CPU one call per
kernel; a small network on a fast GPU is otherwise bound by those calls.
"""

from __future__ import annotations

import importlib
import json
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from model.engines import INPUT_NAME, OUTPUT_NAMES, EngineOutput, MissingRuntimeError, check_images
from model.engines.cuda import INSTALL, Cuda

BUILD_FILE = "build.json"
NEEDED_OF_BUILD = ("runtime_version", "gpu", "precision")
"""Fields of ``build.json`` without which a plan is not opened."""
OLDEST_VERSION = (10, 16)


def load_tensorrt() -> Any:
    """The module ``tensorrt``; MissingRuntimeError when it is not installed, broken or too old."""
    try:
        tensorrt = importlib.import_module("tensorrt")
    except ImportError as error:
        raise MissingRuntimeError(
            f"TensorRT cannot be imported ({error}); on a machine with an NVIDIA GPU install it with {INSTALL} from "
            "NVIDIA's package index, as docs/tensorrt.md describes"
        ) from None
    version = tuple(int(part) for part in tensorrt.__version__.split(".")[:2])
    if version < OLDEST_VERSION:
        needed = ".".join(map(str, OLDEST_VERSION))
        raise MissingRuntimeError(f"TensorRT {tensorrt.__version__} is too old, {needed} or newer is needed: {INSTALL}")
    return tensorrt


@dataclass(frozen=True)
class _Buffer:
    """One input or output: pinned memory for the largest batch and its place on the device."""

    host: NDArray[Any]
    host_address: int
    device_address: int

    @property
    def bytes_per_image(self) -> int:
        return int(self.host[:1].nbytes)


class TensorRTEngine:
    """A plan ready to run on the first visible GPU. Not for several threads at once."""

    name = "tensorrt"
    threads = 0

    def __init__(self, plan: bytes, precision: str, *, cuda_graph: bool = False) -> None:
        """Open a plan; ``precision`` is what its build found.

        Raises MissingRuntimeError without a GPU or the packages, ValueError for a plan that does not fit them.
        """
        tensorrt = load_tensorrt()
        self._cuda = Cuda()
        self.runtime_version: str = tensorrt.__version__
        self.precision = precision
        self.device_ms: float | None = None
        self._tensorrt, self._with_graph = tensorrt, cuda_graph
        self._logger = tensorrt.Logger(tensorrt.Logger.WARNING)
        self._runtime = tensorrt.Runtime(self._logger)
        self._engine = self._runtime.deserialize_cuda_engine(plan)
        if self._engine is None:
            raise ValueError(
                f"TensorRT {self.runtime_version} cannot read this plan; it was built for another GPU or by another "
                "version: build it again from model.onnx on this machine"
            )
        self._context = self._engine.create_execution_context()
        self.batch, self._input_size = self._largest_input()
        self._stream = self._cuda.call("cudaStreamCreate")
        self._start, self._end = (self._cuda.call("cudaEventCreate") for _ in range(2))
        self._buffers = {name: self._buffer(name) for name in (INPUT_NAME, *OUTPUT_NAMES)}
        self._graphs: dict[int, Any] = {}
        self._images = 0  # batch size that the context is set to
        self._closer = weakref.finalize(self, _free, self._cuda, self._releases())

    @classmethod
    def from_file(cls, path: Path, *, cuda_graph: bool = False) -> TensorRTEngine:
        """Open a plan with the ``build.json`` beside it, or an ONNX file, which is built first unless it was before.

        Raises ValueError when the plan's ``build.json`` is missing, lacks a field or names another version of TensorRT.
        """
        if path.suffix == ".onnx":
            from model.engines.tensorrt_build import build_cached

            path = build_cached(path)
        version, gpu, precision = _told_of(path)
        here = load_tensorrt().__version__
        if version != here:
            raise ValueError(
                f"{path} was built by TensorRT {version} on {gpu}, here is {here}; build it again from model.onnx"
            )
        return cls(path.read_bytes(), precision, cuda_graph=cuda_graph)

    @property
    def fixed_batch(self) -> int | None:
        """The plan's batch where it was built for one alone; None where it takes any up to ``batch``."""
        return None if self._is_free else self.batch

    def run(self, images: NDArray[np.uint8]) -> EngineOutput:
        """Boxes (xyxy, input pixels) and scores, float32; no more images at once than the plan takes.

        ``device_ms`` is the sum over these batches afterwards.
        """
        check_images(images, self._input_size)
        chunks = [images[start : start + self.batch] for start in range(0, len(images), self.batch)]
        results, times = [], []
        for chunk in chunks:
            results.append(self._run(chunk))
            times.append(float(self._cuda.call("cudaEventElapsedTime", self._start, self._end)))
        self.device_ms = sum(times)
        boxes_xyxy, scores = (np.concatenate(parts) for parts in zip(*results, strict=True))
        return boxes_xyxy, scores

    def information(self) -> str:
        """The engine inspector's JSON; types of tensors are told only for known shapes, so the largest batch is set."""
        self._set_batch(self.batch)
        inspector = self._engine.create_engine_inspector()
        inspector.execution_context = self._context
        text: str = inspector.get_engine_information(self._tensorrt.LayerInformationFormat.JSON)
        return text

    def close(self) -> None:
        """Give the memory back now; the engine cannot run any more."""
        self._closer()

    def _run(self, images: NDArray[np.uint8]) -> EngineOutput:
        count = len(images)
        filled = count if self._is_free else self.batch
        self._set_batch(filled)
        self._buffers[INPUT_NAME].host[:count] = images
        self._copy(INPUT_NAME, filled, "cudaMemcpyHostToDevice")
        self._execute(filled)
        for name in OUTPUT_NAMES:
            self._copy(name, filled, "cudaMemcpyDeviceToHost")
        self._cuda.call("cudaStreamSynchronize", self._stream)
        boxes_xyxy, scores = (self._buffers[name].host[:count].astype(np.float32, copy=True) for name in OUTPUT_NAMES)
        return boxes_xyxy, scores

    def _set_batch(self, count: int) -> None:
        if count == self._images:
            return
        shape = (count, 3, self._input_size, self._input_size)
        if not self._context.set_input_shape(INPUT_NAME, shape):
            raise RuntimeError(f"the engine refuses images of shape {shape}")
        for name, buffer in self._buffers.items():
            self._context.set_tensor_address(name, buffer.device_address)
        self._images = count

    def _copy(self, name: str, count: int, direction: str) -> None:
        buffer = self._buffers[name]
        ends = [buffer.device_address, buffer.host_address]
        target, source = ends if direction == "cudaMemcpyHostToDevice" else reversed(ends)
        kind = getattr(self._cuda.runtime.cudaMemcpyKind, direction)
        self._cuda.call("cudaMemcpyAsync", target, source, count * buffer.bytes_per_image, kind, self._stream)

    def _execute(self, count: int) -> None:
        """The network between two events: launched, or replayed where its graph was recorded."""
        graph = self._graph(count) if self._with_graph else None
        self._cuda.call("cudaEventRecord", self._start, self._stream)
        if graph is None:
            self._launch()
        else:
            self._cuda.call("cudaGraphLaunch", graph, self._stream)
        self._cuda.call("cudaEventRecord", self._end, self._stream)

    def _launch(self) -> None:
        if not self._context.execute_async_v3(int(self._stream)):
            raise RuntimeError("TensorRT could not start the network; its log says why")

    def _graph(self, count: int) -> Any:
        if count not in self._graphs:
            self._launch()  # the first launch after a change of shape does work that cannot be recorded
            mode = self._cuda.runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
            self._cuda.call("cudaStreamBeginCapture", self._stream, mode)
            self._launch()
            recorded = self._cuda.call("cudaStreamEndCapture", self._stream)
            self._graphs[count] = self._cuda.call("cudaGraphInstantiate", recorded, 0)
            self._cuda.call("cudaGraphDestroy", recorded)
        return self._graphs[count]

    def _largest_input(self) -> tuple[int, int]:
        """Largest batch and input side; ValueError for an engine with other inputs or outputs than a detector's."""
        names = {self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)}
        if names != {INPUT_NAME, *OUTPUT_NAMES}:
            raise ValueError(f"the plan has the inputs and outputs {', '.join(sorted(names))}, which is no detector's")
        shape = tuple(self._engine.get_tensor_shape(INPUT_NAME))
        self._is_free = shape[0] < 0
        largest = tuple(self._engine.get_tensor_profile_shape(INPUT_NAME, 0)[2]) if self._is_free else shape
        return int(largest[0]), int(shape[2])

    def _buffer(self, name: str) -> _Buffer:
        dtype = np.dtype(self._tensorrt.nptype(self._engine.get_tensor_dtype(name)))
        shape = (self.batch, *tuple(self._engine.get_tensor_shape(name))[1:])
        host, address = self._cuda.host_array(shape, dtype)
        return _Buffer(host, address, int(self._cuda.call("cudaMalloc", host.nbytes)))

    def _releases(self) -> Callable[[], list[tuple[str, Any]]]:
        """What to free, asked for when it is freed, since graphs come later; holds no reference to the engine."""
        graphs, buffers = self._graphs, list(self._buffers.values())
        stream, events = self._stream, (self._start, self._end)

        def releases() -> list[tuple[str, Any]]:
            return [
                *(("cudaGraphExecDestroy", graph) for graph in graphs.values()),
                *(("cudaFree", buffer.device_address) for buffer in buffers),
                *(("cudaFreeHost", buffer.host_address) for buffer in buffers),
                *(("cudaEventDestroy", event) for event in events),
                ("cudaStreamDestroy", stream),
            ]

        return releases


def _told_of(plan: Path) -> tuple[str, ...]:
    """What ``build.json`` tells of a plan, in the order of ``NEEDED_OF_BUILD``."""
    file = plan.parent / BUILD_FILE
    try:
        report = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{plan} has no {BUILD_FILE} beside it; build it again from model.onnx") from None
    except ValueError as error:  # no JSON, or no text
        raise ValueError(f"{file} cannot be read ({error}); build the plan again from model.onnx") from None
    for name in NEEDED_OF_BUILD:
        value = report.get(name) if isinstance(report, dict) else None
        if not isinstance(value, str):
            found = "it is missing" if value is None else f"it is {value!r}"
            raise ValueError(f"{file}: {name} must be a text, but {found}; build the plan again from model.onnx")
    return tuple(report[name] for name in NEEDED_OF_BUILD)


def _free(cuda: Cuda, releases: Callable[[], list[tuple[str, Any]]]) -> None:
    for name, handle in releases():
        cuda.call(name, handle)
