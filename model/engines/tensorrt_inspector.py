"""Which convolutions a TensorRT engine really runs in INT8, read from what its EngineInspector prints.

TensorRT may run a quantized layer in float without a word when no INT8 kernel suits it. The inspector of an engine that
was built with detailed verbosity prints JSON: ``Layers``, each with a ``Name`` (fused layers joined by " + "),
``Metadata`` ("[ONNX Layer: NAME]" for each node it came from), ``Inputs`` and, for convolutions, ``Weights``. The type
of a tensor stands in ``Format/Datatype`` up to TensorRT 10 ("... row major Int8 format"), and in a field of its own
(``DataType``) from 11 on; both are read. What is not told is not taken for INT8.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

TYPE_FIELDS = ("DataType", "Datatype", "Format/Datatype", "Format/DataType", "Format")
TYPE_WORDS = {
    "int8": "int8",
    "half": "float16",
    "fp16": "float16",
    "float16": "float16",
    "float": "float32",
    "fp32": "float32",
    "float32": "float32",
}
NEVER_CONVOLUTIONS = frozenset({"Reformat", "Constant", "NoOp", "Shuffle", "Cast"})
CONVOLUTIONS = ("convolution", "deconvolution")
ORIGIN = re.compile(r"\[ONNX Layer: ([^\]]+)\]")
UNTOLD = "unknown"


@dataclass(frozen=True)
class TensorRTExecution:
    """Names of the convolutions by the type in which the engine runs them, in its order.

    untold: in the engine, but it does not say in which type. absent: asked for, but nowhere in the engine.
    """

    int8: tuple[str, ...]
    float16: tuple[str, ...]
    float32: tuple[str, ...]
    untold: tuple[str, ...]
    absent: tuple[str, ...]

    @property
    def precision(self) -> str:
        """As ``Engine.precision``."""
        kinds = {"int8": self.int8, "float16": self.float16, "float32": self.float32}
        return next((kind for kind, layers in kinds.items() if layers), UNTOLD)


def read_execution(information: str, convolutions: Iterable[str]) -> TensorRTExecution:
    """Find these layers of the ONNX file in the JSON of ``get_engine_information``.

    Raises ValueError when the text is not such JSON or was printed for an engine without detailed verbosity.
    """
    layers = _layers(information)
    found = {name: _type_of(name, layers) for name in convolutions}
    kinds = {kind: tuple(name for name in found if found[name] == kind) for kind in (*set(TYPE_WORDS.values()), UNTOLD)}
    absent = tuple(name for name, kind in found.items() if kind is None)
    return TensorRTExecution(kinds["int8"], kinds["float16"], kinds["float32"], kinds[UNTOLD], absent)


def require_int8(execution: TensorRTExecution, quantized: Iterable[str]) -> None:
    """Raise ValueError unless every one of these layers runs in INT8, naming those that do not and what they do."""
    wanted = set(quantized)
    failures = {
        "runs in float16": execution.float16,
        "runs in float32": execution.float32,
        "does not tell its type": execution.untold,
        "is not in the engine's report": execution.absent,
    }
    wrong = [(name, what) for what, names in failures.items() for name in names if name in wanted]
    if wrong:
        shown = ", ".join(f"{name} ({what})" for name, what in wrong[:5])
        raise ValueError(
            f"{len(wrong)} of {len(wanted)} quantized convolutions do not run in INT8 in the engine TensorRT built: "
            f"{shown}; leave them in float (quantize.float_layers) or build with another version of TensorRT"
        )


def _layers(information: str) -> list[Mapping[str, Any]]:
    try:
        layers = json.loads(information)["Layers"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"the engine inspector's text is not JSON with Layers: {error!r}") from error
    if any(isinstance(layer, str) for layer in layers):
        raise ValueError("the engine was built without detailed profiling verbosity, so it does not tell its types")
    return [layer for layer in layers if layer.get("LayerType") not in NEVER_CONVOLUTIONS]


def _type_of(name: str, layers: Iterable[Mapping[str, Any]]) -> str | None:
    """Type in which a layer runs; None when no layer of the engine comes from it.

    A name can stand in several layers of the engine, where one is a split-off part; the convolution itself decides.
    """
    made_from = [layer for layer in layers if name in _origins(layer)]
    calculating = [layer for layer in made_from if _is_convolution(layer)] or made_from
    kinds = [_calculates_in(layer) for layer in calculating]
    if not kinds:
        return None
    return next((kind for kind in kinds if kind != "int8"), "int8")


def _origins(layer: Mapping[str, Any]) -> set[str]:
    parts = {part.strip() for part in str(layer.get("Name", "")).split(" + ")}
    return parts | set(ORIGIN.findall(str(layer.get("Metadata", ""))))


def _is_convolution(layer: Mapping[str, Any]) -> bool:
    kinds = (str(layer.get("ParameterType", "")).lower(), str(layer.get("LayerType", "")).lower())
    return any(word in kind for kind in kinds for word in CONVOLUTIONS)


def _calculates_in(layer: Mapping[str, Any]) -> str:
    """INT8 only when the input is and the weights, if they are told, are too."""
    inputs = layer.get("Inputs") or []
    kind = _tensor_type(inputs[0]) if inputs else UNTOLD
    weights = layer.get("Weights")
    weight_kind = _kind(str(weights.get("Type", ""))) if isinstance(weights, Mapping) else kind
    return kind if weight_kind in (kind, UNTOLD) or kind == UNTOLD else _wider(kind, weight_kind)


def _wider(first: str, second: str) -> str:
    order = ("float32", "float16", "int8")
    return min(first, second, key=order.index)


def _tensor_type(tensor: Mapping[str, Any]) -> str:
    kinds = (_kind(str(tensor[field])) for field in TYPE_FIELDS if field in tensor)
    return next((kind for kind in kinds if kind != UNTOLD), UNTOLD)


def _kind(text: str) -> str:
    """The type that a phrase such as "Thirty-two wide channel vectorized row major Int8 format" names."""
    words = re.findall(r"[a-z]+[0-9]*", text.lower())
    return next((TYPE_WORDS[word] for word in words if word in TYPE_WORDS), UNTOLD)
