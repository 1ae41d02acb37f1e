"""The few calls of the CUDA runtime that an engine needs, through NVIDIA's own bindings (package cuda-bindings).

Not through torch: its wheels bring a CUDA 13 that wants a newer driver than many a T4 machine has, and gigabytes.
"""

from __future__ import annotations

import ctypes
import importlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from model.engines import MissingRuntimeError

INSTALL = "pip install 'nasline[tensorrt]'"


def load_runtime() -> Any:
    """The module ``cuda.bindings.runtime``; MissingRuntimeError when it is not installed."""
    try:
        return importlib.import_module("cuda.bindings.runtime")
    except ImportError as error:
        raise MissingRuntimeError(
            f"the CUDA bindings for Python cannot be imported ({error}); install them with {INSTALL}"
        ) from None


class Cuda:
    """The first visible CUDA device; every failing call raises RuntimeError with CUDA's own words."""

    def __init__(self) -> None:
        self.runtime = load_runtime()
        _require_device(self.runtime)

    def call(self, name: str, *arguments: Any) -> Any:
        """Call ``name`` of the runtime; what it returns beside its error code: nothing, one value or a list."""
        error, *values = getattr(self.runtime, name)(*arguments)
        if int(error) != 0:
            raise RuntimeError(f"{name}: {_describe(self.runtime, error)}")
        return values[0] if len(values) == 1 else values or None

    def multiprocessors(self) -> int:
        """Streaming multiprocessors of the device; a T4 has 40."""
        return int(self.call("cudaDeviceGetAttribute", self.runtime.cudaDeviceAttr.cudaDevAttrMultiProcessorCount, 0))

    def bus_address(self) -> str:
        """PCI address of the device, by which nvidia-smi finds the same one."""
        address = self.call("cudaDeviceGetPCIBusId", 32, 0)
        return bytes(address).split(b"\0")[0].decode()

    def host_array(self, shape: Sequence[int], dtype: np.dtype[Any]) -> tuple[NDArray[Any], int]:
        """An array in pinned memory, which the device reads and writes by itself, and its address for ``free_host``."""
        size = int(np.prod(shape)) * dtype.itemsize
        address = int(self.call("cudaMallocHost", size))
        memory = memoryview((ctypes.c_uint8 * size).from_address(address))
        return np.frombuffer(memory, dtype=dtype).reshape(tuple(shape)), address


def _require_device(runtime: Any) -> None:
    error, count = runtime.cudaGetDeviceCount()
    if int(error) == int(runtime.cudaError_t.cudaErrorInsufficientDriver):
        raise MissingRuntimeError(
            "no NVIDIA driver that is new enough for the installed CUDA bindings was found: run this on a machine with "
            "an NVIDIA GPU; there CUDA 12 needs driver 535 or newer (pip install 'cuda-bindings<13'), CUDA 13 needs 580"
        )
    if int(error) != 0 or not count:
        told = _describe(runtime, error) if int(error) else "there is none"
        raise MissingRuntimeError(
            f"no CUDA device can be used ({told}): run this on a machine with an NVIDIA GPU, or start the container "
            "with access to one (--gpus all)"
        )


def _describe(runtime: Any, error: Any) -> str:
    _, text = runtime.cudaGetErrorString(error)
    return text.decode() if isinstance(text, bytes) else str(text)
