"""What MLflow shows of a registered version, and the table of engines."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from typing import Any

import pytest
from gate_findings import DEVICE, comparison, findings, record

from model.engines.gpu_facts import parse_gpu_facts
from pipeline_tasks import version_page
from pipeline_tasks.engine_table import EngineRow, around_line, engine_table
from pipeline_tasks.gate_latency import GateLatency
from pipeline_tasks.gate_rules import judge
from pipeline_tasks.params import Parameters
from pipeline_tasks.tracking.registration import shortened

ACCURACY = {"int8": {"map50_95": 0.4123}, "float": {"map50_95": 0.4151}, "int8_map_drop_points": 0.28}


def written(latency: GateLatency, **verdict: Any) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """The gate's three files as `register` reads them."""
    content = judge(findings(), Parameters().gate).to_json()
    content |= {"target": {"target": "cpu", "runtime": "openvino"}, "champion_comparison": None, **verdict}
    told: tuple[dict[str, Any], ...] = json.loads(json.dumps([content, ACCURACY, latency.to_json()]))
    return told[0], told[1], told[2]


def test_a_page_beyond_what_the_registry_keeps_is_cut_and_says_so() -> None:
    assert shortened("x" * 5000) == "x" * 5000
    assert len(shortened("x" * 5001)) == 5000 and shortened("x" * 5001).endswith("gate/verdict.json)")


def test_tags_tell_accuracy_latency_and_where() -> None:
    tags = version_page.tags(*written(findings().latency))
    assert tags["nasline.int8_map50_95"] == "0.4123" and tags["nasline.int8_map_drop_points"] == "0.28"
    assert tags["nasline.latency_p50_ms"] == "5.000 on Test CPU" and tags["nasline.latency_p99_ms"] == "10.000"
    assert (tags["nasline.speedup"], tags["nasline.target"], tags["nasline.device"]) == ("2.00", "cpu", "Test CPU")
    assert tags["nasline.runtime"] == "openvino 2026.4.1-1" and tags["nasline.latency_noisy"] == "false"
    assert "nasline.latency_gpu_p50_ms" not in tags
    assert all(isinstance(value, str) and len(value) < 5000 for value in tags.values())


def test_page_has_the_rules_the_engines_and_the_champion() -> None:
    compared = comparison(candidate_map50_95=0.51, share_of_resamples_worse=0.2, interval_points=(-0.5, 2.5))
    page = version_page.description(*written(findings().latency, champion_comparison=compared.to_json()))
    assert page.startswith("The gate accepted: all 4 rules passed.")
    lines = [line.replace(" &emsp;", "") for line in page.splitlines()]
    assert [line for line in lines if line.startswith("| yes | mAP50-95 lost by INT8 | 0 | 1 | points |")]
    assert "| int8 | 0.4123 | int8 | 5 | 5 | 5 | 10 | 5 | 0% |" in lines
    assert "Measured on Test CPU by openvino 2026.4.1-1, 2 threads: batch 1, 320 pixels, 200 runs" in page
    assert "spread 0% in the quietest of 1 attempts. Processor: 2 cores (avx2), 2400 MHz, governor performance" in page
    assert (
        "Against yolo v1 on 40 clean test images: +1.00 points (95 % of the resamples between -0.50 and +2.50" in page
    )


def test_page_of_a_gpu_tells_its_state_before_and_after() -> None:
    line = "Tesla T4, GPU-1, 535.1, 7.5, P0, 15360, {}, 1590, 5001, {}, 68, 70, 99"
    before, after = (
        replace(DEVICE, device="Tesla T4", kind="gpu", gpu=parse_gpu_facts(line.format(*state)))
        for state in ((1590, 40), (900, "[N/A]"))
    )
    times = {"gpu_min_ms": 2.2, "gpu_p50_ms": 2.4, "gpu_p90_ms": 2.5, "gpu_p99_ms": 2.6}
    on_gpu = {"device": before, "device_after": after, **times}
    engines = {"int8": record("int8", 3.0, **on_gpu), "float": record("float", 3.0, **{**on_gpu, "p50_ms": 4.5})}
    latency = GateLatency(engines, findings().latency.processing)
    files = written(latency)
    assert (
        "Driver 535.1; before: 1590 MHz, 40 °C, 68 W; after: 900 MHz, not told °C, 68 W."
        in version_page.description(*files)
    )
    assert version_page.tags(*files)["nasline.latency_gpu_p50_ms"] == "2.400"
    page = version_page.description(*files).replace(" &emsp;", "")
    assert "GPU p50 ms | GPU p90 ms | GPU p99 ms |" in page
    assert "| 2.2 | 2.4 | 2.5 | 2.6 | 0% |" in page
    assert version_page.tags(*files)["nasline.speedup"] == "1.50", "a GPU's minimum is the burst of a cool chip"
    assert latency.speedup == 1.5


@pytest.mark.parametrize("name", ["int8", "float"])
def test_noise_that_no_rule_judged_is_told_where_a_verdict_is_read(name: str) -> None:
    times = {"int8": 5.0, "float": 10.0}
    engines = {one: record(one, value, noisy=one == name, spread=0.9 * (one == name)) for one, value in times.items()}
    made = findings(latency=GateLatency(engines, findings().latency.processing))
    judged = judge(made, Parameters().gate)
    assert judged.sentence() == (
        "accepted: all 4 rules passed; but the measured times are noise, not to be relied on "
        f"(spread of {name} 90%; limit 50%)"
    )
    files = written(made.latency, **judged.to_json())
    assert files[0]["remarks"] == list(judged.remarks) and files[0]["passed"]
    page = version_page.description(*files)
    assert page.startswith(f"The gate {judged.sentence()}.")
    (row,) = [line for line in page.splitlines() if line.startswith(f"| {name} ")]
    assert row.endswith("| 90%, **noisy** |") and page.count("**noisy**") == 1
    assert version_page.tags(*files)["nasline.latency_noisy"] == "true"


def test_table_has_a_row_for_each_engine_and_no_empty_column() -> None:
    rows = [EngineRow(record("int8", 5.0), 0.4), EngineRow(record("float", 10.0, noisy=True, spread=0.9), 0.41)]
    device, heading, first, second = engine_table(rows)
    assert device == "Test CPU, 2 CPU cores, load 0.1; 200 runs each, interleaved, after 1 s of warm-up"
    assert "GPU p50" not in heading and "mAP50-95" in heading
    assert first.split()[:3] == ["int8", "(openvino", "2026.4.1)"] and "0.4000" in first
    assert "90% noisy" in second
    assert "mAP50-95" not in engine_table([EngineRow(rows[0].record)])[1]
    on_gpu = engine_table([EngineRow(record("int8", 5.0, gpu_p50_ms=3.25))])
    assert "GPU p50" in on_gpu[1] and "3.25" in on_gpu[2]
    assert len({len(line) for line in (heading, first)}) == 1
    assert engine_table([EngineRow(rows[0].record, 0.4, "its gate")])[2].endswith("0.4000  its gate")
    around = around_line(findings().latency.processing)
    assert around == "around it, for one picture (median): preprocessing 0.20 ms, postprocessing 0.20 ms"
    assert asdict(rows[0])["map50_95"] == 0.4
