"""nvidia-smi's answers: the form of its CSV, with the values of a T4; there is no GPU here."""

from __future__ import annotations

from pathlib import Path

import pytest
from tensorrt_doubles import GPU_LINE, install_nvidia_smi

from model.engines import MissingRuntimeError
from model.engines.gpu_facts import parse_gpu_facts, parse_throttle_reasons, query_gpu


def test_facts_of_a_t4(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    install_nvidia_smi(monkeypatch, tmp_path, GPU_LINE, reasons="0x0000000000000024")
    facts = query_gpu()
    assert (facts.name, facts.driver, facts.compute_capability) == ("Tesla T4", "535.183.01", "7.5")
    assert (facts.clock_mhz, facts.maximum_clock_mhz, facts.memory_clock_mhz) == (585, 1590, 5000)
    assert (facts.temperature_celsius, facts.power_watts, facts.power_limit_watts) == (44, 26.55, 70)
    assert (facts.memory_mib, facts.utilization_percent, facts.performance_state) == (15360, 3, "P0")
    assert facts.throttle_reasons == ("power cap", "temperature (software)")
    assert facts.to_json()["name"] == "Tesla T4"


def test_what_the_driver_does_not_tell_is_none() -> None:
    line = (
        "NVIDIA L4, [N/A], 580.65.06, 8.9, [Unknown Error], 23034, [N/A], 2040, [Not Supported], 50, N/A, 72.00, [N/A]"
    )
    facts = parse_gpu_facts(line)
    told = {name: value for name, value in facts.to_json().items() if value is not None}
    assert told == {
        "name": "NVIDIA L4",
        "driver": "580.65.06",
        "compute_capability": "8.9",
        "memory_mib": 23034,
        "maximum_clock_mhz": 2040,
        "temperature_celsius": 50,
        "power_limit_watts": 72,
    }


@pytest.mark.parametrize(
    ("text", "reasons"),
    [
        ("0x0000000000000000\n", ()),
        ("0x0000000000000001", ("idle",)),
        ("0x0000000000010008", ("hardware slowdown", "unknown (0x10000)")),
        ("[N/A]", None),
    ],
)
def test_throttle_reasons(text: str, reasons: tuple[str, ...] | None) -> None:
    assert parse_throttle_reasons(text) == reasons


def test_a_driver_that_knows_no_throttle_field(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    script = tmp_path / "nvidia-smi"
    refusal = 'echo "Field is not a valid field to query."; exit 2'
    script.write_text(f'#!/bin/sh\ncase "$1" in *,*) echo "{GPU_LINE}";; *) {refusal};; esac\n')
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert query_gpu().throttle_reasons is None


def test_absence_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MissingRuntimeError, match="nvidia-smi was not found, so the GPU's driver, clocks"):
        query_gpu()
    script = tmp_path / "nvidia-smi"
    script.write_text("#!/bin/sh\necho No devices were found\nexit 6\n")
    script.chmod(0o755)
    with pytest.raises(MissingRuntimeError, match="fails for GPU 0: No devices were found"):
        query_gpu()


def test_another_answer_is_refused() -> None:
    with pytest.raises(ValueError, match="expected 13 values of nvidia-smi"):
        parse_gpu_facts("Tesla T4, 535.183.01")
