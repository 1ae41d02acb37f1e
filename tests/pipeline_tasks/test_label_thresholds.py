"""Score thresholds of pseudo-labels: what an offset moves, and the classes that get no labels."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline_tasks import pseudo_label, teach
from pipeline_tasks.params import resolve


def context_of(options: dict[str, Any], teacher: Path | None = None, unlabeled: bool = True) -> Any:
    """As much of a step's context as is asked for here."""
    datasets = {"target": {"path": "target"}, "unlabeled": {"path": "unlabeled"} if unlabeled else None}
    return SimpleNamespace(
        parameters=resolve(None, options), inputs={"teacher": teacher} if teacher else {}, run={"datasets": datasets}
    )


@pytest.mark.parametrize(
    ("offset", "red", "quality"),
    [
        (0.0, 0.5, {"validation_precision": 0.8, "validation_recall": 0.5}),
        (-0.2, 0.3, {}),
        (-0.9, 0.0, {}),
        (0.7, 1.0, {}),
    ],
)
def test_an_offset_revives_no_class_that_was_shut_out(
    tmp_path: Path, offset: float, red: float, quality: dict[str, float]
) -> None:
    judged = {"thresholds": {"red": 0.5, "green": 1.0}, "validation_quality": {"precision": 0.8, "recall": 0.5}}
    (tmp_path / "thresholds.json").write_text(json.dumps({"flip_consistency": {"none": judged}}))
    context = context_of({"pseudo_label.threshold_offset": offset}, tmp_path)
    assert pseudo_label._thresholds(context) == {"red": pytest.approx(red), "green": 1.0}
    assert pseudo_label._expected_quality(context) == quality, "of other thresholds nobody knows the worth"


def test_classes_that_get_no_pseudo_labels_are_named_once(caplog: pytest.LogCaptureFixture) -> None:
    options = {"teach.minimum_precision": 0.65}
    shut_out = dict.fromkeys([f"c{number}" for number in range(12)], 1.0)
    modes: Any = {"none": {"thresholds": {**shut_out, "red": 0.4}}}
    with caplog.at_level("WARNING"):
        teach._warn_of_shut_out(context_of(options), modes)
        teach._warn_of_shut_out(context_of(options), {"none": {"thresholds": {"red": 0.4}}})
        teach._warn_of_shut_out(context_of(options, unlabeled=False), modes)
    (told,) = caplog.messages
    assert told.startswith("12 of 13 classes get no pseudo-labels") and "teach.minimum_precision (0.65)" in told
    assert told.endswith("c0, c1, c2, c3, c4, c5, c6, c7 and 4 more")
