"""The gate's rules as data: each with its limit, what was measured, where and how, and whether it passed."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

FILE = "verdict.json"


@dataclass(frozen=True)
class Rule:
    """One judged rule; `parameter` is the field of the section `gate` that sets its limit, empty if none does."""

    name: str
    limit: float | str
    measured: float | str
    unit: str
    how: str
    passed: bool
    parameter: str = ""

    def sentence(self) -> str:
        """The rule as a reader wants it: `INT8 mAP50-95: 0.412 meets the limit 0.35 (test split)`."""
        relation = "meets" if self.passed else "misses"
        unit = f" {self.unit}" if self.unit else ""
        return f"{self.name}: {_text(self.measured)} {relation} the limit {_text(self.limit)}{unit} ({self.how})"


def _text(value: float | str) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def at_least(name: str, measured: float, limit: float | None, unit: str, how: str, parameter: str = "") -> list[Rule]:
    """A rule with a lower limit; none when the limit is off."""
    return [] if limit is None else [Rule(name, limit, measured, unit, how, measured >= limit, parameter)]


def at_most(name: str, measured: float, limit: float | None, unit: str, how: str, parameter: str = "") -> list[Rule]:
    """A rule with an upper limit; none when the limit is off."""
    return [] if limit is None else [Rule(name, limit, measured, unit, how, measured <= limit, parameter)]


@dataclass(frozen=True)
class Verdict:
    """All rules, and the outcome: passed when every rule passed.

    off: parameters whose rules were switched off. remarks: what a reader must know though no rule judges it.
    """

    rules: tuple[Rule, ...]
    off: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether the engine is accepted."""
        return all(rule.passed for rule in self.rules)

    def sentence(self) -> str:
        """One line for logs, MLflow and the Airflow run: accepted, or which rules were missed and by what."""
        missed = [rule.sentence() for rule in self.rules if not rule.passed]
        outcome = "rejected: " + "; ".join(missed) if missed else f"accepted: all {len(self.rules)} rules passed"
        return "; but ".join((outcome, *self.remarks))

    def to_json(self) -> dict[str, Any]:
        """The content of verdict.json."""
        return {
            "passed": self.passed,
            "sentence": self.sentence(),
            "rules": [asdict(rule) for rule in self.rules],
            "off": list(self.off),
            "remarks": list(self.remarks),
        }
