"""Where the time of a detector goes on this CPU, convolution by convolution, by OpenVINO's own profiling.

Several forms of a network (float, INT8, some layers of each) are profiled in turns in one process. The time of a node
is its shortest over all rounds: what else the machine does can only add to it.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import openvino
from numpy.typing import NDArray

from model.engines.latency import Timings, measure_interleaved
from model.engines.openvino_engine import CONVOLUTION_TYPES, OpenVINOEngine, _layer_name, _settings
from model.engines.unsigned_rewrite import rewrite_unsigned

if TYPE_CHECKING:
    import onnx


@dataclass(frozen=True)
class LayerProfile:
    """Milliseconds of each convolution for one image, by the layer's name in the file, and of all other nodes.

    What only brings a convolution's input into the precision and memory order that it wants counts as its own.
    """

    layers: dict[str, float]
    other: float

    @property
    def total(self) -> float:
        """Sum over all nodes; a call takes a little longer."""
        return sum(self.layers.values()) + self.other


def profile_layers(
    graphs: Mapping[str, onnx.ModelProto], image: NDArray[np.uint8], *, threads: int = 0, rounds: int = 30
) -> dict[str, LayerProfile]:
    """Profile exported graphs against each other on one image, uint8 (1, 3, S, S).

    Raises ValueError for no round.
    """
    if rounds < 1:
        raise ValueError(f"quantize.profile_rounds must be at least 1, got {rounds}")
    profiled = {name: _Profiled(graph, image, threads) for name, graph in graphs.items()}
    for _ in range(rounds + 1):  # the first round warms up; the minimum forgets it
        for network in profiled.values():
            network.run()
    return {name: network.profile() for name, network in profiled.items()}


def time_forms(
    graphs: Mapping[str, onnx.ModelProto],
    image: NDArray[np.uint8],
    *,
    threads: int = 0,
    rounds: int = 30,
    warmup_seconds: float = 0.2,
) -> dict[str, Timings]:
    """Whole calls of exported graphs on one image, uint8 (1, 3, S, S), taking turns in random order."""
    engines = {name: OpenVINOEngine(_read(graph), threads) for name, graph in graphs.items()}
    calls = {name: functools.partial(engine.run, image) for name, engine in engines.items()}
    return measure_interleaved(calls, warmup_seconds=warmup_seconds, repeats=max(2, rounds))


class _Profiled:
    """A compiled network that remembers the shortest time of each of its nodes."""

    def __init__(self, graph: onnx.ModelProto, image: NDArray[np.uint8], threads: int) -> None:
        network = _read(graph)
        network.reshape(list(image.shape))
        self._image = image
        self._compiled = openvino.Core().compile_model(network, "CPU", {**_settings(threads), "PERF_COUNT": True})
        self._request = self._compiled.create_infer_request()
        self._shortest: dict[str, float] = {}

    def run(self) -> None:
        """One inference."""
        self._request.infer({0: self._image}, share_inputs=True)
        for node in self._request.get_profiling_info():
            milliseconds = 1e3 * node.real_time.total_seconds()
            known = self._shortest.get(node.node_name, milliseconds)
            self._shortest[node.node_name] = min(known, milliseconds)

    def profile(self) -> LayerProfile:
        """The shortest times so far."""
        layers: dict[str, float] = {}
        other = 0.0
        owners = _owners(self._compiled)
        for node, value in self._shortest.items():
            if node in owners:
                layers[owners[node]] = layers.get(owners[node], 0.0) + value
            else:
                other += value
        return LayerProfile(layers, other)


def _read(graph: onnx.ModelProto) -> openvino.Model:
    rewritten, _ = rewrite_unsigned(graph)
    return openvino.Core().read_model(rewritten.SerializeToString())


def _owners(compiled: openvino.CompiledModel) -> dict[str, str]:
    """Compiled node -> the layer whose time it is: convolutions, and reorderings that one convolution alone reads."""
    operations = compiled.get_runtime_model().get_ordered_ops()
    owners = {
        operation.get_friendly_name(): _layer_name(operation.get_rt_info(), operation)
        for operation in operations
        if _type(operation) in CONVOLUTION_TYPES
    }
    for operation in operations:
        readers = {
            reader.get_node().get_friendly_name()
            for output in operation.outputs()
            for reader in output.get_target_inputs()
        }
        if _type(operation) == "Reorder" and len(readers) == 1 and readers <= owners.keys():
            owners[operation.get_friendly_name()] = owners[readers.pop()]
    return owners


def _type(operation: Any) -> str:
    return str(operation.get_rt_info()["layerType"].astype(str))
