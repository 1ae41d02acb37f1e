"""Quantizing a whole detector: calibration, choice of layers, training, storage."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from exported_detector import CLASS_NAMES, INPUT_SIZE, ExportedDetector, as_input, golden_network
from safetensors.torch import load_file, save_file

from model.checkpoint import CheckpointMetadata
from model.data.loader import Batch
from model.ema import ExponentialMovingAverage
from model.loss import DetectionLoss, Targets
from model.preprocessing import Preprocessing
from model.quantization.quantize import (
    QuantizationConfig,
    attach_quantizers,
    calibration_digest,
    float_layers,
    freeze,
    match_layers,
    precision_per_layer,
    quantize,
    quantized_layers,
    set_float_layers,
    unfreeze,
)
from model.quantization.storage import METADATA_FILE, WEIGHTS_FILE, load_quantized, save_quantized
from model.training import TrainingConfig, train
from model.yolo_nas import YoloNAS

METADATA = CheckpointMetadata("pico", CLASS_NAMES, Preprocessing(INPUT_SIZE), step=7)


@pytest.fixture
def quantized(detector: ExportedDetector) -> YoloNAS:
    return copy.deepcopy(detector.quantized)


def targets_for(images: int) -> Targets:
    """Two boxes in every image."""
    boxes = torch.tensor([[8.0, 8, 48, 56], [40, 30, 90, 92]]).repeat(images, 1, 1)
    labels = torch.tensor([[0, 2]]).repeat(images, 1)
    return Targets(boxes, labels, torch.ones(images, 2), torch.ones(images, 2, dtype=torch.bool))


def loss_of(network: torch.nn.Module, images: torch.Tensor, targets: Targets) -> torch.Tensor:
    (boxes_xyxy, scores), raw = network(images)
    return DetectionLoss(len(CLASS_NAMES))(raw, boxes_xyxy, scores, targets).total


def test_every_convolution_is_quantized_but_the_defaults(detector: ExportedDetector) -> None:
    layers = quantized_layers(detector.quantized)
    convolutions = [m for m in detector.floating.modules() if isinstance(m, torch.nn.Conv2d | torch.nn.ConvTranspose2d)]
    assert len(layers) == len(convolutions) == 76
    expected = {f"heads.head{level}.{kind}_pred" for level in (1, 2, 3) for kind in ("cls", "reg")}
    expected |= {f"neck.neck{stage}.reduce_after_concat.conv" for stage in (1, 2)}
    assert set(float_layers(detector.quantized)) == expected
    assert all(float_layers(detector.quantized).values())


def test_layers_with_negative_inputs_are_found_and_left_in_float(detector: ExportedDetector) -> None:
    images = as_input(detector.images[:4])
    found = quantize(detector.floating, [images], QuantizationConfig(float_layers=()))
    assert set(float_layers(found)) == {f"neck.neck{stage}.reduce_after_concat.conv" for stage in (1, 2)}
    everything = quantize(
        detector.floating, [images], QuantizationConfig(float_layers=(), signed_inputs_in_float=False)
    )
    assert float_layers(everything) == {}


def test_a_negative_bottleneck_scalar_is_noticed(golden: object, detector: ExportedDetector) -> None:
    network = golden_network(golden).fuse()
    with torch.no_grad():
        network.backbone.stage1.blocks.bottlenecks[0].alpha.fill_(-1.0)  # type: ignore[union-attr, index]
    found = quantize(network, [as_input(detector.images[:4])], QuantizationConfig())
    assert "backbone.stage1.blocks.conv3.conv" in float_layers(found)


def test_calibrated_range_of_the_first_layer_is_that_of_the_images(detector: ExportedDetector) -> None:
    images = as_input(detector.images[:4])
    found = quantize(detector.floating, [images[:2], images[2:]], QuantizationConfig(observer="max"))
    layers = quantized_layers(found)
    assert float(layers["backbone.stem.conv.rbr_reparam"].input_amax) == float(images.max())
    assert all(float(layer.input_amax) > 0 for layer in layers.values())


def test_the_given_network_stays_as_it_is(detector: ExportedDetector) -> None:
    assert not quantized_layers(detector.floating)


@pytest.mark.parametrize("observer", ["max", "percentile", "mse"])
def test_outputs_stay_near_the_float_network(detector: ExportedDetector, observer: str) -> None:
    config = QuantizationConfig(observer=observer)  # type: ignore[arg-type]
    found = quantize(detector.floating, [as_input(detector.images[:8])], config)
    images = as_input(detector.unseen_images)
    with torch.no_grad():
        (_, expected), _ = detector.floating(images)
        (_, scores), _ = found(images)
    # 0.02 was the largest score error measured for each observer; a broken grid gives 0.1 and more
    assert 0 < float((scores - expected).abs().max()) < 0.05


def test_all_layers_switched_off_is_the_float_network_to_the_bit(
    detector: ExportedDetector, quantized: YoloNAS
) -> None:
    set_float_layers(quantized, dict.fromkeys(quantized_layers(quantized), "test"))
    images = as_input(detector.unseen_images)
    with torch.no_grad():
        assert torch.equal(quantized(images)[0][0], detector.floating(images)[0][0])


def test_precisions_carry_reasons(quantized: YoloNAS) -> None:
    set_float_layers(quantized, {"heads.head1.cls_pred": "asked by a test"})
    precision = precision_per_layer(quantized)
    assert precision["heads.head1.cls_pred"] == {"precision": "float32", "reason": "asked by a test"}
    assert precision["heads.head1.reg_pred"] == {"precision": "int8", "reason": ""}


def test_wrong_requests_are_refused(detector: ExportedDetector, quantized: YoloNAS, golden: object) -> None:
    with pytest.raises(ValueError, match="fuse"):
        quantize(golden_network(golden), [as_input(detector.images[:1])], QuantizationConfig())
    with pytest.raises(ValueError, match="at least one batch"):
        quantize(detector.floating, [], QuantizationConfig())
    with pytest.raises(ValueError, match=r"'head' matches no convolution"):
        match_layers(quantized, "head")
    with pytest.raises(ValueError, match="not a quantizable layer: nothing"):
        set_float_layers(quantized, {"nothing": ""})


def test_calibration_digest_follows_the_ranges_alone(quantized: YoloNAS) -> None:
    before = calibration_digest(quantized)
    with torch.no_grad():
        next(quantized.parameters()).add_(1)
    assert calibration_digest(quantized) == before
    next(iter(quantized_layers(quantized).values())).input_amax.mul_(2)
    assert calibration_digest(quantized) != before


def test_training_mode_changes_nothing(detector: ExportedDetector, quantized: YoloNAS) -> None:
    """No batch norm is left, so there is no second behaviour."""
    images = as_input(detector.unseen_images[:2])
    with torch.no_grad():
        assert torch.equal(quantized.eval()(images)[0][1], quantized.train()(images)[0][1])


def test_quantization_aware_steps_reduce_the_loss(detector: ExportedDetector, quantized: YoloNAS) -> None:
    images, targets = as_input(detector.images[:4]), targets_for(4)
    optimizer = torch.optim.AdamW(quantized.parameters(), lr=1e-3)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = loss_of(quantized, images, targets)
        loss.backward()
        assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in quantized.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


def test_average_of_the_weights_is_a_quantized_network(detector: ExportedDetector, quantized: YoloNAS) -> None:
    average = ExponentialMovingAverage(quantized, 0.9)
    with torch.no_grad():
        for parameter in quantized.parameters():
            parameter.mul_(1.01)
    average.update(quantized, 100)
    assert isinstance(average.network, YoloNAS)
    assert float_layers(average.network) == float_layers(quantized)
    assert calibration_digest(average.network) == calibration_digest(quantized)


class TwoBatches:
    """A source of batches for ``train`` that needs no files."""

    batches_per_epoch = 2

    def __init__(self, images: np.ndarray) -> None:
        self._images = torch.from_numpy(images)

    def epoch(self, epoch: int, start_batch: int = 0, mosaic_enabled: bool = True):  # type: ignore[no-untyped-def]
        for index in range(start_batch, self.batches_per_epoch):
            images = self._images[2 * index : 2 * index + 2]
            yield Batch(images, targets_for(2), np.arange(2))


def test_the_ordinary_training_loop_trains_it(detector: ExportedDetector, quantized: YoloNAS, tmp_path: Path) -> None:
    config = TrainingConfig(epochs=1, batch_size=2, learning_rate=1e-3, warmup_steps=0, ema_decay=0.5)
    before = copy.deepcopy(quantized.state_dict())
    result = train(
        quantized,
        TwoBatches(detector.images),
        lambda network, images, targets, progress: (loss_of(network, images, targets), {}),
        config,
        tmp_path,
    )
    assert result.total_steps == 2
    quantized.load_state_dict(result.best_model_state)
    name = "backbone.stem.conv.rbr_reparam"
    assert not torch.equal(quantized.state_dict()[f"{name}.weight"], before[f"{name}.weight"])
    assert torch.equal(quantized.state_dict()[f"{name}.input_amax"], before[f"{name}.input_amax"])


def test_reload_is_equal_to_the_bit(detector: ExportedDetector, quantized: YoloNAS, tmp_path: Path) -> None:
    save_quantized(tmp_path / "out", quantized, METADATA)
    loaded, metadata = load_quantized(tmp_path / "out")
    assert metadata == METADATA
    assert precision_per_layer(loaded) == precision_per_layer(quantized)
    images = as_input(detector.unseen_images)
    with torch.no_grad():
        for ours, theirs in zip(loaded(images)[0], quantized(images)[0], strict=True):
            assert torch.equal(ours, theirs)


def test_damaged_and_foreign_files_are_refused(quantized: YoloNAS, detector: ExportedDetector, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not quantized"):
        save_quantized(tmp_path, detector.floating, METADATA)
    save_quantized(tmp_path, quantized, METADATA)
    (tmp_path / WEIGHTS_FILE).write_bytes(b"\0" * 40)
    with pytest.raises(ValueError, match=WEIGHTS_FILE):
        load_quantized(tmp_path)
    record = json.loads((tmp_path / METADATA_FILE).read_text())
    (tmp_path / METADATA_FILE).write_text(json.dumps({**record, "schema_version": 99}))
    with pytest.raises(ValueError, match="schema version"):
        load_quantized(tmp_path)
    (tmp_path / METADATA_FILE).unlink()
    with pytest.raises(ValueError, match="nasline quantize"):
        load_quantized(tmp_path)


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"float_layers": None}, "float_layers must be a JSON object, but it is missing"),
        ({"float_layers": ["a"]}, r"float_layers must be a JSON object, but it is \['a'\]"),
        ({"float_layers": {"nowhere": ""}}, "float_layers: not a quantizable layer: nowhere"),
        ({"checkpoint": None}, "checkpoint must be a JSON object, but it is missing"),
        ({"checkpoint": {"schema_version": 1}}, "checkpoint is not valid metadata .expected the fields"),
    ],
)
def test_a_record_without_its_fields_is_refused(
    quantized: YoloNAS, tmp_path: Path, changed: dict[str, object], told: str
) -> None:
    save_quantized(tmp_path, quantized, METADATA)
    record = {**json.loads((tmp_path / METADATA_FILE).read_text()), **changed}
    kept = {name: value for name, value in record.items() if value is not None}
    (tmp_path / METADATA_FILE).write_text(json.dumps(kept))
    with pytest.raises(ValueError, match=f"{METADATA_FILE}: {told}.*; quantize again"):
        load_quantized(tmp_path)


STEM = "backbone.stem.conv.rbr_reparam"


@pytest.mark.parametrize(
    ("tensor", "value", "told"),
    [
        (f"{STEM}.input_amax", float("nan"), "holds nan, which is no finite number"),
        (f"{STEM}.input_amax", float("inf"), "holds inf, which is no finite number"),
        (f"{STEM}.input_amax", -1.0, "is -1, a range must not be negative"),
        (f"{STEM}.weight", float("nan"), "holds nan, which is no finite number"),
    ],
)
def test_numbers_that_compute_nonsense_are_refused(
    quantized: YoloNAS, tmp_path: Path, tensor: str, value: float, told: str
) -> None:
    save_quantized(tmp_path, quantized, METADATA)
    state = load_file(tmp_path / WEIGHTS_FILE)
    state[tensor].view(-1)[-1] = value
    save_file(state, tmp_path / WEIGHTS_FILE)
    with pytest.raises(ValueError, match=f"{WEIGHTS_FILE}: {tensor} {told}; quantize again"):
        load_quantized(tmp_path)


def test_a_range_of_zero_is_a_dead_input_and_only_zeros_are_no_calibration(quantized: YoloNAS, tmp_path: Path) -> None:
    layers = list(quantized_layers(quantized).values())
    layers[-1].input_amax.zero_()
    save_quantized(tmp_path, quantized, METADATA)
    assert list(quantized_layers(load_quantized(tmp_path)[0]).values())[-1].input_amax == 0
    for layer in layers:
        layer.input_amax.zero_()
    save_quantized(tmp_path, quantized, METADATA)
    with pytest.raises(ValueError, match="no range was ever calibrated; quantize again"):
        load_quantized(tmp_path)


def test_freeze_and_unfreeze_reach_every_layer(quantized: YoloNAS) -> None:
    freeze(quantized)
    assert all(layer.frozen_input_scale is not None for layer in quantized_layers(quantized).values())
    unfreeze(quantized)
    assert all(layer.frozen_input_scale is None for layer in quantized_layers(quantized).values())


def test_attaching_twice_changes_nothing(quantized: YoloNAS) -> None:
    before = list(quantized_layers(quantized).values())
    attach_quantizers(quantized)
    assert list(quantized_layers(quantized).values()) == before
