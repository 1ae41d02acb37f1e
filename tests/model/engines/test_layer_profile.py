"""The profile names every layer of the file, and its times add up to about those of the calls."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from exported_detector import ExportedDetector

from model.engines.layer_profile import _owners, _Profiled, _type, profile_layers, time_forms
from model.onnx_float_layers import leave_in_float
from model.onnx_structure import convolutions


@pytest.fixture(scope="module")
def forms(detector: ExportedDetector) -> dict[str, onnx.ModelProto]:
    proto = onnx.load(detector.int8_onnx)
    return {"int8": proto, "float": leave_in_float(proto, convolutions(proto))}


def test_every_layer_has_a_time_in_both_forms(detector: ExportedDetector, forms: dict[str, onnx.ModelProto]) -> None:
    found = profile_layers(forms, detector.images[:1], threads=1, rounds=5)
    for profile in found.values():
        assert set(profile.layers) == set(convolutions(forms["int8"]))
        assert all(time >= 0 for time in profile.layers.values())
        assert profile.total == pytest.approx(sum(profile.layers.values()) + profile.other)
    # the largest convolution takes longer than the smallest one, on any machine
    times = found["float"].layers
    assert times["backbone.stage1.downsample.rbr_reparam"] > times["heads.head3.cls_pred"]


def test_every_compiled_node_counts_once(detector: ExportedDetector, forms: dict[str, onnx.ModelProto]) -> None:
    profiled = _Profiled(forms["float"], detector.images[:1], threads=1)
    profiled.run()
    assert profiled.profile().total == pytest.approx(sum(profiled._shortest.values()))


def test_bringing_the_picture_into_the_stems_order_is_the_stems_time(forms: dict[str, onnx.ModelProto]) -> None:
    compiled = _Profiled(forms["int8"], np.zeros((1, 3, 96, 96), np.uint8), threads=1)._compiled
    owned = _owners(compiled)
    types = {op.get_friendly_name(): _type(op) for op in compiled.get_runtime_model().get_ordered_ops()}
    reorderings = [owner for node, owner in owned.items() if types[node] == "Reorder"]
    assert "backbone.stem.conv.rbr_reparam" in reorderings
    assert {types[node] for node in owned} == {"Convolution", "Deconvolution", "Reorder"}


def test_forms_are_timed_in_turns(detector: ExportedDetector, forms: dict[str, onnx.ModelProto]) -> None:
    timings = time_forms(forms, detector.images[:1], threads=1, rounds=3, warmup_seconds=0)
    assert {name: len(found.wall_ms) for name, found in timings.items()} == {"int8": 3, "float": 3}


def test_no_round_is_refused(detector: ExportedDetector, forms: dict[str, onnx.ModelProto]) -> None:
    with pytest.raises(ValueError, match="profile_rounds"):
        profile_layers(forms, np.zeros((1, 3, 96, 96), np.uint8), rounds=0)
