"""What a registered version says of itself in MLflow: tags to filter by, and a page to read. From the gate's files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pipeline_tasks.champion import CERTAIN_SHARE
from pipeline_tasks.gate_latency import speedup

Content = Mapping[str, Any]
PERCENTILES = ("min", "p50", "p90", "p99")


def tags(verdict: Content, accuracy: Content, latency: Content) -> dict[str, str]:
    """Tags of the model version; times are of one image of the named size, inference alone."""
    int8, plain = latency["int8"], latency["float"]
    on_gpu = {} if int8["gpu_p50_ms"] is None else {"nasline.latency_gpu_p50_ms": f"{int8['gpu_p50_ms']:.3f}"}
    return {
        "nasline.verdict": verdict["sentence"],
        "nasline.int8_map50_95": f"{accuracy['int8']['map50_95']:.4f}",
        "nasline.float_map50_95": f"{accuracy['float']['map50_95']:.4f}",
        "nasline.int8_map_drop_points": f"{accuracy['int8_map_drop_points']:.2f}",
        "nasline.target": verdict["target"]["target"],
        "nasline.device": int8["device"]["device"],
        "nasline.runtime": f"{int8['runtime']} {int8['runtime_version']}",
        "nasline.precision": int8["precision"],
        "nasline.input_size": str(int8["input_size"]),
        "nasline.latency_min_ms": f"{int8['min_ms']:.3f}",
        "nasline.latency_p50_ms": f"{int8['p50_ms']:.3f} on {int8['device']['device']}",
        "nasline.latency_p99_ms": f"{int8['p99_ms']:.3f}",
        **on_gpu,
        "nasline.speedup": f"{speedup(plain, int8):.2f}",
        "nasline.latency_noisy": str(int8["noisy"] or plain["noisy"]).lower(),
    }


def description(verdict: Content, accuracy: Content, latency: Content) -> str:
    """The version's page, in Markdown: the rules, those that were missed first, and what was measured where."""
    columns = ("name", "measured", "limit", "unit", "how")
    judged = sorted(verdict["rules"], key=lambda rule: bool(rule["passed"]))
    rules = [("yes" if rule["passed"] else "**no**", *(rule[column] for column in columns)) for rule in judged]
    engines = [_engine(name, accuracy[name], latency[name]) for name in ("int8", "float")]
    around = [(name, latency[name]["p50_ms"], latency[name]["what"]) for name in ("preprocessing", "postprocessing")]
    parts = [
        f"The gate {verdict['sentence']}.",
        _table(("passed", "rule", "measured", "limit", "unit", "how"), rules),
        *_champion(verdict),
        "**Engines**",
        _table(("engine", "mAP50-95", "precision", *_times(latency["int8"]), "spread"), engines),
        _table(("around it", "p50 ms", "what"), around),
        _place(latency["int8"]),
    ]
    return "\n\n".join(parts)


def _times(record: Content) -> dict[str, str]:
    """Heading and field of the times that were measured."""
    on_gpu = {} if record["gpu_p50_ms"] is None else {f"GPU {name} ms": f"gpu_{name}_ms" for name in PERCENTILES}
    return {**{f"{name} ms": f"{name}_ms" for name in PERCENTILES}, "CPU min ms": "cpu_min_ms", **on_gpu}


def _engine(name: str, accuracy: Content, record: Content) -> tuple[Any, ...]:
    times = (record[field] for field in _times(record).values())
    spread = f"{record['spread']:.0%}{', **noisy**' if record['noisy'] else ''}"
    return (name, accuracy["map50_95"], record["precision"], *times, spread)


def _place(record: Content) -> str:
    """Device, runtime and state, as far as they were told."""
    device, gpu = record["device"], record["device"]["gpu"]
    threads = f", {record['threads'] or 'all'} threads" if device["kind"] == "cpu" else ""
    sentences = [
        f"Measured on {device['device']} by {record['runtime']} {record['runtime_version']}{threads}: batch "
        f"{record['batch']}, {record['input_size']} pixels, {record['repeats']} runs after "
        f"{record['warmup_seconds']:g} s of warm-up, engines in turns; spread {record['spread']:.0%} in the quietest "
        f"of {record['repetitions']} attempts{', noisy' if record['noisy'] else ''}.",
        _processor(device),
    ]
    if gpu:
        after = record["device_after"]["gpu"]
        states = [
            f"{_value(one['clock_mhz'])} MHz, {_value(one['temperature_celsius'])} °C, {_value(one['power_watts'])} W"
            for one in (gpu, after)
        ]
        sentences.append(f"Driver {gpu['driver']}; before: {states[0]}; after: {states[1]}.")
    return " ".join(sentences)


def _processor(device: Content) -> str:
    sets = ", ".join(device["instruction_sets"]) or "no vector instructions told"
    return (
        f"Processor: {device['cores']} cores ({sets}), {_value(device['clock_mhz'])} MHz, governor "
        f"{_value(device['clock_governor'])}, load {device['load']:.1f}."
    )


def _champion(verdict: Content) -> list[str]:
    compared = verdict["champion_comparison"]
    if not compared or compared["difference_points"] is None:
        return []
    low, high = compared["interval_points"]
    share = compared["share_of_resamples_worse"]
    certain = "; surely worse" if share >= CERTAIN_SHARE else ""
    return [
        f"Against {compared['champion']} on {compared['images']} clean test images: "
        f"{compared['difference_points']:+.2f} points (95 % of the resamples between {low:+.2f} and {high:+.2f}, worse "
        f"in {share:.0%}{certain})."
    ]


def _table(heading: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """MLflow's pages leave no space between the columns, so each cell but the last ends in some of its own."""
    texts = [[str(_value(cell)).replace("|", "\\|") for cell in row] for row in (heading, *rows)]
    first, *others = [" | ".join([*(f"{text} &emsp;" for text in row[:-1]), row[-1]]) for row in texts]
    return "\n".join(f"| {line} |" for line in (first, " | ".join(["---"] * len(heading)), *others))


def _value(value: Any) -> str:
    if value is None:
        return "not told"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
