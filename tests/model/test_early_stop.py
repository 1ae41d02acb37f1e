"""Early stop: as many evaluations without a better metric as agreed, and the same after a resume."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from noise_training import CONFIG, Batches, run

PATIENT = replace(CONFIG, epochs=9, early_stop_epochs=2)


def scores(*values: float) -> Any:
    given: Iterator[float] = iter(values)
    return lambda average: {"map50_95": next(given)}


@pytest.mark.parametrize(
    ("values", "epochs", "best"),
    [
        ((0.3, 0.2, 0.1), 3, 1),
        ((0.1, 0.3, 0.3, 0.3), 4, 2),  # as good is no better
        ((0.1, 0.05, 0.2, 0.15, 0.3, 0.1, 0.2), 7, 5),
        ((0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9), 9, 9),
        ((0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.6, 0.5), 9, 7),
        ((0.0, 0.0, 0.0, 0.0, 0.1, 0.1, 0.1), 7, 5),  # patience begins with the first that is above 0
        ((0.0,) * 9, 9, 9),
        ((0.1, 0.0, 0.0), 3, 1),
    ],
)
def test_it_ends_after_evaluations_without_a_better_metric(
    tmp_path: Path, values: tuple[float, ...], epochs: int, best: int
) -> None:
    result = run(tmp_path, PATIENT, evaluate=scores(*values))
    assert (len(result.history), result.best_epoch, result.stopped_early) == (epochs, best, epochs < 9)
    assert result.total_steps == 4 * epochs


def test_what_comes_before_another_set_tries_no_patience(tmp_path: Path) -> None:
    """0.6 of 9 epochs: the second set begins within the sixth."""
    config = replace(PATIENT, early_stop_from=0.6)
    result = run(tmp_path, config, evaluate=scores(0.3, 0.2, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1))
    assert (len(result.history), result.best_epoch, result.stopped_early) == (8, 1, True)


def test_evaluations_count_not_epochs(tmp_path: Path) -> None:
    config = replace(PATIENT, evaluate_every_epochs=2)
    result = run(tmp_path, config, evaluate=scores(0.3, 0.2, 0.1))
    assert (len(result.history), result.best_epoch) == (6, 2)


def test_the_learning_rate_is_that_of_a_run_of_full_length(tmp_path: Path) -> None:
    early = run(tmp_path / "early", PATIENT, evaluate=scores(0.3, 0.2, 0.1))
    full = run(tmp_path / "full", replace(PATIENT, early_stop_epochs=0), evaluate=scores(*[0.3] * 9))
    assert [row["learning_rate"] for row in early.history] == [row["learning_rate"] for row in full.history[:3]]


@pytest.mark.parametrize("values", [(0.3, 0.2, 0.1), (0.0, 0.0, 0.0, 0.2, 0.2, 0.1)])
@pytest.mark.parametrize("stop_after", [2, 8, 11, 12])
def test_a_resumed_run_ends_where_the_unbroken_one_does(
    tmp_path: Path, values: tuple[float, ...], stop_after: int
) -> None:
    whole = run(tmp_path / "whole", PATIENT, evaluate=scores(*values))
    steps, evaluate = iter(range(1, 100)), scores(*values)
    with pytest.raises(Exception, match="stopped and saved"):
        run(tmp_path / "broken", PATIENT, evaluate=evaluate, should_stop=lambda: next(steps) == stop_after)
    resumed = run(tmp_path / "broken", PATIENT, evaluate=evaluate)
    assert resumed.history == whole.history and resumed.stopped_early
    assert resumed.best_epoch == whole.best_epoch
    assert all(torch.equal(resumed.best_model_state[name], own) for name, own in whole.best_model_state.items())


def test_a_run_that_ended_early_is_returned_without_training(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run(tmp_path, PATIENT, evaluate=scores(0.3, 0.2, 0.1))
    batches = Batches()
    with caplog.at_level(logging.INFO, logger="model"):
        again = run(tmp_path, PATIENT, evaluate=scores(), batches=batches)
    assert batches.asked == [] and again.stopped_early and again.best_epoch == 1
    told = "training ends early, after epoch 3 of 9: 2 evaluations in a row brought no better map50_95"
    assert told in caplog.messages


def test_without_a_validation_set_it_is_told_to_have_no_effect(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    result = run(tmp_path, replace(PATIENT, epochs=3, early_stop_epochs=1))
    assert len(result.history) == 3 and not result.stopped_early
    assert "early_stop_epochs has no effect: there is no validation set to measure on" in caplog.messages
