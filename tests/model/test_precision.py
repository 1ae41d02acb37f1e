"""Which arithmetic a device trains in; GPUs and other processors are mocked by what torch says of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from model.precision import resolve

CPU, GPU = torch.device("cpu"), torch.device("cuda:1")


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        ({"architecture": "x86_64", "avx512_f": True, "avx512_bf16": False}, "float32"),
        ({"architecture": "x86_64", "avx512_bf16": True}, "bfloat16"),
        ({"architecture": "x86_64", "amx_bf16": True}, "bfloat16"),
        ({"architecture": "aarch64", "neon": True}, "float32"),
        ({"architecture": "aarch64", "bf16": True}, "bfloat16"),
    ],
)
def test_a_mocked_cpu(monkeypatch: pytest.MonkeyPatch, capabilities: dict[str, Any], expected: str) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert resolve("auto", CPU) == expected


@pytest.mark.parametrize(("capability", "expected"), [((7, 5), "float32"), ((8, 0), "bfloat16"), ((9, 0), "bfloat16")])
def test_a_mocked_gpu(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], expected: str) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", {GPU: capability}.__getitem__)
    assert resolve("auto", GPU) == expected


def test_this_cpu_is_asked_for_its_own_instructions() -> None:
    flags = Path("/proc/cpuinfo").read_text(encoding="utf-8").split()
    named = {"avx512_bf16", "amx_bf16", "bf16"} & set(flags)  # the last one is ARM's word
    assert resolve("auto", CPU) == ("bfloat16" if named else "float32")


@pytest.mark.parametrize("named", ["float32", "bfloat16"])
def test_what_is_named_holds_on_every_device(named: str) -> None:
    assert resolve(named, CPU) == resolve(named, torch.device("meta")) == named


def test_other_devices_and_words() -> None:
    assert resolve("auto", torch.device("meta")) == "float32"
    with pytest.raises(ValueError, match="precision must be one of auto, float32, bfloat16, got 'half'"):
        resolve("half", CPU)
