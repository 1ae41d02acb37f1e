"""Each kind of loss or gradient that is no number is named, and leaves nothing behind."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from noise_training import CONFIG, Batches, compute_loss, falling_score, network, run
from safetensors.torch import load_file
from torch import Tensor, nn

import model
from model.finiteness import fault_in_gradients
from model.loss import DetectionLoss, Targets
from model.training import train
from model.training_step import ComputeLoss, Learner


def spoiled(kind: str) -> ComputeLoss:
    """The loss of ``noise_training``, spoiled in the third batch of the second epoch: in optimiser step 7."""
    steps = iter(range(1, 100))

    def compute(
        trained: nn.Module, images: Tensor, targets: Targets, progress: float
    ) -> tuple[Tensor, dict[str, Tensor]]:
        loss, parts = compute_loss(trained, images, targets, progress)
        if next(steps) != 7:
            return loss, parts
        if kind == "part":
            parts["size"] = parts["size"] * torch.nan
            return parts["error"] + parts["size"], parts
        if kind == "two parts":
            parts = {"error": parts["error"] * torch.inf, "size": -parts["size"] * torch.inf}
            return parts["error"] + parts["size"], parts
        if kind == "sum":
            return loss * 1e30 * 1e30, parts
        if kind == "gradient":
            flat = next(trained.parameters()) * 0
            return loss + flat.sqrt().sum() * 0, parts  # value 0, slope 0 * inf
        assert kind == "norm"
        return loss * 1e25, parts  # squares of the gradients are too large for float32

    return compute


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("part", "the loss part size became nan"),
        ("two parts", "the loss part error became inf, size became -inf"),
        ("sum", "the loss became inf although each of its parts is finite"),
        ("gradient", r"the gradient of 0.weight became nan"),
        ("norm", r"the gradient norm became inf; the largest gradient is .*, of "),
    ],
)
def test_each_kind_is_named_with_epoch_and_step_and_the_step_before_is_saved(
    tmp_path: Path, kind: str, words: str
) -> None:
    sentence = rf"^epoch 2 of 3, optimiser step 7: {words}.*lower learning_rate.*the state after step 6"
    with pytest.raises(ValueError, match=sentence):
        train(network(), Batches(), spoiled(kind), CONFIG, tmp_path / "spoiled", evaluate=falling_score())
    commit = json.loads((tmp_path / "spoiled" / "state.json").read_text())
    assert (commit["position"]["step"], commit["position"]["best"]["epoch"]) == (6, 1)
    answers = iter([False] * 5 + [True])
    with pytest.raises(Exception, match="after step 6"):
        run(tmp_path / "stopped", should_stop=lambda: next(answers), evaluate=falling_score())
    good = load_file(tmp_path / "stopped" / "state-00000006.safetensors")
    kept = load_file(tmp_path / "spoiled" / "state-00000006.safetensors")
    assert [name for name in good if not name.startswith("random.") and not torch.equal(good[name], kept[name])] == []


def test_the_detection_losss_parts_are_named(tmp_path: Path) -> None:
    """An infinite weight in front of the class logits spoils them and nothing else."""
    detector, criterion = model.build("pico", 2), DetectionLoss(2)
    with torch.no_grad():
        detector.heads.head1.cls_pred.bias[0] = torch.inf

    def compute(
        trained: nn.Module, images: Tensor, targets: Targets, progress: float
    ) -> tuple[Tensor, dict[str, Tensor]]:
        (boxes_xyxy, scores), raw = trained(images.repeat(1, 1, 4, 4))  # pictures of 64 pixels
        parts = criterion(raw, boxes_xyxy, scores, targets)
        return parts.total, {"classification": parts.classification, "iou": parts.iou}

    with pytest.raises(ValueError, match=r"^epoch 1 of 3, optimiser step 1: the loss part classification became inf"):
        train(detector, Batches(), compute, CONFIG, tmp_path)


def test_a_learning_rate_far_too_high_is_told_as_such(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^epoch 1 of 3, optimiser step \d: .* lower learning_rate"):
        run(tmp_path, replace(CONFIG, learning_rate=1e30, warmup_steps=0))


def test_an_infinite_gradient_changes_neither_weights_nor_statistics() -> None:
    layer = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 2, 1))
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}

    def steep(
        trained: nn.Module, images: Tensor, targets: Targets, progress: float
    ) -> tuple[Tensor, dict[str, Tensor]]:
        return (trained(images) * 0).abs().sqrt().sum() * 0, {}

    options = {"weight_decay": 0.1, "ema_decay": 0.0, "gradient_clip_norm": 0.0, "precision": "float32"}
    learner = Learner(layer, steep, **options, device=torch.device("cpu"))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"optimiser step 1: the gradient of 0.weight .* became nan"):
        learner.step(next(Batches().epoch(0)), learning_rate=0.1, update=1)
    after = layer.state_dict()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []


def test_finite_gradients_have_no_fault() -> None:
    layer = nn.Linear(2, 2)
    layer(torch.ones(1, 2)).sum().backward()
    assert fault_in_gradients(layer, torch.tensor(3.0)) is None
