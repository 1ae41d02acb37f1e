"""What the training steps share: settings from parameters, what a checkpoint gave, and one short training."""

from __future__ import annotations

import json
import logging
import os
import signal
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest
import torch

import model
from model.checkpoint import CheckpointMetadata, save_checkpoint
from model.data.image_set import ImageSet
from model.precision import resolve
from model.preprocessing import Preprocessing
from model.progress import EpochProgress
from pipeline_tasks.errors import TemporaryError
from pipeline_tasks.idle_settings import warn_of_batch, warn_of_closed_mosaic, warn_of_scale
from pipeline_tasks.params import StartParameters
from pipeline_tasks.training_parameters import TrainingParameters
from pipeline_tasks.training_task import (
    Phases,
    TrainingTask,
    _raise_lost_loader,
    detection_loss,
    run_training,
    start_network,
    training_config,
    training_summary,
)


@dataclass
class Context:
    """What ``run_training`` and ``start_network`` use of a step's context."""

    folder: Path
    parameters: Any = field(
        default_factory=lambda: SimpleNamespace(start=StartParameters(threads=1, image_size=64, cache_megabytes=1))
    )
    stopper: Any = field(default_factory=lambda: SimpleNamespace(cooperative=nullcontext, requested=lambda: False))

    @property
    def output(self) -> Path:
        path = self.folder / "output"
        path.mkdir(parents=True, exist_ok=True)
        return path

    @property
    def state(self) -> Path:
        return self.folder / "state"

    def dataset_roots(self) -> dict[str, Path]:
        return {"target": self.folder / "pictures"}

    def on_epoch_end(self, row: dict[str, Any]) -> None:
        pass


@pytest.fixture
def context(tmp_path: Path) -> Any:
    return Context(tmp_path)


def image_set(folder: Path, count: int = 6) -> ImageSet:
    """Pictures of noise, 48 x 32; class 1 is in the first only."""
    (folder / "pictures").mkdir()
    for index in range(count):
        pixels = np.random.default_rng(index).integers(0, 256, (32, 48, 3), np.uint8)
        assert cv2.imwrite(str(folder / f"pictures/{index}.png"), pixels)
    labels = [1] + [0] * (count - 1)
    paths, boxes = [f"target/{index}.png" for index in range(count)], [[4.0, 5.0, 20.0, 16.0]] * count
    return ImageSet.from_arrays(("circle", "square"), paths, [(48, 32)] * count, range(count), boxes, labels)


def task(images: ImageSet, **options: Any) -> TrainingTask:
    given: dict[str, Any] = {"epochs": 2, "batch_size": 2, "warmup_steps": 0, **options}
    return TrainingTask(
        model=model.build("pico", 2),
        training_set=images,
        validation_set=None,
        compute_loss=detection_loss(2),
        parameters=TrainingParameters(**given),
        preprocessing=Preprocessing(64),
    )


def test_every_shared_setting_reaches_the_training_loop(tmp_path: Path) -> None:
    changed: dict[str, Any] = {
        "epochs": 3, "budget_minutes": 4.0, "batch_size": 5, "accumulate_steps": 6, "learning_rate": 0.07,
        "final_learning_rate_ratio": 0.8, "layer_decay": 0.9, "freeze": ["neck", "heads.*"], "weight_decay": 0.01,
        "warmup_steps": 11, "ema_decay": 0.12, "gradient_clip_norm": 13.0, "close_mosaic_epochs": 14,
        "evaluate_every_epochs": 15, "early_stop_epochs": 16, "checkpoint_every_steps": 17,
    }  # fmt: skip
    config = training_config(task(image_set(tmp_path), **changed), StartParameters())
    for name, value in changed.items():
        assert getattr(config, name) == (tuple(value) if isinstance(value, list) else value), name


def test_patience_counts_from_the_labels_on(tmp_path: Path) -> None:
    images = image_set(tmp_path)
    given = task(images)
    assert training_config(given, StartParameters()).early_stop_from == 0
    phased = replace(given, phases=Phases(images, images, 0.75))
    assert training_config(phased, StartParameters()).early_stop_from == 0.75


def test_the_defaults_switch_every_choice_off(tmp_path: Path) -> None:
    given = TrainingParameters()
    assert (given.multi_scale, given.class_balance, given.early_stop_epochs, given.auto_batch_size) == (0, 0, 0, False)
    config = training_config(task(image_set(tmp_path)), StartParameters())
    assert (config.freeze, config.layer_decay, config.accumulate_steps, config.fresh_parameters) == ((), 1.0, 1, ())


def test_all_choices_together_train_and_are_summed_up(
    tmp_path: Path, context: Any, caplog: pytest.LogCaptureFixture
) -> None:
    options: dict[str, Any] = {
        "multi_scale": 0.5, "class_balance": 1.0, "freeze": ["backbone.stem"], "layer_decay": 0.7,
        "accumulate_steps": 2, "auto_batch_size": True,
    }  # fmt: skip
    chosen = task(image_set(tmp_path), **options)
    stem = {name: tensor.clone() for name, tensor in chosen.model.backbone.stem.state_dict().items()}
    with caplog.at_level(logging.INFO, logger="model"):
        result = run_training(context, chosen)
    summary = training_summary(result, len(chosen.training_set))
    # sqrt(1 / (1 / 6)) + 5 * sqrt(1 / (5 / 6)) = 7.9 images are 8 an epoch: 4 batches of 2, joined two by two
    numbers = {"images": 6, "steps": 4, "best_epoch": 2, "images_per_step": 4}
    assert summary == {**numbers, "precision": resolve("auto", torch.device("cpu"))}
    for sentence in (
        "auto_batch_size needs a GPU; on the CPU batch_size 2 is kept",
        "multi_scale: input sizes 32, 64, 96 pixels",
        "class_balance: an epoch has 8 images instead of 6; an image comes up to 2.5 times on average",
    ):
        assert sentence in caplog.messages
    assert any(message.startswith("freeze: ") for message in caplog.messages)
    after = chosen.model.backbone.stem.state_dict()
    assert [name for name in stem if not torch.equal(stem[name], after[name])] == []


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]


def test_a_batch_larger_than_the_set_is_told_and_counted_as_it_is(
    tmp_path: Path, context: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    sizes: list[int] = []
    monkeypatch.setattr(
        "model.training.EpochProgress",
        lambda *given, batch_size, **rest: (
            sizes.append(batch_size) or EpochProgress(*given, batch_size=batch_size, **rest)
        ),
    )
    result = run_training(context, task(image_set(tmp_path), epochs=1, batch_size=32))
    assert (result.total_steps, result.images_per_step, sizes) == (1, 6, [6])
    sentence = (
        "batch_size 32 is more than the 6 images of an epoch, which are one batch instead; set it to 6 or less, or add "
        "images"
    )
    assert warnings_of(caplog) == [sentence]


def test_settings_without_effect_are_told(
    tmp_path: Path, context: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {"multi_scale": 0.2, "mosaic": 0.5, "close_mosaic_epochs": 3, "epochs": 1, "batch_size": 6}
    run_training(context, task(image_set(tmp_path), **given))
    closed = (
        "close_mosaic_epochs 3 leaves none of 1 epochs to mosaic, multi_scale, which have no effect; set it to less"
    )
    assert warnings_of(caplog) == [
        "multi_scale 0.2 has no effect: the next size is 32 pixels from image_size 64; set it to at least 0.5, or 0",
        f"{closed} than 1",
    ]


@pytest.mark.parametrize("size", [64, 96, 224, 320, 416, 608, 640, 2048])
def test_the_named_share_is_the_least_with_an_effect(size: int, caplog: pytest.LogCaptureFixture) -> None:
    warn_of_scale(TrainingParameters(multi_scale=0.001), size)
    least = float(caplog.messages[0].split("at least ")[1].split(",")[0])
    caplog.clear()
    warn_of_scale(TrainingParameters(multi_scale=least), size)
    assert caplog.messages == []
    warn_of_scale(TrainingParameters(multi_scale=least - 0.001), size)
    assert len(caplog.messages) == 1


def test_settings_with_an_effect_are_not_told(caplog: pytest.LogCaptureFixture) -> None:
    warn_of_scale(TrainingParameters(multi_scale=0.0), 64)
    warn_of_batch(TrainingParameters(batch_size=4), 4)
    warn_of_closed_mosaic(TrainingParameters(close_mosaic_epochs=5), 5)  # nothing that it would close is on
    warn_of_closed_mosaic(TrainingParameters(close_mosaic_epochs=5, mixup=0.1), 6)
    assert caplog.messages == []


def test_a_stop_before_the_time_is_in_the_summary(
    tmp_path: Path, context: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = image_set(tmp_path)
    chosen = task(images, epochs=9, early_stop_epochs=1)
    falling = iter([0.5, 0.4, 0.3])
    monkeypatch.setattr(
        "pipeline_tasks.training_task._evaluation", lambda *_: lambda network: {"map50_95": next(falling)}
    )
    object.__setattr__(chosen, "validation_set", images)
    summary = training_summary(run_training(context, chosen), 6)
    assert (summary["best_epoch"], summary["stopped_early_after_epoch"], summary["map50_95"]) == (1, 2, 0.5)


def checkpoint(folder: Path, variant: str, class_names: tuple[str, ...]) -> Path:
    torch.manual_seed(1)
    metadata = CheckpointMetadata(variant, class_names, Preprocessing(64), 7, lineage={"weights": ["made up"]})
    save_checkpoint(folder / "checkpoint", model.build(variant, len(class_names)), metadata)
    return folder / "checkpoint"


def test_a_checkpoint_with_other_classes_says_what_fits(
    tmp_path: Path, context: Any, caplog: pytest.LogCaptureFixture
) -> None:
    source = checkpoint(tmp_path, "pico", ("cat", "square", "dog"))
    with caplog.at_level(logging.INFO, logger="pipeline_tasks"):
        network, lineage, transfer = start_network(context, "pico", ("circle", "square"), source)
    tensors = len(network.state_dict())
    assert lineage == {"weights": ["made up"]}
    assert caplog.messages[-1] == (
        f"weights of pico: {tensors} tensors kept, 0 start afresh, 0 of the checkpoint fit nowhere; "
        "1 of 2 classes known (new: circle)"
    )
    assert transfer.summary() == {
        "kept": tensors, "new": 0, "unused": 0, "classes_kept": 1, "classes_new": 1, "new_layers": "",
    }  # fmt: skip
    written = json.loads((context.output / "transfer.json").read_text())
    assert (written["classes_kept"], written["classes_new"], len(written["kept"])) == (["square"], ["circle"], tensors)


def test_a_checkpoint_of_another_variant_says_which_layers_start_afresh(
    tmp_path: Path, context: Any, caplog: pytest.LogCaptureFixture
) -> None:
    source = checkpoint(tmp_path, "n", ("circle", "square"))
    with caplog.at_level(logging.INFO, logger="pipeline_tasks"):
        network, _, transfer = start_network(context, "pico", ("circle", "square"), source)
    assert "the weights are of variant n, the network is pico: little of them fits" in caplog.messages
    summary = transfer.summary()
    assert summary["kept"] + summary["new"] == len(network.state_dict())
    assert summary["new_layers"].startswith("backbone.stem ") and "heads.head3 " in summary["new_layers"]
    assert summary["unused"] > summary["new"] > summary["kept"] > 0
    chosen = TrainingTask(
        network, image_set(tmp_path), None, detection_loss(2), TrainingParameters(layer_decay=0.5), Preprocessing(64),
        transfer=transfer,
    )  # fmt: skip
    fresh = training_config(chosen, StartParameters()).fresh_parameters
    assert "backbone.stem.conv.branch_3x3.conv.weight" in fresh
    assert "backbone.stage1.blocks.bottlenecks.0.alpha" not in fresh
    assert not any(name.endswith("running_mean") for name in fresh)  # a statistic is no parameter


def test_a_loss_that_is_no_number_ends_with_exit_code_65(
    tmp_path: Path, context: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from pipeline_tasks import __main__ as command_line

    spoiled = task(image_set(tmp_path), learning_rate=1.0)
    with torch.no_grad():
        spoiled.model.heads.head1.cls_pred.bias[0] = np.inf
    monkeypatch.setattr(command_line, "_run_step", lambda arguments: run_training(context, spoiled))
    monkeypatch.setattr(command_line.process, "die_with_parent", lambda: None)
    assert command_line.main(["teach", "--run", "r"]) == 65
    told = capsys.readouterr().out
    assert "ERROR epoch 1 of 2, optimiser step 1: the loss part classification became inf" in told
    assert json.loads((context.state / "state.json").read_text())["position"]["step"] == 0


class Dying(torch.utils.data.Dataset[int]):
    """A set at which a loader process is killed, as the kernel does for want of memory."""

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> int:
        os.kill(os.getpid(), signal.SIGKILL)
        return index


def test_killed_loader_process_is_worth_another_try() -> None:
    before = signal.getsignal(signal.SIGCHLD)
    try:
        with pytest.raises(RuntimeError) as lost:
            list(torch.utils.data.DataLoader(Dying(), num_workers=1, multiprocessing_context="fork"))
    finally:
        signal.signal(signal.SIGCHLD, before)
    with pytest.raises(TemporaryError, match=r"a loader process .* was lost \(DataLoader worker"):
        _raise_lost_loader(lost.value)
    _raise_lost_loader(RuntimeError("another"))
