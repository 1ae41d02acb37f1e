"""Every rule of the gate: a case that passes, a case that fails, and how it is told."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from gate_findings import compared, comparison, findings, metrics, record

from pipeline_tasks.errors import ParameterError
from pipeline_tasks.gate import _torch_error
from pipeline_tasks.gate_latency import GateLatency
from pipeline_tasks.gate_rules import judge, switched_off
from pipeline_tasks.params import Parameters, resolve
from pipeline_tasks.seen_images import Exclusion
from pipeline_tasks.verdict import Rule

ALL_ON = {
    "maximum_class_map_drop": 2.0, "maximum_latency_ms": 6.0, "maximum_latency_p99_ms": 11.0, "minimum_speedup": 1.8,
    "maximum_size_megabytes": 13.0, "require_image_licence": ["MIT"], "require_annotation_licence": ["CC BY 4.0"],
    "require_weights_licence": ["random initialisation"],
}  # fmt: skip
"""With these every rule is on, and the made-up engine passes all."""


def rules_of(found: Any, **options: Any) -> dict[str, Rule]:
    """The judged rules by the parameter that sets their limit."""
    given = resolve(None, {f"gate.{name}": value for name, value in options.items()}).gate
    return {rule.parameter or rule.name: rule for rule in judge(found, given).rules}


def test_an_engine_may_pass_every_rule_at_once() -> None:
    found = findings(
        compared=compared(comparison(champion="yolo v0, the best", candidate_map50_95=0.5), added_classes={"c": 0.3})
    )
    given = resolve(None, {f"gate.{name}": value for name, value in ALL_ON.items()}).gate
    verdict = judge(found, given)
    assert verdict.passed and verdict.off == ()
    assert verdict.sentence() == f"accepted: all {len(verdict.rules)} rules passed"
    judged = {rule.parameter for rule in verdict.rules}
    limits = {
        name
        for name, field in type(given).model_fields.items()
        if name.startswith(("minimum_", "maximum_", "require_"))
    }
    settings = {"minimum_class_boxes", "maximum_spread"}  # what a rule looks at, and what is refused before any rule
    assert limits - settings | {"champion_margin", "allow_removed_classes", ""} == judged


OFF = {"minimum_comparison_images": 1, "allow_removed_classes": True}
"""Values that switch a rule off; the others are empty then."""
NONE_RECORDED = "not accepted: none is recorded"
NEVER_OFF = "precision of the built engine"
FAST_FLOAT = GateLatency({"int8": record("int8", 5.0), "float": record("float", 6.0)}, {})
SLOW_INT8 = GateLatency({"int8": record("int8", 7.0, p99_ms=8.0), "float": record("float", 14.0)}, {})
SLOW_TAIL = GateLatency({"int8": record("int8", 5.0, p99_ms=30.0), "float": record("float", 10.0)}, {})


@pytest.mark.parametrize(
    ("parameter", "changes", "measured"),
    [
        ("minimum_map", {"metrics": {"int8": metrics(30), "float": metrics(30)}}, 0.5),
        ("maximum_map_drop", {"metrics": {"int8": metrics(6), "float": metrics()}}, 9.901),
        ("maximum_class_map_drop", {"metrics": {"int8": metrics(6), "float": metrics()}}, 19.802),
        ("maximum_box_error_pixels", {"agreement": replace(findings().agreement, box_error_mean_px=0.6)}, 0.6),
        ("maximum_latency_ms", {"latency": SLOW_INT8}, 7.0),
        ("maximum_latency_p99_ms", {"latency": SLOW_TAIL}, 30.0),
        ("minimum_speedup", {"latency": FAST_FLOAT}, 1.2),
        ("maximum_size_megabytes", {"megabytes": 13.5}, 13.5),
        ("require_image_licence", {"licences": {**findings().licences, "image": {"x", "MIT"}}}, "not accepted: x"),
        ("require_annotation_licence", {"licences": {**findings().licences, "annotation": {"x"}}}, "not accepted: x"),
        ("require_weights_licence", {"licences": {**findings().licences, "weights": {"x"}}}, "not accepted: x"),
        ("require_weights_licence", {"licences": {**findings().licences, "weights": set()}}, NONE_RECORDED),
        ("minimum_comparison_images", {"compared": compared(images_with_boxes=9)}, 9),
        ("champion_margin", {"compared": compared(candidate_map50_95=0.48, share_of_resamples_worse=0.99)}, -2.0),
        ("allow_removed_classes", {"compared": compared(removed_classes=("c",))}, "c"),
        ("minimum_added_class_map", {"compared": compared(added_classes={"c": 0.3, "d": 0.05})}, 0.05),
        (NEVER_OFF, {"precision": "float32"}, "float32"),
        (NEVER_OFF, {"float_instead": ("a", "b", "c", "d")}, "float in 4 layers that should be int8"),
    ],
)  # fmt: skip
def test_each_rule_fails_alone_where_it_should_and_can_be_switched_off(
    parameter: str, changes: dict[str, Any], measured: float | str
) -> None:
    options = {**ALL_ON, "minimum_map": 0.6, "maximum_map_drop": 5.0}
    if parameter in ("maximum_map_drop", "maximum_class_map_drop"):  # one and the same loss misses both
        options[({"maximum_map_drop", "maximum_class_map_drop"} - {parameter}).pop()] = None
    good = rules_of(findings(compared=compared(added_classes={"c": 0.3})), **options)
    assert parameter in good and all(rule.passed for rule in good.values())
    judged = rules_of(findings(**changes), **options)
    assert [name for name, rule in judged.items() if not rule.passed] == [parameter]
    found = judged[parameter].measured
    assert found == (pytest.approx(measured, abs=1e-3) if isinstance(measured, float) else measured)
    if parameter != NEVER_OFF:
        off = rules_of(findings(**changes), **{**options, parameter: OFF.get(parameter)})
        assert all(rule.passed for rule in off.values())


def test_a_class_with_few_boxes_is_not_judged_and_one_with_none_to_judge_fails() -> None:
    """INT8 loses six of thirty cats; there are ten dogs."""
    found = findings(metrics={"int8": metrics(6), "float": metrics()})
    rule = rules_of(found, maximum_class_map_drop=2.0)["maximum_class_map_drop"]
    assert "cat, 30 boxes, 1 classes have fewer than 20" in rule.how
    assert rules_of(found, maximum_class_map_drop=20.0)["maximum_class_map_drop"].passed
    rule = rules_of(found, maximum_class_map_drop=2.0, minimum_class_boxes=31)["maximum_class_map_drop"]
    assert (rule.passed, rule.measured) == (False, "no class has 31 boxes")


def test_no_confident_anchor_shows_no_agreement() -> None:
    found = findings(agreement=replace(findings().agreement, confident_anchors=0, box_error_mean_px=0.0))
    rule = rules_of(found)["maximum_box_error_pixels"]
    assert (rule.passed, rule.measured) == (False, "no score above 0.3")


def test_agreement_tells_how_far_the_file_itself_is_from_torch() -> None:
    """`export` has limited that leg; the gate tells it beside its own."""
    told = rules_of(findings(torch_error_px=0.0213))["maximum_box_error_pixels"].how
    assert told.endswith("against model.onnx run literally, itself 0.0213 pixels from torch")
    assert rules_of(findings())["maximum_box_error_pixels"].how.endswith("run literally")


@pytest.mark.parametrize(("anchors", "told"), [(12, 0.04), (0, None)])
def test_what_export_measured_counts_where_it_had_something_to_compare(
    tmp_path: Path, anchors: int, told: float | None
) -> None:
    summary = {"int8_box_error_mean_px": 0.04, "int8_confident_anchors": anchors}
    (tmp_path / "manifest.json").write_text(json.dumps({"summary": summary}))
    assert _torch_error(tmp_path / "engine") == told


def test_the_sentence_names_device_and_limit() -> None:
    given = resolve(None, {"gate.maximum_latency_ms": 4.5}).gate
    assert judge(findings(), given).sentence() == (
        "rejected: INT8 latency p50: 5 misses the limit 4.5 ms (Test CPU, 2 threads, batch 1, 200 runs, interleaved)"
    )


def test_rules_that_are_off_are_named() -> None:
    off = switched_off(Parameters().gate)
    assert "gate.maximum_latency_ms" in off and "gate.minimum_map" not in off
    assert judge(findings(), Parameters().gate).to_json()["off"] == list(off)


def test_a_percentile_of_too_few_runs_is_refused() -> None:
    options = {"gate.maximum_latency_p99_ms": 3.0, "gate.latency_repeats": 99}
    with pytest.raises(ParameterError, match=r"gate\.latency_repeats must be at least 100 .* got 99"):
        resolve(None, options)
    assert resolve(None, {**options, "gate.latency_repeats": 100}).gate.maximum_latency_p99_ms == 3.0


@pytest.mark.parametrize(
    ("changes", "passed"),
    [
        ({"candidate_map50_95": 0.48, "share_of_resamples_worse": 0.99}, False),
        ({"candidate_map50_95": 0.48, "share_of_resamples_worse": 0.9}, True),  # it may be noise
        ({"candidate_map50_95": 0.497, "share_of_resamples_worse": 1.0}, True),  # sure, but within the margin
    ],
)
def test_worse_needs_margin_and_certainty(changes: dict[str, Any], passed: bool) -> None:
    assert rules_of(findings(compared=compared(**changes)))["champion_margin"].passed is passed


def test_the_best_of_the_line_is_a_rule_of_its_own() -> None:
    """Each champion may be a little worse than the one before; the line may not."""
    worse = comparison(champion="yolo v1, the best ancestor of yolo v3")
    rules = judge(findings(compared=compared(worse)), Parameters().gate).rules
    (rule,) = [rule for rule in rules if not rule.passed]
    assert rule.name == "mAP50-95 against the best of its line" and rule.parameter == "champion_margin"
    assert "yolo v1, the best ancestor of yolo v3, worse in 99% of the resamples" in rule.how
    assert judge(findings(compared=compared(replace(worse, candidate_map50_95=0.499))), Parameters().gate).passed


def test_what_was_left_out_is_counted_in_the_sentence() -> None:
    left_out = (
        Exclusion("images/a.jpg", "yolo v1", "content", None),
        Exclusion("images/b.jpg", "x", "perceptual hash", 4),
    )
    rule = rules_of(findings(compared=compared(excluded=left_out)))["minimum_comparison_images"]
    assert rule.how == "40 clean test images, 2 excluded, 1 of them near-duplicates, yolo v1"
    rule = rules_of(findings(compared=compared(hashed=False)))["minimum_comparison_images"]
    assert rule.how.endswith("; not all hashes are known, so copies were looked for by content only")


def test_nothing_to_compare_is_judged_by_what_can_be_said() -> None:
    nothing = {
        "images_with_boxes": 0,
        "candidate_map50_95": None,
        "champion_map50_95": None,
        "share_of_resamples_worse": None,
    }
    judged = rules_of(findings(compared=compared(**nothing, images=0, interval_points=None)))
    assert "champion_margin" not in judged and not judged["minimum_comparison_images"].passed
    boxless = rules_of(findings(compared=compared(**nothing, interval_points=None)))
    assert not boxless["minimum_comparison_images"].passed and not boxless["champion_margin"].passed
    others = rules_of(findings(compared=compared(**nothing, shared_classes=(), interval_points=None)))
    assert others["minimum_comparison_images"].passed, "nothing is shared, which the rule of the classes judges"
    assert boxless["champion_margin"].measured == "no box of a, b in the clean test images"


def test_an_added_class_without_boxes_fails_and_the_minimum_may_be_off() -> None:
    added = {"compared": compared(added_classes={"c": 0.9, "d": None})}
    rule = rules_of(findings(**added))["minimum_added_class_map"]
    assert (rule.passed, rule.measured) == (False, "no box of d in the test images")
    assert "minimum_added_class_map" not in rules_of(findings(**added), minimum_added_class_map=None)


def test_a_removed_class_may_be_allowed() -> None:
    found = findings(compared=compared(removed_classes=("c",)))
    assert rules_of(found, allow_removed_classes=True)["allow_removed_classes"].passed
