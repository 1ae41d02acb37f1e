"""The gate's rules, from what was measured to the verdict. Nothing is measured here."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline_tasks import champion
from pipeline_tasks.export import INT8_FILE
from pipeline_tasks.verdict import Rule, Verdict, at_least, at_most

if TYPE_CHECKING:
    from model.engines.agreement import AgreementReport
    from model.evaluation import DetectionMetrics
    from pipeline_tasks.gate_latency import GateLatency
    from pipeline_tasks.gate_parameters import GateParameters
    from pipeline_tasks.seen_images import Exclusion

NAMED_LAYERS = 3
NOT_RECORDED = "none is recorded"
LICENCE_KINDS = ("image", "annotation", "weights")


@dataclass(frozen=True)
class Findings:
    """All that the gate has measured. metrics: of the engines `int8` and `float` on the test split.

    precision: that of the built INT8 engine. float_instead: layers that it runs in float though `quantize` made them
    INT8. agreement: of that engine with the exported file run literally;
    torch_error_px: of that file with its torch network, as `export` measured it, None where it was not told. licences:
    what the engine descends from, by kind. learned: test images like those that it has learned from; no rule, but it
    tells what the mAP is worth.
    """

    metrics: dict[str, DetectionMetrics]
    latency: GateLatency
    agreement: AgreementReport
    precision: str
    float_instead: tuple[str, ...]
    megabytes: float
    licences: dict[str, set[str]]
    compared: champion.Comparisons | None
    learned: tuple[Exclusion, ...] = ()
    torch_error_px: float | None = None

    @property
    def map_drop_points(self) -> float:
        """mAP50-95 that INT8 loses against float."""
        return 100 * (self.metrics["float"].map50_95 - self.metrics["int8"].map50_95)


def judge(found: Findings, given: GateParameters) -> Verdict:
    """Every rule that is on, in the order of docs/gate.md."""
    limits = _Limits(given)
    rules = (
        *_accuracy(found, given, limits),
        *_faithfulness(found, given),
        *_latency(found, limits),
        *limits.at_most("maximum_size_megabytes", "INT8 file size", found.megabytes, "MB", INT8_FILE),
        *_licences(found, given),
        *champion.rules(found.compared, given),
    )
    return Verdict(rules, switched_off(given), _noise(found.latency))


@dataclass(frozen=True)
class _Limits:
    """Rules with a number for a limit, by the name of their parameter."""

    given: GateParameters

    def at_most(self, parameter: str, name: str, measured: float, unit: str, how: str) -> list[Rule]:
        return at_most(name, measured, getattr(self.given, parameter), unit, how, parameter)

    def at_least(self, parameter: str, name: str, measured: float, unit: str, how: str) -> list[Rule]:
        return at_least(name, measured, getattr(self.given, parameter), unit, how, parameter)


def switched_off(given: GateParameters) -> tuple[str, ...]:
    """Parameters that would set a limit and are empty."""
    return tuple(f"gate.{name}" for name, value in given if value is None)


def engine_licences(engine_folder: Path) -> dict[str, set[str]]:
    """What an engine descends from, by kind."""
    lineage = json.loads((engine_folder / "engine.json").read_text(encoding="utf-8"))["lineage"]
    images = {name for counts in lineage["images"].values() for name in counts}
    return {"image": images, "annotation": set(lineage["annotations"]), "weights": set(lineage["weights"])}


def _accuracy(found: Findings, given: GateParameters, limits: _Limits) -> list[Rule]:
    where = f"test split, {given.engine_runtime} on {given.target}"
    return [
        *limits.at_least("minimum_map", "INT8 mAP50-95", found.metrics["int8"].map50_95, "", where),
        *limits.at_most("maximum_map_drop", "mAP50-95 lost by INT8", found.map_drop_points, "points", where),
        *_class_drop(found.metrics, given, where),
    ]


def _class_drop(metrics: dict[str, DetectionMetrics], given: GateParameters, where: str) -> list[Rule]:
    """The class that loses most, of those with enough boxes to tell; without such a class nothing is shown."""
    limit, least, parameter = given.maximum_class_map_drop, given.minimum_class_boxes, "maximum_class_map_drop"
    if limit is None:
        return []
    plain, rounded = metrics["float"].per_class, metrics["int8"].per_class
    drops = {
        name: 100 * (accuracy.ap50_95 - rounded[name].ap50_95)
        for name, accuracy in plain.items()
        if accuracy.boxes >= least and not math.isnan(accuracy.ap50_95)
    }
    name = "AP50-95 lost by a class"
    if not drops:
        return [Rule(name, limit, f"no class has {least} boxes", "points", where, False, parameter)]
    worst = max(drops, key=lambda one: drops[one])
    how = f"{worst}, {plain[worst].boxes} boxes, {len(plain) - len(drops)} classes have fewer than {least}; {where}"
    return at_most(name, drops[worst], limit, "points", how, parameter)


def _faithfulness(found: Findings, given: GateParameters) -> list[Rule]:
    """Does the built engine run in INT8, and does it compute what the torch network does?

    In two legs, each with a limit of its own: `export` has compared the file with the network and publishes nothing
    beyond `export.maximum_box_error_pixels`; here the built engine is compared with the file.
    """
    agreement, limit = found.agreement, given.maximum_box_error_pixels
    anchors = f"{agreement.images} test images, {agreement.confident_anchors} confident anchors"
    from_torch = "" if found.torch_error_px is None else f", itself {found.torch_error_px:.3g} pixels from torch"
    compared = f"{anchors}, against {INT8_FILE} run literally{from_torch}"
    runtime, parameter = given.engine_runtime, "maximum_box_error_pixels"
    rules = [_int8(found, runtime)]
    if limit is not None and not agreement.confident_anchors:
        nothing = f"no score above {agreement.confident_score:g}"
        return [*rules, Rule("box error", limit, nothing, "pixels", compared, False, parameter)]
    return [*rules, *at_most("box error", agreement.box_error_mean_px, limit, "pixels", compared, parameter)]


def _int8(found: Findings, runtime: str) -> Rule:
    """Every layer that `quantize` meant to be INT8 must be: one alone would make the engine INT8 in name only."""
    layers, name = found.float_instead, "precision of the built engine"
    if found.precision == "int8" and layers:
        how = f"{runtime}, {', '.join(layers[:NAMED_LAYERS])}{' and others' if len(layers) > NAMED_LAYERS else ''}"
        return Rule(name, "int8", f"float in {len(layers)} layers that should be int8", "", how, False)
    return Rule(name, "int8", found.precision, "", runtime, found.precision == "int8")


def _latency(found: Findings, limits: _Limits) -> list[Rule]:
    record = found.latency.engines["int8"]
    threads = f"{record.threads or 'all'} threads, " if record.device.kind == "cpu" else ""
    timed = f"{record.device.device}, {threads}batch {record.batch}, {record.repeats} runs, interleaved"
    return [
        *limits.at_most("maximum_latency_ms", "INT8 latency p50", record.p50_ms, "ms", timed),
        *limits.at_most("maximum_latency_p99_ms", "INT8 latency p99", record.p99_ms, "ms", timed),
        *limits.at_least("minimum_speedup", "speed-up over float", found.latency.speedup, "times", timed),
    ]


def _noise(latency: GateLatency) -> tuple[str, ...]:
    """Of a record that no rule may judge, and that none has judged."""
    noisy = [f"{name} {record.spread:.0%}" for name, record in latency.engines.items() if record.noisy]
    limit = max(record.spread_limit for record in latency.engines.values())
    told = f"the measured times are noise, not to be relied on (spread of {', '.join(noisy)}; limit {limit:.0%})"
    return (told,) if noisy else ()


def _licences(found: Findings, given: GateParameters) -> list[Rule]:
    """Each kind apart; a licence that is not listed, or unknown, is not accepted."""
    rules = []
    for kind in LICENCE_KINDS:
        parameter = f"require_{kind}_licence"
        accepted = getattr(given, parameter)
        if accepted is not None:
            refused = sorted((found.licences[kind] or {NOT_RECORDED}) - set(accepted))
            measured = "not accepted: " + ", ".join(refused) if refused else "policy satisfied"
            how = "lineage of the engine"
            rules.append(Rule(f"{kind} licences", ", ".join(accepted), measured, "", how, not refused, parameter))
    return rules
