"""Stand-ins for a GPU: a CUDA runtime whose device memory is ordinary memory, a TensorRT that lets ONNX Runtime work.

No machine of ours has a GPU. These doubles show that buffers, shapes, copies, graphs, the cache and the refusals are
right; what a real GPU computes, and how fast, they cannot show. ``test_doubles_have_the_real_interface`` compares their
attributes with those of NVIDIA's bindings.
"""

from __future__ import annotations

import ctypes
import enum
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

from model.onnx_structure import check_graph

GPU_LINE = (
    "Tesla T4, GPU-00000000-0000-0000-0000-000000000000, 535.183.01, 7.5, P0, 15360, 585, 1590, 5000, 44, 26.55, 70, 3"
)


class Error(enum.IntEnum):
    cudaSuccess = 0
    cudaErrorInvalidValue = 1
    cudaErrorInsufficientDriver = 35
    cudaErrorNoDevice = 100


class CopyKind(enum.IntEnum):
    cudaMemcpyHostToDevice = 1
    cudaMemcpyDeviceToHost = 2


class CudaDouble:
    """``cuda.bindings.runtime``: functions return (error, value...)."""

    cudaError_t = Error
    cudaMemcpyKind = CopyKind
    cudaStreamCaptureMode = SimpleNamespace(cudaStreamCaptureModeThreadLocal=1)
    cudaDeviceAttr = SimpleNamespace(cudaDevAttrMultiProcessorCount=16)

    def __init__(self, devices: int = 1, error: Error = Error.cudaSuccess) -> None:
        self.devices, self.error = devices, error
        self.device: dict[int, Any] = {}
        self.host: dict[int, Any] = {}
        self.events: dict[int, float] = {}
        self.graphs: dict[int, list[Callable[[], None]]] = {}
        self.recording: list[Callable[[], None]] | None = None
        self.launches = 0
        self._handles = 1000

    def cudaGetDeviceCount(self) -> Any:
        return self.error, self.devices

    def cudaGetErrorString(self, error: Error) -> Any:
        return Error.cudaSuccess, Error(error).name.encode()

    def cudaDeviceGetAttribute(self, attribute: int, device: int) -> Any:
        assert (attribute, device) == (16, 0)
        return Error.cudaSuccess, 40

    def cudaDeviceGetPCIBusId(self, length: int, device: int) -> Any:
        return Error.cudaSuccess, b"0000:00:1E.0".ljust(length, b"\0")

    def cudaMalloc(self, size: int) -> Any:
        return Error.cudaSuccess, self._allocate(self.device, size)

    def cudaMallocHost(self, size: int) -> Any:
        return Error.cudaSuccess, self._allocate(self.host, size)

    def cudaFree(self, address: int) -> Any:
        del self.device[address]
        return (Error.cudaSuccess,)

    def cudaFreeHost(self, address: int) -> Any:
        del self.host[address]
        return (Error.cudaSuccess,)

    def cudaMemcpyAsync(self, target: int, source: int, count: int, kind: CopyKind, stream: int) -> Any:
        ends = {CopyKind.cudaMemcpyHostToDevice: (self.device, self.host)}
        targets, sources = ends.get(kind, (self.host, self.device))
        if target not in targets or source not in sources:
            return (Error.cudaErrorInvalidValue,)
        assert count <= len(targets[target]) and count <= len(sources[source])
        ctypes.memmove(target, source, count)
        return (Error.cudaSuccess,)

    def cudaStreamCreate(self) -> Any:
        return Error.cudaSuccess, self._handle()

    def cudaStreamSynchronize(self, stream: int) -> Any:
        return (Error.cudaSuccess,)

    def cudaStreamDestroy(self, stream: int) -> Any:
        return (Error.cudaSuccess,)

    def cudaEventCreate(self) -> Any:
        return Error.cudaSuccess, self._handle()

    def cudaEventRecord(self, event: int, stream: int) -> Any:
        self.events[event] = time.perf_counter()
        return (Error.cudaSuccess,)

    def cudaEventElapsedTime(self, start: int, end: int) -> Any:
        return Error.cudaSuccess, 1e3 * (self.events[end] - self.events[start])

    def cudaEventDestroy(self, event: int) -> Any:
        return (Error.cudaSuccess,)

    def cudaStreamBeginCapture(self, stream: int, mode: int) -> Any:
        self.recording = []
        return (Error.cudaSuccess,)

    def cudaStreamEndCapture(self, stream: int) -> Any:
        assert self.recording is not None
        graph = self._handle()
        self.graphs[graph], self.recording = self.recording, None
        return Error.cudaSuccess, graph

    def cudaGraphInstantiate(self, graph: int, flags: int) -> Any:
        executable = self._handle()
        self.graphs[executable] = self.graphs[graph]
        return Error.cudaSuccess, executable

    def cudaGraphLaunch(self, graph: int, stream: int) -> Any:
        for call in self.graphs[graph]:
            call()
        return (Error.cudaSuccess,)

    def cudaGraphDestroy(self, graph: int) -> Any:
        del self.graphs[graph]
        return (Error.cudaSuccess,)

    def cudaGraphExecDestroy(self, graph: int) -> Any:
        del self.graphs[graph]
        return (Error.cudaSuccess,)

    def launch(self, call: Callable[[], None]) -> None:
        """Run on the stream, or, while it is captured, only record."""
        if self.recording is not None:
            self.recording.append(call)
        else:
            self.launches += 1
            call()

    def read(self, address: int, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        """An array over device memory."""
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        assert size <= len(self.device[address])
        return np.frombuffer(self.device[address], dtype, int(np.prod(shape))).reshape(shape)

    def _allocate(self, memory: dict[int, Any], size: int) -> int:
        block = (ctypes.c_uint8 * size)()
        memory[ctypes.addressof(block)] = block
        return ctypes.addressof(block)

    def _handle(self) -> int:
        self._handles += 1
        return self._handles


class Context:
    def __init__(self, engine: Engine) -> None:
        self._engine, self._shape = engine, tuple(engine.get_tensor_shape("images"))
        self._addresses: dict[str, int] = {}

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        low, _, high = self._engine.get_tensor_profile_shape(name, 0)
        self._shape = shape
        return all(least <= size <= most for least, size, most in zip(low, shape, high, strict=True))

    def set_tensor_address(self, name: str, address: int) -> bool:
        self._addresses[name] = address
        return True

    def execute_async_v3(self, stream_handle: int) -> bool:
        shape = self._shape
        self._engine.cuda.launch(lambda: self._work(shape))
        return True

    def _work(self, shape: tuple[int, ...]) -> None:
        cuda = self._engine.cuda
        images = cuda.read(self._addresses["images"], shape, np.uint8)
        names = ["boxes_xyxy", "scores"]
        for name, result in zip(names, self._engine.session.run(names, {"images": images}), strict=True):
            cuda.read(self._addresses[name], result.shape, np.float32)[:] = result


class Inspector:
    """Prints layers in the form of TensorRT 10 as recorded (``inspector_samples``)."""

    execution_context: Any = None

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def get_engine_information(self, kind: str) -> str:
        assert kind == "JSON" and self.execution_context is not None
        structure = check_graph(self._engine.proto)
        layers = [_layer(name, "Int8") for name in structure.quantized]
        layers += [_layer(name, "FP16") for name in structure.floating]
        for layer in layers:
            if layer["Name"].startswith(self._engine.float_instead or "nothing"):
                layer.update(_layer(layer["Name"].split(" + ")[0], "FP16"))
        return json.dumps({"Layers": layers, "Bindings": ["images", "boxes_xyxy", "scores"]})


def _layer(name: str, kind: str) -> dict[str, Any]:
    tensor = {"Name": "t", "Dimensions": [1, 8, 8, 8], "Format/Datatype": f"Channel major {kind} format"}
    weights = {"Type": "Int8" if kind == "Int8" else "Half", "Count": 9}
    return {
        "Name": f"{name} + relu",
        "LayerType": "CaskConvolution",
        "Inputs": [tensor],
        "Outputs": [tensor],
        "ParameterType": "Convolution",
        "Weights": weights,
        "Metadata": f"[ONNX Layer: {name}]\x1e[ONNX Layer: relu]",
    }


class Engine:
    num_io_tensors = 3

    def __init__(self, plan: dict[str, Any], model: bytes, cuda: CudaDouble) -> None:
        self.cuda, self.float_instead = cuda, plan["float_instead"]
        self._largest = plan["largest_batch"]
        self.proto = onnx.load_from_string(model)
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.intra_op_num_threads, options.log_severity_level = 1, 3
        self.session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])

    def get_tensor_name(self, index: int) -> str:
        return ("images", "boxes_xyxy", "scores")[index]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        values = {value.name: value for value in [*self.proto.graph.input, *self.proto.graph.output]}
        axes = values[name].type.tensor_type.shape.dim
        return tuple(axis.dim_value if axis.HasField("dim_value") else -1 for axis in axes)

    def get_tensor_profile_shape(self, name: str, profile: int) -> list[tuple[int, ...]]:
        batch, *rest = self.get_tensor_shape(name)
        batches = (1, self._largest, self._largest) if batch < 0 else (batch,) * 3
        return [(size, *rest) for size in batches]

    def get_tensor_dtype(self, name: str) -> Any:
        return np.uint8 if name == "images" else np.float32

    def create_execution_context(self) -> Context:
        return Context(self)

    def create_engine_inspector(self) -> Inspector:
        return Inspector(self)


class Logger:
    WARNING = 2

    def __init__(self, least: int = 2) -> None:
        pass


class ILogger:
    Severity = SimpleNamespace(INTERNAL_ERROR=0, ERROR=1, WARNING=2)

    def __init__(self) -> None:
        pass


class Profile:
    def __init__(self) -> None:
        self.shapes: dict[str, Any] = {}

    def set_shape(self, name: str, least: Any, best: Any, most: Any) -> None:
        self.shapes[name] = (least, best, most)


class Config:
    def __init__(self) -> None:
        self.profiling_verbosity: str | None = None
        self.profiles: list[Profile] = []

    def add_optimization_profile(self, profile: Profile) -> int:
        self.profiles.append(profile)
        return len(self.profiles) - 1


class Network:
    num_inputs = 1

    def __init__(self, flags: int) -> None:
        self.flags, self.model = flags, b""

    def get_input(self, index: int) -> Any:
        axes = onnx.load_from_string(self.model).graph.input[index].type.tensor_type.shape.dim
        return SimpleNamespace(name="images", shape=tuple(axis.dim_value or -1 for axis in axes))


class OnnxParser:
    num_errors = 0

    def __init__(self, network: Network, logger: Any) -> None:
        self._network = network

    def parse(self, model: bytes) -> bool:
        self._network.model = model
        return True


class TensorRTDouble(ModuleType):
    """The module ``tensorrt``; ``builds`` counts plans. A plan is a line of JSON and the ONNX file."""

    def __init__(self, cuda: CudaDouble, version: str = "11.4.0.106", float_instead: str = "") -> None:
        super().__init__("tensorrt")
        self.__version__ = version
        self.builds = 0
        self.flags: list[int] = []
        self.nptype = np.dtype
        self.Logger, self.ILogger, self.OnnxParser = Logger, ILogger, OnnxParser
        self.LayerInformationFormat = SimpleNamespace(JSON="JSON")
        self.ProfilingVerbosity = SimpleNamespace(DETAILED="DETAILED")
        self.NetworkDefinitionCreationFlag = SimpleNamespace(STRONGLY_TYPED=1)
        self._cuda, self._float_instead = cuda, float_instead

    def Runtime(self, logger: Any) -> Any:
        def deserialize_cuda_engine(plan: bytes) -> Engine | None:
            head, _, model = plan.partition(b"\n")
            facts = json.loads(head)
            return Engine(facts, model, self._cuda) if facts["version"] == self.__version__ else None

        return SimpleNamespace(deserialize_cuda_engine=deserialize_cuda_engine)

    def Builder(self, logger: Any) -> Any:
        return SimpleNamespace(
            create_network=self._create_network,
            create_builder_config=Config,
            create_optimization_profile=Profile,
            build_serialized_network=self._build,
        )

    def _create_network(self, flags: int) -> Network:
        self.flags.append(flags)
        return Network(flags)

    def _build(self, network: Network, config: Config) -> bytes:
        assert config.profiling_verbosity == "DETAILED"
        largest = config.profiles[0].shapes["images"][2][0] if config.profiles else 1
        self.builds += 1
        facts = {"version": self.__version__, "largest_batch": largest, "float_instead": self._float_instead}
        return json.dumps(facts).encode() + b"\n" + network.model


def install(
    monkeypatch: pytest.MonkeyPatch, folder: Path, *, version: str = "11.4.0.106", float_instead: str = ""
) -> tuple[CudaDouble, TensorRTDouble]:
    """Put the doubles where the engine looks for CUDA, TensorRT and nvidia-smi, and the plan cache into ``folder``."""
    cuda = CudaDouble()
    tensorrt = TensorRTDouble(cuda, version, float_instead)
    install_cuda(monkeypatch, cuda)
    monkeypatch.setitem(sys.modules, "tensorrt", tensorrt)
    install_nvidia_smi(monkeypatch, folder / "bin", GPU_LINE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    return cuda, tensorrt


def install_cuda(monkeypatch: pytest.MonkeyPatch, cuda: CudaDouble) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", cuda)


def install_nvidia_smi(
    monkeypatch: pytest.MonkeyPatch, folder: Path, line: str, reasons: str = "0x0000000000000004"
) -> None:
    """An nvidia-smi that answers with this line, and to a question for one field with ``reasons``."""
    folder.mkdir(parents=True, exist_ok=True)
    script = folder / "nvidia-smi"
    script.write_text(f'#!/bin/sh\ncase "$1" in *,*) echo "{line}";; *) echo "{reasons}";; esac\n')
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=":")
