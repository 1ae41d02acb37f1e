"""Learning rates against the published schedule and the edges of warm-up."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest

from model.schedule import WarmupCosine, fitting_warmup_steps


def test_equals_the_published_schedule_of_long_epochs(shared: Path) -> None:
    golden = json.loads((shared / "golden" / "schedules.json").read_text())["coco_long_epoch"]
    config = golden["config"]
    schedule = WarmupCosine(
        learning_rate=config["initial_lr"],
        total_steps=config["L"] * config["max_epochs"],
        warmup_steps=config["warm_steps"],
        initial_learning_rate=config["warmup_initial_lr"],
        final_ratio=config["final"],
    )
    rates = {step: schedule.at(int(step)) for step in golden["lr_used_at_step"]}
    assert rates == pytest.approx(golden["lr_used_at_step"], rel=1e-6)  # tolerance of the golden files


def test_warmup_longer_than_an_epoch_stays_linear(shared: Path) -> None:
    golden = json.loads((shared / "golden" / "schedules.json").read_text())["coco_short_epoch"]
    schedule = WarmupCosine(2e-4, total_steps=2400, warmup_steps=1000, final_ratio=0.1)
    assert schedule.at(299) == pytest.approx(1e-6 + 299 / 999 * (2e-4 - 1e-6), rel=1e-12)
    assert golden["lr_used_at_step"]["299"] == 2e-4  # the reference squeezes its warm-up into one epoch
    assert schedule.at(1800) == pytest.approx(golden["lr_used_at_step"]["1800"], rel=1e-6)  # then they agree


def test_without_warmup_it_falls_from_the_full_rate_to_the_final_one() -> None:
    schedule = WarmupCosine(1e-3, total_steps=50, final_ratio=0.05)
    rates = [schedule.at(step) for step in range(50)]
    assert rates[0] == 1e-3
    assert all(later <= earlier for earlier, later in itertools.pairwise(rates))
    assert 5e-5 < rates[-1] < 6e-5  # the cosine would reach its end two steps later


def test_warmup_of_one_step_uses_the_initial_rate_once() -> None:
    schedule = WarmupCosine(1e-3, total_steps=10, warmup_steps=1, initial_learning_rate=1e-5)
    assert (schedule.at(0), schedule.at(1)) == (1e-5, 1e-3)


@pytest.mark.parametrize("warmup_steps", [1, 5])
def test_warmup_to_a_rate_below_the_initial_one_does_not_run_downhill(warmup_steps: int) -> None:
    schedule = WarmupCosine(1e-7, total_steps=50, warmup_steps=warmup_steps, initial_learning_rate=1e-6)
    assert [schedule.at(step) for step in range(warmup_steps + 1)] == [1e-7] * (warmup_steps + 1)


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"total_steps": 0}, "total_steps"),
        ({"warmup_steps": 10}, "warmup_steps"),
        ({"final_ratio": 1.5}, "final_ratio"),
    ],
)
def test_impossible_values_are_named(values: dict[str, float], named: str) -> None:
    with pytest.raises(ValueError, match=f"^{named} must"):
        WarmupCosine(**{"learning_rate": 1e-3, "total_steps": 10, **values})  # type: ignore[arg-type]


def test_short_runs_get_a_short_warmup() -> None:
    assert fitting_warmup_steps(1000, 2000) == 1000
    assert fitting_warmup_steps(1000, 1999) == 199
    assert fitting_warmup_steps(1000, 5) == 0
