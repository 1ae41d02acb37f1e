"""Validation of one folder in any format, outside of a run: everything is told, nothing is allowed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline_tasks.data.readers import Reader, open_reader
from pipeline_tasks.validation.datasets import examine
from pipeline_tasks.validation.judgement import JudgedSet
from pipeline_tasks.validation.limits import ValidationLimits
from pipeline_tasks.validation.plain_text import plain_text
from pipeline_tasks.validation.rules import Severity

NAMED_EXAMPLES = 3


@dataclass(frozen=True)
class FolderReport:
    """What was found in a folder."""

    reader: Reader
    judged: JudgedSet
    content: dict[str, Any]  # of validation.json

    def counts(self, severity: Severity) -> dict[str, int]:
        """Rows that break each rule of a severity, rules that nothing breaks left out."""
        found = {
            rule.name: int(table.bad[rule.name].sum())
            for table in self.judged.tables
            for rule in table.rules
            if rule.severity == severity
        }
        return {name: count for name, count in found.items() if count}

    def lines(self) -> Iterator[str]:
        """The report as lines for a terminal: each broken rule with its first cases."""
        for severity in ("error", "warning"):
            for table in self.judged.tables:
                for rule in table.rules:
                    count = int(table.bad[rule.name].sum())
                    if rule.severity == severity and count:
                        yield f"{severity} {rule.name}: {count}"
                        for entry in table.entries(rule, NAMED_EXAMPLES):
                            yield plain_text(f"  {entry['record']}: {entry['detail']}")


def validate_folder(
    path: Path,
    output: Path,
    limits: ValidationLimits,
    format: str | None = None,
    allow_links: bool = False,
    threads: int = 0,
    decode: bool = True,
) -> FolderReport:
    """Read a folder, judge it by every rule and write the report (no tables) to `output`.

    Of `limits` the thresholds count, not the shares that may be bad. Without `decode` no picture is opened. Raises
    `DataError` for a folder that cannot be read at all.
    """
    reader = open_reader(path, format, allow_links)
    role = "target" if reader.labelled else "unlabeled"
    raw = reader.read(role, name=path.resolve().name)
    strict = replace(limits, maximum_bad_images_fraction=0, maximum_bad_boxes_fraction=0, rule_fractions={})
    found = examine({role: raw}, {role: path}, strict, output, threads, publish=False, decode=decode)
    return FolderReport(reader, found.judged[role], found.content)
