"""The gate's rules and sentences."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline_tasks import champion
from pipeline_tasks.champion import Comparison
from pipeline_tasks.params import Parameters, resolve
from pipeline_tasks.verdict import Verdict, at_least, at_most


def test_rule_without_a_limit_is_off() -> None:
    assert at_least("mAP", 0.1, None, "", "") == [] == at_most("ms", 9.0, None, "ms", "")


@pytest.mark.parametrize(("measured", "passed"), [(0.49, False), (0.5, True), (0.51, True)])
def test_lower_limit_includes_itself(measured: float, passed: bool) -> None:
    (rule,) = at_least("mAP", measured, 0.5, "", "test split")
    assert rule.passed is passed


def test_rejection_names_each_missed_rule_with_value_and_limit() -> None:
    rules = at_least("INT8 mAP50-95", 0.4, 0.5, "", "test split") + at_most("latency p50", 3.0, 2.0, "ms", "cpu")
    rules += at_most("size", 1.0, 2.0, "MB", "model.onnx")
    verdict = Verdict(tuple(rules))
    assert not verdict.passed
    assert verdict.sentence() == (
        "rejected: INT8 mAP50-95: 0.4 misses the limit 0.5 (test split); latency p50: 3 misses the limit 2 ms (cpu)"
    )
    assert [rule["passed"] for rule in verdict.to_json()["rules"]] == [False, False, True]


def comparison(**changes: object) -> Comparison:
    values: dict[str, object] = {
        "champion": "yolo v1", "champion_map50_95": 0.50, "candidate_map50_95": 0.48, "images": 40,
        "excluded_images": 2, "shared_classes": ("a", "b"), "removed_classes": (), "share_of_resamples_worse": 0.99,
    }  # fmt: skip
    return Comparison(**{**values, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "passed"),
    [
        ({}, [True, False, True]),
        ({"share_of_resamples_worse": 0.9}, [True, True, True]),
        ({"candidate_map50_95": 0.497}, [True, True, True]),
        ({"candidate_map50_95": 0.6, "share_of_resamples_worse": 0.0}, [True, True, True]),
        ({"images": 9}, [False, False, True]),
        ({"removed_classes": ("c",)}, [True, False, False]),
    ],
)
def test_champion_rules(changes: dict[str, object], passed: list[bool]) -> None:
    rules = champion.rules(comparison(**changes), Parameters().gate)
    assert [rule.passed for rule in rules] == passed


def test_removed_class_may_be_allowed() -> None:
    given = resolve(None, {"gate.allow_removed_classes": True}).gate
    assert champion.rules(comparison(removed_classes=("c",)), given)[2].passed


def test_resampled_detections_follow_their_images() -> None:
    from model.detections import Detections

    found = Detections(
        np.array([0, 0, 2, 1]), np.arange(16, dtype=np.float32).reshape(4, 4),
        np.array([0.9, 0.8, 0.7, 0.6], dtype=np.float32), np.array([0, 1, 2, 3]),
    )  # fmt: skip
    picked = champion._of_images(found, np.array([2, 0, 0]))
    assert picked.image_index.tolist() == [0, 1, 1, 2, 2]
    assert picked.labels.tolist() == [2, 0, 1, 0, 1]
    assert champion._of_images(found, np.array([], dtype=np.int64)).labels.tolist() == []
