"""Rules with limits, and the sentences of a verdict."""

from __future__ import annotations

import pytest

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
