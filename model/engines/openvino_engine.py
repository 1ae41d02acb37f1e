"""OpenVINO: the INT8 engine on CPUs.

Four things make it compute and run as meant (measured with 2026.4, YOLO-NAS-S at 320 pixels):

* Activations are rewritten from signed to unsigned first (``unsigned_rewrite``). Without VNNI signed ones saturate;
  with it they are wrong behind a concatenation and slower. A file in which one stays signed is refused.
* The batch size is fixed to one and a batch runs image by image: shapes known in advance are faster, and the detector
  fills a CPU with a single image.
* ``INFERENCE_PRECISION_HINT`` is float32. The default on processors with bfloat16 arithmetic is bfloat16, silently, for
  the float layers and for the "FP32" engine one compares with.
* Whether INT8 was executed is read from the compiled graph, since unsupported patterns fall back to float silently.
"""

from __future__ import annotations

import functools
import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import openvino
from numpy.typing import NDArray

from model.engines import EngineOutput, check_images
from model.engines.detector_file import check_outputs, load_detector, refuse_quantized_half
from model.engines.unsigned_rewrite import RewriteReport, rewrite_unsigned

if TYPE_CHECKING:
    import onnx

MODEL_FILE = "model.xml"
BUILD_FILE = "build.json"
INT8_TYPES = frozenset({"i8", "u8"})
CONVOLUTION_TYPES = frozenset({"Convolution", "Deconvolution"})
NETWORK_PARTS = frozenset({"backbone", "neck", "heads"})
METADATA_KEY = "nasline"


@dataclass(frozen=True)
class Execution:
    """Names of the convolutions that the compiled graph runs in INT8 and in float."""

    int8: tuple[str, ...]
    floating: tuple[str, ...]


@dataclass(frozen=True)
class BuildReport:
    """What was built and how it runs on the machine that built it."""

    runtime: str
    runtime_version: str
    source_sha256: str
    unsigned_activations: int
    cpu_saturates_signed: bool
    int8_convolutions: int
    float_convolutions: int


class OpenVINOEngine:
    """A compiled OpenVINO network on the CPU."""

    name = "openvino"
    runtime_version: str = openvino.__version__
    fixed_batch = 1

    def __init__(self, network: openvino.Model, threads: int = 0) -> None:
        self.threads = threads
        self._input_size = int(network.input(0).partial_shape[2].get_length())
        network.reshape([1, 3, self._input_size, self._input_size])
        self._compiled = openvino.Core().compile_model(network, "CPU", _settings(threads))
        self._request = self._compiled.create_infer_request()
        self.precision = "int8" if executed_precisions(self._compiled).int8 else "float32"

    @classmethod
    def from_file(cls, path: Path, threads: int = 0) -> OpenVINOEngine:
        """Load an IR (``.xml``) as it is, or an ONNX file with the rewrite that ``build_openvino`` applies."""
        if path.suffix == ".onnx":
            network, _ = _read_onnx(path)
            return cls(network, threads)
        try:
            network = openvino.Core().read_model(path)
        except RuntimeError as error:
            raise ValueError(f"OpenVINO cannot read {path}: {error}") from error
        check_outputs([name for output in network.outputs for name in output.get_names()], path)
        return cls(network, threads)

    def run(self, images: NDArray[np.uint8]) -> EngineOutput:
        """Boxes (xyxy, input pixels) and scores, float32; image by image."""
        check_images(images, self._input_size)
        results = [self._run_one(np.ascontiguousarray(images[index : index + 1])) for index in range(len(images))]
        boxes_xyxy, scores = zip(*results, strict=True)
        return np.concatenate(boxes_xyxy), np.concatenate(scores)

    def execution(self) -> Execution:
        """Which convolutions run in INT8."""
        return executed_precisions(self._compiled)

    def _run_one(self, image: NDArray[np.uint8]) -> EngineOutput:
        self._request.infer({0: image}, share_inputs=True)
        boxes_xyxy = np.array(self._request.get_tensor("boxes_xyxy").data)
        return boxes_xyxy, np.array(self._request.get_tensor("scores").data)


def build_openvino(onnx_path: Path, out_directory: Path, threads: int = 0) -> BuildReport:
    """Write the IR of an exported file (``model.xml``, ``model.bin``) and ``build.json``; give the report.

    Raises ValueError when the file cannot be read or holds a quantized activation that can be negative.
    """
    network, rewrite = _read_onnx(onnx_path)
    out_directory.mkdir(parents=True, exist_ok=True)
    size = network.input(0).partial_shape[2].get_length()
    network.reshape([1, 3, size, size])
    openvino.save_model(network, out_directory / MODEL_FILE, compress_to_fp16=False)
    execution = OpenVINOEngine.from_file(out_directory / MODEL_FILE, threads).execution()
    report = BuildReport(
        runtime=OpenVINOEngine.name,
        runtime_version=OpenVINOEngine.runtime_version,
        source_sha256=hashlib.sha256(onnx_path.read_bytes()).hexdigest(),
        unsigned_activations=rewrite.unsigned,
        cpu_saturates_signed=cpu_saturates_signed(),
        int8_convolutions=len(execution.int8),
        float_convolutions=len(execution.floating),
    )
    (out_directory / BUILD_FILE).write_text(json.dumps(asdict(report), indent=2, sort_keys=True) + "\n")
    return report


def executed_precisions(compiled: openvino.CompiledModel) -> Execution:
    """Read from the compiled graph which convolutions really run in INT8.

    A name is that of the layer in the exported file, if OpenVINO kept it, else that of the compiled node.
    """
    int8: list[str] = []
    floating: list[str] = []
    for operation in compiled.get_runtime_model().get_ordered_ops():
        facts = operation.get_rt_info()
        if facts["layerType"].astype(str) in CONVOLUTION_TYPES:
            precision = facts["runtimePrecision"].astype(str)
            (int8 if precision in INT8_TYPES else floating).append(_layer_name(facts, operation))
    return Execution(tuple(int8), tuple(floating))


@functools.cache
def cpu_saturates_signed() -> bool:
    """Whether this CPU's INT8 kernels saturate on signed activations: one convolution with a known answer.

    Largest weights on largest inputs; where 16-bit sums overflow almost nothing is left of the result.
    """
    channels, value = 32, 127
    network = openvino.Core().read_model(_probe_graph(channels).SerializeToString())
    compiled = openvino.Core().compile_model(network, "CPU", _settings(threads=1))
    image = np.full((1, channels, 8, 8), value, np.float32)
    centre = float(compiled(image)[0][0, 0, 4, 4])
    exact = 9 * channels * 127 * value
    return abs(centre / exact - 1) > 0.01


def _settings(threads: int) -> dict[str, Any]:
    settings: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
    return {**settings, "INFERENCE_NUM_THREADS": threads} if threads else settings


def _read_onnx(path: Path) -> tuple[openvino.Model, RewriteReport]:
    proto = load_detector(path)
    refuse_quantized_half(proto, path)
    rewritten, report = rewrite_unsigned(proto)
    _refuse_signed(report.signed, path)
    try:
        network = openvino.Core().read_model(rewritten.SerializeToString())
    except RuntimeError as error:
        raise ValueError(f"OpenVINO cannot read {path}: {error}") from error
    metadata = {entry.key: entry.value for entry in proto.metadata_props}
    network.set_rt_info(metadata.get(METADATA_KEY, "{}"), [METADATA_KEY, "metadata"])
    return network, report


def _refuse_signed(signed: tuple[str, ...], path: Path) -> None:
    if signed:
        raise ValueError(
            f"{path}: {len(signed)} quantized activations can be negative ({', '.join(signed[:3])}), which OpenVINO "
            "computes wrongly; leave the layers that read them in float (quantize.float_layers)"
        )


def _layer_name(facts: Any, operation: Any) -> str:
    names = [name.removesuffix("/WithoutBiases") for name in facts["originalLayersNames"].astype(str).split(",")]
    layers = [name for name in names if name.partition(".")[0] in NETWORK_PARTS]
    return str(layers[0] if layers else operation.get_friendly_name())


def _probe_graph(channels: int) -> onnx.ModelProto:
    """A 3x3 convolution, all weights 127, its input quantized to int8 with scale 1."""
    from onnx import TensorProto, helper, numpy_helper

    arrays: dict[str, NDArray[Any]] = {
        "scale": np.array(1, np.float32),
        "zero": np.array(0, np.int8),
        "weight": np.full((channels, channels, 3, 3), 127, np.int8),
        "weight_scale": np.ones(channels, np.float32),
        "weight_zero": np.zeros(channels, np.int8),
    }
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["quantized"]),
        helper.make_node("DequantizeLinear", ["quantized", "scale", "zero"], ["input"]),
        helper.make_node("DequantizeLinear", ["weight", "weight_scale", "weight_zero"], ["kernel"], axis=0),
        helper.make_node("Conv", ["input", "kernel"], ["y"], kernel_shape=[3, 3], pads=[1, 1, 1, 1]),
    ]
    shape = [1, channels, 8, 8]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in ("x", "y")]
    tensors = [numpy_helper.from_array(array, name) for name, array in arrays.items()]
    graph = helper.make_graph(nodes, "probe", values[:1], values[1:], tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
