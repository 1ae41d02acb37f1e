"""Merged up-stages compute what they computed, have no signed input left, and survive the disk."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from exported_detector import (
    CLASS_NAMES,
    INPUT_SIZE,
    ExportedDetector,
    as_input,
    golden_network,
)

from model.backbone import Stage
from model.checkpoint import CheckpointMetadata
from model.neck import UpStage
from model.preprocessing import Preprocessing
from model.quantization.merged_upsampling import MergedUpStage, is_merged, merge_upsampling
from model.quantization.quantize import (
    PREDICTION_LAYERS,
    QuantizationConfig,
    float_layers,
    quantize,
    quantized_layers,
)
from model.quantization.sensitivity import multiply_add_shares
from model.quantization.storage import load_quantized, save_quantized
from model.yolo_nas import YoloNAS

CONFIG = QuantizationConfig(float_layers=tuple(PREDICTION_LAYERS), merge_upsampling=True)


@pytest.fixture(scope="module")
def quantized(detector: ExportedDetector) -> YoloNAS:
    return quantize(detector.floating, [as_input(detector.images[:8])], CONFIG)


def test_a_merged_stage_computes_what_the_stage_computed() -> None:
    stage = UpStage(6, 5, 4, Stage(8, 1, 4)).double().eval()
    for module in stage.modules():
        if hasattr(module, "fuse"):
            module.fuse()
    x, skip1, skip2 = (torch.randn(2, c, side, side, dtype=torch.float64) for c, side in ((6, 3), (5, 6), (4, 12)))
    with torch.no_grad():
        before = stage(x, skip1, skip2)
        after = MergedUpStage(copy.deepcopy(stage))(x, skip1, skip2)
    for expected, found in zip(before, after, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)


def test_a_merged_network_computes_what_it_computed(detector: ExportedDetector) -> None:
    merged = copy.deepcopy(detector.floating)
    merge_upsampling(merged)
    merge_upsampling(merged)
    assert is_merged(merged) and not is_merged(detector.floating)
    images = as_input(detector.unseen_images[:2])
    with torch.no_grad():
        (boxes, scores), _ = merged(images)
        (expected_boxes, expected_scores), _ = detector.floating(images)
    torch.testing.assert_close(boxes, expected_boxes, atol=1e-3, rtol=0)  # pixels; float32 sums in another order
    torch.testing.assert_close(scores, expected_scores, atol=1e-5, rtol=0)


def test_only_the_predictions_stay_in_float(quantized: YoloNAS, detector: ExportedDetector) -> None:
    predictions = {f"heads.head{level}.{kind}_pred" for level in (1, 2, 3) for kind in ("cls", "reg")}
    assert set(float_layers(quantized)) == predictions
    assert set(quantized_layers(quantized)) == set(quantized_layers(detector.quantized))
    assert not any(isinstance(module, torch.nn.ConvTranspose2d) for module in quantized.modules())


def test_a_third_of_the_joining_convolution_is_gone(quantized: YoloNAS, detector: ExportedDetector) -> None:
    merged, plain = (multiply_add_shares(network, INPUT_SIZE) for network in (quantized, detector.quantized))
    stem, joined = "backbone.stem.conv.rbr_reparam", "neck.neck1.reduce_after_concat.conv"
    assert merged[joined] / merged[stem] == pytest.approx(2 / 3 * plain[joined] / plain[stem])
    spread = "neck.neck1.upsample"
    assert merged[spread] / merged[stem] == pytest.approx(plain[spread] / plain[stem])


def test_reload_is_equal_to_the_bit(quantized: YoloNAS, detector: ExportedDetector, tmp_path: Path) -> None:
    save_quantized(tmp_path, quantized, CheckpointMetadata("pico", CLASS_NAMES, Preprocessing(INPUT_SIZE), step=1))
    loaded, _ = load_quantized(tmp_path)
    images = as_input(detector.unseen_images[:2])
    with torch.no_grad():
        for ours, theirs in zip(loaded(images)[0], quantized(images)[0], strict=True):
            assert torch.equal(ours, theirs)


def test_an_unfolded_network_is_refused(golden: object) -> None:
    with pytest.raises(ValueError, match="fuse"):
        merge_upsampling(golden_network(golden))
