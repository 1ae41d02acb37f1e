"""Frozen layers: found by name, and still bit for bit what they were after a training."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from noise_training import CONFIG, Batches, compute_loss, network, run

import model
from model.freezing import eval_mode, frozen_layers
from model.training import train


@pytest.mark.parametrize(
    ("patterns", "prefixes"),
    [
        (["backbone.stem"], ("backbone.stem.",)),
        (["backbone.stage[12]", "backbone.stem*"], ("backbone.stem.", "backbone.stage1.", "backbone.stage2.")),
        (["neck"], ("neck.",)),
        (["*.cls_pred"], ("heads.head1.cls_pred.", "heads.head2.cls_pred.", "heads.head3.cls_pred.")),
        ([], ()),
    ],
)
def test_patterns_freeze_layers_with_all_that_is_in_them(patterns: list[str], prefixes: tuple[str, ...]) -> None:
    detector = model.build("pico", 2)
    with frozen_layers(detector, patterns):
        frozen = {name for name, parameter in detector.named_parameters() if not parameter.requires_grad}
    assert frozen == {name for name, _ in detector.named_parameters() if name.startswith(prefixes)}
    assert all(parameter.requires_grad for parameter in detector.parameters())


def test_what_was_frozen_before_stays_frozen_afterwards() -> None:
    detector = model.build("pico", 2)
    detector.backbone.stem.requires_grad_(False)
    with frozen_layers(detector, ["backbone"]):
        assert not any(parameter.requires_grad for parameter in detector.backbone.parameters())
    assert {name.split(".")[1] for name, p in detector.named_parameters() if not p.requires_grad} == {"stem"}


def test_norms_of_frozen_layers_are_in_evaluation_mode() -> None:
    detector = model.build("pico", 2).train()
    with frozen_layers(detector, ["backbone.stage?"]) as names:
        eval_mode(detector, names)
    modes = {name: layer.training for name, layer in detector.named_modules()}
    assert not modes["backbone.stage2.downsample.post_bn"]
    assert modes["backbone.stem.conv.post_bn"] and modes["neck.neck1.conv.bn"]


@pytest.mark.parametrize("pattern", ["backbone.stage5", "stem", "backbone.stem.conv.branch_1x1.weight"])
def test_a_pattern_without_a_layer_names_the_layers_there_are(pattern: str) -> None:
    with (
        pytest.raises(ValueError, match=r"freeze: '.*' matches no layer; .* backbone, backbone.stem, .*heads.head3"),
        frozen_layers(model.build("pico", 2), ["backbone.stem", pattern]),
    ):
        pass


def test_the_share_of_frozen_parameters_is_told(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="model"), frozen_layers(network(), ["0"]):
        pass
    assert caplog.messages == ["freeze: 64 of 676 parameters stay as they are (9.5 %)"]  # of 64 + 32 + 580


@pytest.mark.parametrize("device_steps", [1, 2])
def test_training_leaves_frozen_weights_and_statistics_alone(tmp_path: Path, device_steps: int) -> None:
    learner, config = network(), replace(CONFIG, freeze=("[01]",), accumulate_steps=device_steps)
    before = {name: tensor.clone() for name, tensor in learner.state_dict().items()}
    result = train(learner, Batches(), compute_loss, config, tmp_path)
    for state in (learner.state_dict(), result.best_model_state):
        changed = {name for name, tensor in state.items() if not torch.equal(tensor, before[name])}
        assert changed == {"4.weight", "4.bias"}


def test_frozen_layers_are_a_setting_of_the_run(tmp_path: Path) -> None:
    run(tmp_path, replace(CONFIG, freeze=("0",)))
    assert run(tmp_path, replace(CONFIG, freeze=("0",))).total_steps == 12
    with pytest.raises(ValueError, match=r"holds a training with freeze = \['0'\], but \[\] is asked for"):
        run(tmp_path)


def test_nothing_left_to_train_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no trainable parameter"):
        run(tmp_path, replace(CONFIG, freeze=("*",)))
