"""The training loop on a network small enough to check by hand."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.utils.deterministic
from noise_training import CONFIG, Batches, compute_loss, falling_score, network, run
from torch import Tensor, nn

from model.loss import Targets
from model.training import Stopped, train
from model.training_length import Cost, decide_length
from model.training_step import Learner


def test_history_best_weights_and_length(tmp_path: Path) -> None:
    averages: list[dict[str, Tensor]] = []
    rows: list[dict[str, Any]] = []
    scores = falling_score()

    def evaluate(average: nn.Module) -> dict[str, float]:
        assert not average.training
        averages.append({name: tensor.clone() for name, tensor in average.state_dict().items()})
        metrics: dict[str, float] = scores(average)
        return metrics

    result = run(tmp_path, evaluate=evaluate, on_epoch_end=rows.append)
    assert (result.best_metric, result.best_epoch, result.total_steps) == (0.3, 2, 12)
    assert all(torch.equal(result.best_model_state[name], averages[1][name]) for name in averages[1])
    assert [row["step"] for row in result.history] == [4, 8, 12]
    assert [row["map50_95"] for row in result.history] == [0.1, 0.3, 0.2]
    assert [{**row, "images_per_second": 0} for row in result.history] == [
        {**row, "images_per_second": 0} for row in rows
    ]
    assert json.loads((tmp_path / "length.json").read_text())["total_steps"] == 12


def test_losses_of_a_row_are_means_over_the_epoch_and_sum_up(tmp_path: Path) -> None:
    seen: list[float] = []

    def spy(trained: nn.Module, images: Tensor, targets: Targets, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        loss, parts = compute_loss(trained, images, targets, progress)
        seen.append(loss.item())
        return loss, parts

    result = train(network(), Batches(), spy, CONFIG, tmp_path)
    for epoch, row in enumerate(result.history):
        assert row["loss"] == pytest.approx(np.mean(seen[4 * epoch : 4 * epoch + 4]), rel=1e-12)
        assert row["loss"] == pytest.approx(row["loss_error"] + row["loss_size"], rel=1e-6)  # float32 parts


def test_it_learns(tmp_path: Path) -> None:
    def brightness(
        trained: nn.Module, images: Tensor, targets: Targets, progress: float
    ) -> tuple[Tensor, dict[str, Tensor]]:
        return (trained(images).mean(dim=(1, 2, 3)) - 3.0).square().mean(), {}

    result = train(network(), Batches(), brightness, replace(CONFIG, epochs=25), tmp_path)
    assert result.history[-1]["loss"] < 0.05 * result.history[0]["loss"]
    assert result.best_metric is None and result.best_epoch == 25


def test_mixed_precision_keeps_weights_in_float32_and_learns_alike(tmp_path: Path) -> None:
    exact = run(tmp_path / "exact").history[-1]["loss"]
    mixed = run(tmp_path / "mixed", replace(CONFIG, precision="bfloat16"))
    assert mixed.history[-1]["loss"] == pytest.approx(exact, rel=0.02)  # bfloat16 keeps 8 bits
    assert mixed.history[-1]["loss"] != exact
    assert mixed.best_model_state["0.weight"].dtype == torch.float32


def test_a_machine_that_goes_on_in_another_precision_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    answers = iter([False] * 5 + [True])
    monkeypatch.setattr("model.training_step.resolve", lambda *_: "bfloat16")
    with pytest.raises(Stopped):
        run(tmp_path, replace(CONFIG, precision="auto"), should_stop=lambda: next(answers))
    assert not caplog.records
    monkeypatch.setattr("model.training_step.resolve", lambda *_: "float32")
    result = run(tmp_path, replace(CONFIG, precision="auto"))
    assert "were computed in bfloat16, the others will be in float32" in caplog.text
    assert (result.precision, result.total_steps) == ("float32", 12)


def test_mosaic_is_closed_in_the_last_epochs(tmp_path: Path) -> None:
    batches = Batches()
    run(tmp_path, replace(CONFIG, close_mosaic_epochs=1), batches=batches)
    assert batches.asked == [(0, 0, True), (1, 0, True), (2, 0, False)]


def test_evaluation_interval_always_includes_the_last_epoch(tmp_path: Path) -> None:
    result = run(tmp_path, replace(CONFIG, evaluate_every_epochs=2), evaluate=falling_score())
    assert ["map50" in row for row in result.history] == [False, True, True]


def test_stop_saves_and_the_next_call_goes_on(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", evaluate=falling_score())
    answers = iter([False] * 5 + [True] + [False] * 20)
    scores = falling_score()
    with pytest.raises(Stopped, match="after step 6 of 12"):
        run(tmp_path / "broken", evaluate=scores, should_stop=lambda: next(answers))
    batches = Batches()
    resumed = run(tmp_path / "broken", evaluate=scores, batches=batches)
    assert batches.asked[0] == (1, 2, True)
    assert resumed.history == whole.history
    assert all(torch.equal(resumed.best_model_state[n], t) for n, t in whole.best_model_state.items())


def test_stop_after_the_last_batch_of_an_epoch_still_evaluates_it(tmp_path: Path) -> None:
    answers = iter([False] * 3 + [True] + [False] * 20)
    with pytest.raises(Stopped):
        run(tmp_path, should_stop=lambda: next(answers))
    result = run(tmp_path)
    assert [row["step"] for row in result.history] == [4, 8, 12]


def test_a_finished_run_is_returned_without_training(tmp_path: Path) -> None:
    first = run(tmp_path, evaluate=falling_score())
    batches = Batches()
    again = run(tmp_path, batches=batches, evaluate=falling_score())
    assert batches.asked == []
    assert again.history == first.history and again.best_metric == first.best_metric
    assert all(torch.equal(again.best_model_state[n], t) for n, t in first.best_model_state.items())


def test_clipping_bounds_the_gradient() -> None:
    layer = nn.Conv2d(3, 2, 1)
    learner = Learner(
        layer,
        lambda trained, images, targets, progress: (trained(images).sum() * 1e4, {}),
        weight_decay=0.0,
        ema_decay=0.0,
        gradient_clip_norm=0.5,
        precision="float32",
        device=torch.device("cpu"),
    )
    learner.step(next(Batches().epoch(0)), learning_rate=1e-3, update=1)
    norm = torch.stack([p.grad.norm() for p in layer.parameters() if p.grad is not None]).norm()
    assert norm.item() == pytest.approx(0.5, rel=1e-4)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"accumulate_steps": 0}, "accumulate_steps must be at least 1, got 0"),
        ({"early_stop_epochs": -1}, "early_stop_epochs must not be negative, got -1"),
        ({"early_stop_from": 1.0}, r"early_stop_from must lie in \[0, 1\), got 1.0"),
        ({"layer_decay": 0.0}, r"layer_decay must lie in \(0, 1\], got 0"),
        ({"evaluate_every_epochs": 0}, "evaluate_every_epochs must be at least 1"),
        ({"warmup_steps": -1}, "warmup_steps must not be negative, got -1"),
        ({"budget_minutes": -5.0}, "budget_minutes must be positive, got -5"),
        ({"learning_rate": 0.0}, "learning_rate must be positive"),
        ({"precision": "int3"}, "precision must be one of auto, float32, bfloat16, got 'int3'"),
        ({"ema_decay": 1.0}, "ema_decay must lie in"),
    ],
)
def test_settings_that_cannot_work_are_named(tmp_path: Path, change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        run(tmp_path, replace(CONFIG, **change))


def test_an_unknown_best_metric_lists_the_known(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"best_metric 'ap' is not measured; choose one of map50, map50_95"):
        run(tmp_path, replace(CONFIG, best_metric="ap"), evaluate=falling_score())


def test_an_evaluation_of_nothing_says_what_the_validation_split_lacks(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"measured nothing, as the validation split has no boxes that count .*annotate"
    ):
        run(tmp_path, evaluate=lambda average: {})


def test_while_every_evaluation_is_0_the_latest_weights_are_best(tmp_path: Path) -> None:
    averages: list[Tensor] = []

    def evaluate(average: nn.Module) -> dict[str, float]:
        averages.append(average.state_dict()["0.weight"].clone())
        return {"map50_95": 0.0}

    result = run(tmp_path, evaluate=evaluate)
    assert (result.best_metric, result.best_epoch) == (0.0, 3)
    assert torch.equal(result.best_model_state["0.weight"], averages[2]) and not torch.equal(averages[2], averages[0])


def test_budget_decides_once_and_is_written_down(tmp_path: Path) -> None:
    config = replace(CONFIG, epochs=10**6, budget_minutes=0.005)
    stop = iter([True])
    with pytest.raises(Stopped):
        run(tmp_path, config, evaluate=lambda average: {"map50_95": 0.5}, should_stop=lambda: next(stop))
    recorded = json.loads((tmp_path / "length.json").read_text())
    assert recorded["decided_by"] == "budget"
    assert 1 <= recorded["total_steps"] < 10000  # 0.3 s at far more than 30 microseconds a step
    (tmp_path / "length.json").write_text(json.dumps({**recorded, "total_steps": 6}))
    (tmp_path / "state.json").unlink()
    assert run(tmp_path, config).total_steps == 6  # no second measurement; the last epoch is cut short


def test_measuring_for_a_budget_leaves_no_trace_in_the_result(tmp_path: Path) -> None:
    plain = run(tmp_path / "plain")
    budget = run(tmp_path / "budget", replace(CONFIG, budget_minutes=60.0))
    assert budget.history == plain.history


def test_length_from_costs() -> None:
    def length(minutes: float | None, evaluation_seconds: float = 2.0) -> tuple[int, str]:
        cost = Cost(step_seconds=0.5, evaluation_seconds=evaluation_seconds)
        decided = decide_length(10, 20, 1, minutes, lambda: cost)
        return decided.total_steps, decided.decided_by

    assert length(None) == (200, "epochs")
    assert length(60.0) == (200, "epochs")
    assert length(1.0) == (100, "budget")  # 0.5 s + 2 s / 20 a step would be 0.6 s
    assert length(0.1) == (8, "budget")  # 6 s: an evaluation of 2 s, then 4 s of steps
    assert length(0.001) == (1, "budget")


def test_another_setting_or_another_network_is_refused(tmp_path: Path) -> None:
    run(tmp_path)
    with pytest.raises(ValueError, match=r"learning_rate = 0.01, but 0.5 is asked for; restore the setting"):
        run(tmp_path, replace(CONFIG, learning_rate=0.5))
    with pytest.raises(ValueError, match=r"holds another network .*delete it to train anew"):
        train(nn.Conv2d(3, 4, 1), Batches(), compute_loss, CONFIG, tmp_path)


@pytest.mark.parametrize("name", ["state.json", "length.json", "state-00000012.safetensors"])
def test_a_damaged_file_is_named(tmp_path: Path, name: str) -> None:
    run(tmp_path)
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:50])
    with pytest.raises(ValueError, match=rf"{name} is (missing or )?damaged .*delete .* to train anew"):
        run(tmp_path)


def test_a_state_that_lacks_a_field_is_named(tmp_path: Path) -> None:
    run(tmp_path)
    (tmp_path / "state.json").write_text('{"schema_version": 1, "settings": {}}')
    with pytest.raises(ValueError, match=r"state.json is damaged \(it lacks metrics_bytes, position, .*delete"):
        run(tmp_path)


def test_metrics_cut_by_hand_are_noticed(tmp_path: Path) -> None:
    run(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"metrics.jsonl has 0 bytes, but had"):
        run(tmp_path)


def test_only_the_last_state_is_kept(tmp_path: Path) -> None:
    run(tmp_path, replace(CONFIG, checkpoint_every_steps=1), evaluate=falling_score())
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "best-00000008.safetensors",
        "length.json",
        "metrics.jsonl",
        "state-00000012.safetensors",
        "state.json",
    ]


def test_a_plain_log_tells_of_every_epoch(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="model"):
        run(tmp_path, evaluate=falling_score())
    lines = [message for message in caplog.messages if message.startswith("epoch 2/3")]
    assert len(lines) == 1
    assert all(word in lines[0] for word in ("loss ", "loss_error ", "map50_95 0.3", "images/s "))


def test_training_restores_the_choice_of_kernels(tmp_path: Path) -> None:
    run(tmp_path)
    assert not torch.are_deterministic_algorithms_enabled()
    memory: Any = torch.utils.deterministic
    assert memory.fill_uninitialized_memory
