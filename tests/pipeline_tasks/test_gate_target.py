"""The gate measures only on the device it names."""

from __future__ import annotations

from dataclasses import replace

import pytest

from model.engines import MissingRuntimeError, gpu_facts
from model.engines.gpu_facts import GpuFacts, parse_gpu_facts
from pipeline_tasks.errors import ConfigurationError
from pipeline_tasks.gate_target import differences_from_t4, require_target

LINE = "Tesla T4, GPU-1, 535.183.01, 7.5, P0, 15360, 1590, 1590, 5001, 45, 68.1, 70, 99"
T4 = replace(parse_gpu_facts(LINE), multiprocessors=40)


def here(monkeypatch: pytest.MonkeyPatch, facts: GpuFacts | None) -> None:
    def answer() -> GpuFacts:
        if facts is None:
            raise MissingRuntimeError("no CUDA device can be used (there is none)")
        return facts

    monkeypatch.setattr(gpu_facts, "current_gpu", answer)


@pytest.mark.parametrize("name", ["Tesla T4", "NVIDIA T4", "T4"])
def test_a_t4_is_a_t4(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    here(monkeypatch, replace(T4, name=name))
    require_target("t4")
    require_target("gpu")


@pytest.mark.parametrize(
    ("facts", "told"),
    [
        (replace(T4, name="NVIDIA T4G"), "its name is 'NVIDIA T4G'"),
        (replace(T4, name="NVIDIA T400"), "its name is 'NVIDIA T400'"),
        (replace(T4, compute_capability="9.0"), "its compute capability is 9.0, not 7.5"),
        (replace(T4, multiprocessors=68), "it has 68 multiprocessors, not 40"),
        (replace(T4, multiprocessors=None), "it has None multiprocessors, not 40"),
    ],
)
def test_what_is_no_t4_is_refused_and_the_way_to_one_is_shown(
    monkeypatch: pytest.MonkeyPatch, facts: GpuFacts, told: str
) -> None:
    assert differences_from_t4(facts) == [told]
    here(monkeypatch, facts)
    with pytest.raises(ConfigurationError, match=r"gate\.target is t4, but the device here is no T4") as refused:
        require_target("t4")
    assert told in str(refused.value) and "queue t4" in str(refused.value) and "docs/deploy.md" in str(refused.value)
    assert refused.value.exit_code == 78
    require_target("gpu")  # another GPU is a GPU


@pytest.mark.parametrize("target", ["gpu", "t4"])
def test_without_a_gpu_the_reason_is_told(monkeypatch: pytest.MonkeyPatch, target: str) -> None:
    here(monkeypatch, None)
    with pytest.raises(ConfigurationError, match=f"gate.target is {target}, but no CUDA device") as refused:
        require_target(target)  # type: ignore[arg-type]
    assert ("queue t4" in str(refused.value)) == (target == "t4")
    require_target("cpu")
