"""What came of a run that was repeated: its numbers, recorded and reproduced, and its files."""

from __future__ import annotations

import math
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline_tasks.text_table import aligned

TIMES = re.compile(r"(_ms|_s|_seconds|per_second|speed_?up|power|clock|megahertz)\b|latency|speed")
"""Numbers that no two runs share."""
CHOSEN_BY_TIMES = {
    "quantize": ("float_layers", "quantized_layers"),
    "export": ("quantized_convolutions", "megabytes"),
}
"""Numbers that follow from times: `quantize` looks for the layers that are worth their time in float."""
TIMED_FILES = {
    "quantize": (
        "checkpoint/quantized.json",
        "frontier.csv",
        "frontier.json",
        "plots/frontier.png",
        "sensitivity.json",
    ),
    "export": ("engine/engine.json",),
    "gate": ("latency.json",),
}
"""Files that hold times, or the digest of one that does."""


@dataclass(frozen=True)
class ComparedNumber:
    """One number of a step's summary, as the run recorded it and as it is now; None where it is missing now."""

    step: str
    name: str
    recorded: float
    reproduced: float | None

    @property
    def is_time(self) -> bool:
        return TIMES.search(self.name) is not None

    @property
    def judged(self) -> bool:
        """Whether a difference counts: not of times, nor of what was chosen by them."""
        return not self.is_time and self.name not in CHOSEN_BY_TIMES.get(self.step, ())

    @property
    def difference(self) -> float | None:
        """Reproduced minus recorded; 0 for two that are not a number."""
        if self.reproduced is None:
            return None
        if self.recorded == self.reproduced or (math.isnan(self.recorded) and math.isnan(self.reproduced)):
            return 0.0
        return self.reproduced - self.recorded

    def within(self, tolerance: float) -> bool:
        """Whether both are the same, up to a difference of `tolerance`."""
        return self.difference is not None and abs(self.difference) <= tolerance

    def verdict(self, tolerance: float) -> str:
        """In words: equal, close, different, or not to be compared."""
        if not self.judged and self.difference != 0:
            return "a time, not compared" if self.is_time else "chosen by times, not compared"
        if self.difference == 0:
            return "equal"
        if self.reproduced is None:
            return "IS MISSING"
        return f"within {tolerance:g}" if self.within(tolerance) else f"DIFFERS by more than {tolerance:g}"


@dataclass(frozen=True)
class Reproduction:
    """What came of it."""

    run: str
    workspace: Path
    code: str
    steps: dict[str, tuple[str, ...] | None]
    """Published files that are not the same to the bit; None where the first run's output is gone."""
    numbers: list[ComparedNumber]

    def differing(self, tolerance: float) -> list[ComparedNumber]:
        """Numbers that count and differ by more."""
        return [one for one in self.numbers if one.judged and not one.within(tolerance)]

    def to_json(self) -> dict[str, Any]:
        """For reproduction.json; numbers that are none or infinite are null."""
        numbers = [{**asdict(one), "difference": one.difference, "judged": one.judged} for one in self.numbers]
        return {
            "run": self.run,
            "workspace": str(self.workspace),
            "code_version": self.code,
            "differing_files": self.steps,
            "numbers": [
                {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in n.items()} for n in numbers
            ],
        }


def text(found: Reproduction, tolerance: float) -> str:
    """The comparison for a reader: every step, every number, and what follows."""
    lines = [f"run {found.run} repeated by code {found.code}"]
    lines += aligned([(f"  {step}", _files(step, differing)) for step, differing in found.steps.items()])
    if found.numbers:
        lines += aligned([("  number", "recorded", "reproduced", "difference", ""), *_rows(found, tolerance)])
    return "\n".join([*lines, *_hint(found), _conclusion(found, tolerance)])


def _files(step: str, differing: tuple[str, ...] | None) -> str:
    if differing is None:
        return "no files to compare with; its numbers are below"
    timed = [name for name in differing if name in TIMED_FILES.get(step, ())]
    others = [name for name in differing if name not in timed]
    if others:
        return f"{len(differing)} files with other bytes: {', '.join(others[:3])}{' ...' if len(differing) > 3 else ''}"
    return f"the same to the bit, but for the times in {', '.join(timed)}" if timed else "the same to the bit"


def _rows(found: Reproduction, tolerance: float) -> list[tuple[str, ...]]:
    return [
        (
            f"  {one.step} {one.name}",
            f"{one.recorded:.6g}",
            "-" if one.reproduced is None else f"{one.reproduced:.6g}",
            "-" if one.difference is None else f"{one.difference:.3g}",
            one.verdict(tolerance),
        )
        for one in found.numbers
    ]


def _hint(found: Reproduction) -> list[str]:
    """Why numbers behind `quantize` may differ though nothing is wrong."""
    if not any(not one.judged and not one.is_time and one.difference for one in found.numbers):
        return []
    return [
        "quantize chose other layers for float, by times that it measured; numbers behind it may differ for that. "
        "With quantize.selection_evaluations 0 a run does not look for layers by time"
    ]


def _conclusion(found: Reproduction, tolerance: float) -> str:
    judged = [one for one in found.numbers if one.judged]
    differing, equal = len(found.differing(tolerance)), sum(one.difference == 0 for one in judged)
    others = len(found.numbers) - len(judged)
    rest = f"; {others} times, or chosen by times, are not compared" if others else ""
    if differing:
        return f"NOT reproduced: {differing} of {len(judged)} numbers differ by more than {tolerance:g}{rest}"
    close = f", {len(judged) - equal} within {tolerance:g}" if equal < len(judged) else ""
    return f"reproduced: of {len(judged)} numbers {equal} are equal to the bit{close}{rest}"
