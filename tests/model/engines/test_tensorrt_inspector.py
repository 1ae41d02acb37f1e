"""The inspector's JSON: recordings of others (``inspector_samples``, each names its source), forms from documents."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from model.engines.tensorrt_inspector import read_execution, require_int8

SAMPLES = Path(__file__).parent / "inspector_samples"
INT8, FLOAT16 = "recorded_tensorrt_8_int8.json", "recorded_tensorrt_8_float16.json"
CONVOLUTIONS = ("Conv_12", "Conv_29", "Conv_142")


def sample(name: str) -> Any:
    return json.loads((SAMPLES / name).read_text())


def layer_of(content: Any, part: str) -> Any:
    return next(layer for layer in content["Layers"] if f" {part} " in f" {layer['Name']} ")


def test_recorded_int8_engine() -> None:
    execution = read_execution((SAMPLES / INT8).read_text(), CONVOLUTIONS)
    assert execution.int8 == CONVOLUTIONS and execution.precision == "int8"
    assert execution.float16 == execution.float32 == execution.untold == execution.absent == ()
    require_int8(execution, CONVOLUTIONS)


def test_recorded_float16_engine() -> None:
    execution = read_execution((SAMPLES / FLOAT16).read_text(), ["Conv_0"])
    assert execution.float16 == ("Conv_0",) and execution.precision == "float16"
    require_int8(execution, [])
    with pytest.raises(ValueError, match=r"1 of 1 quantized .* Conv_0 \(runs in float16\); .*quantize\.float_layers"):
        require_int8(execution, ["Conv_0"])


def test_recorded_engine_without_details_is_refused() -> None:
    with pytest.raises(ValueError, match="built without detailed profiling verbosity"):
        read_execution((SAMPLES / "recorded_tensorrt_8_names_only.json").read_text(), ["Conv_0"])


def test_a_float_layer_among_int8_ones_is_named() -> None:
    content = sample(INT8)
    layer = layer_of(content, "Conv_29")
    layer["Weights"]["Type"] = "Half"  # an INT8 tensor comes in, but what multiplies it is float16
    execution = read_execution(json.dumps(content), CONVOLUTIONS)
    assert execution.int8 == ("Conv_12", "Conv_142") and execution.float16 == ("Conv_29",)
    layer["Inputs"][0]["Format/Datatype"] = "Row major linear FP32"
    assert read_execution(json.dumps(content), CONVOLUTIONS).float32 == ("Conv_29",)
    with pytest.raises(ValueError, match=r"1 of 3 quantized .*Conv_29 \(runs in float32\)"):
        require_int8(read_execution(json.dumps(content), CONVOLUTIONS), CONVOLUTIONS)


def test_what_is_not_told_is_not_int8() -> None:
    content = sample(INT8)
    for tensor in layer_of(content, "Conv_12")["Inputs"]:
        tensor["Format/Datatype"] = "N/A due to dynamic shapes"
    del layer_of(content, "Conv_12")["Weights"]
    content["Layers"] = [layer for layer in content["Layers"] if "Conv_29" not in layer["Name"]]
    execution = read_execution(json.dumps(content), CONVOLUTIONS)
    assert (execution.int8, execution.untold, execution.absent) == (("Conv_142",), ("Conv_12",), ("Conv_29",))
    with pytest.raises(
        ValueError, match=r"Conv_12 \(does not tell its type\), Conv_29 \(is not in the engine's report\)"
    ):
        require_int8(execution, CONVOLUTIONS)


@pytest.mark.parametrize("separator", ["\x1e", "\x1f", ""])
def test_names_from_metadata(separator: str) -> None:
    """From TensorRT 8.6 on a layer names the ONNX nodes it came from; its own name may be made up."""
    content = sample(INT8)
    layer = layer_of(content, "Conv_12")
    layer["Name"] = "__myl_ConvClip_myl0_3"
    layer["Metadata"] = separator.join(["[ONNX Layer: Conv_12]", "[ONNX Layer: Clip_16]"])
    assert read_execution(json.dumps(content), CONVOLUTIONS).int8 == CONVOLUTIONS


def test_type_in_a_field_of_its_own() -> None:
    """TensorRT 11 splits the type from the format; the names are those of its I/O tensors, no recording was at hand."""
    content = sample(INT8)
    for layer in content["Layers"]:
        for tensor in layer["Inputs"] + layer["Outputs"]:
            phrase = tensor.pop("Format/Datatype")
            tensor["DataType"] = "Int8" if "Int8" in phrase else "Half" if "FP16" in phrase else "Float"
            tensor["Format"] = phrase.replace("Int8 ", "").replace("FP16 ", "").replace(" FP32", "")
    content["I/O Tensors"] = [{"Name": name, "IOMode": "Input"} for name in content.pop("Bindings")]
    assert read_execution(json.dumps(content), CONVOLUTIONS).int8 == CONVOLUTIONS
    layer_of(content, "Conv_12")["Inputs"][0]["DataType"] = "Half"
    assert read_execution(json.dumps(content), CONVOLUTIONS).float16 == ("Conv_12",)


def test_a_split_convolution_is_int8_only_as_a_whole() -> None:
    content = sample(INT8)
    part = json.loads(json.dumps(layer_of(content, "Conv_12")))
    part["Inputs"][0]["Format/Datatype"] = "Row major linear FP32"
    content["Layers"].append(part)
    assert read_execution(json.dumps(content), ["Conv_12"]).float32 == ("Conv_12",)


@pytest.mark.parametrize("text", ["not json", "[]", "{}"])
def test_other_texts_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not JSON with Layers"):
        read_execution(text, [])
