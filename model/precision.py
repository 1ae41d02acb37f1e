"""In which arithmetic a device trains best."""

from __future__ import annotations

import torch

AUTO = "auto"
PRECISIONS = (AUTO, "float32", "bfloat16")
# names of torch.cpu.get_capabilities() on x86 and ARM; without one of them bfloat16 is emulated and slower
BFLOAT16_INSTRUCTIONS = ("avx512_bf16", "amx_bf16", "bf16")
FIRST_CUDA_WITH_BFLOAT16 = (8, 0)  # compute capability (Ampere); a T4 has 7.5


def resolve(precision: str, device: torch.device) -> str:
    """What ``precision`` means on ``device``, "float32" or "bfloat16"; "auto" is the latter where the device has it.

    Raises:
        ValueError: for a precision that is none of ``PRECISIONS``.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    if precision != AUTO:
        return precision
    return "bfloat16" if computes_bfloat16(device) else "float32"


def computes_bfloat16(device: torch.device) -> bool:
    """Whether a CPU or CUDA device has instructions of its own for bfloat16; False for other kinds of devices."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= FIRST_CUDA_WITH_BFLOAT16
    if device.type != "cpu":
        return False
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in BFLOAT16_INSTRUCTIONS)
