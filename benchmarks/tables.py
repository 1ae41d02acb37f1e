"""Writes docs/benchmarks.md: every table of the benchmarks, from their stored rows.

    python benchmarks/tables.py

Nothing is measured. A row that is missing is missing in the table, which says so.
"""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import (
    against_yolov8n,
    annotation_reading,
    data_at_size,
    engine_speed,
    inference_cost,
    orchestration,
    quantization_accuracy,
    repvgg_table,
    runtime_agreement,
    soak,
    stages,
)
from benchmarks.rows import Rows

PAGE = Path(__file__).resolve().parent.parent / "docs" / "benchmarks.md"
HEADING = """# Benchmarks

Written by `benchmarks/tables.py` from the rows in `benchmarks/results/`; every script there keeps a row as soon as it
is finished, and measures only what is missing. A row names its seed, machine and commit. One seed is an observation,
not a claim. Intervals are paired bootstraps over test images (Efron & Tibshirani 1993, chapter 16).
"""


@dataclass(frozen=True)
class Section:
    """One table: its title, the script whose name its rows bear, what the reader has to know, and the table."""

    title: str
    script: str
    text: str
    table: Callable[[], str]


SECTIONS = (
    Section(
        "Against YOLOv8n, both from scratch",
        "against_yolov8n",
        "320 px, one thread, no loader processes; epochs chosen once so that a run takes about ten CPU minutes "
        "(validation included) and ours no longer than the peer's; ours in bfloat16, which the peer refuses on a CPU. "
        "Tuned: on both sides the learning rate of three that finds most on the set's validation images; the peer also "
        "gets every batch a step, a warm-up of one epoch, AdamW. Ours also stand there with as many epochs as the peer "
        "has, in less time (of twice the time on bccd only so); a recipe whose tries are not complete is left out. "
        "Figures are of the test split, which nobody chose anything on.",
        against_yolov8n.table,
    ),
    Section(
        "What a call costs",
        "inference_cost",
        "OpenVINO FP32 engines of both sides, batch 1, in turns in one process.",
        inference_cost.table,
    ),
    Section(
        "What each stage brings",
        "stages",
        "The pipeline's own steps, one parameter changed; the student is `pico`, the teacher `t`, 224 px. Gains are "
        "points of test mAP50-95 against the row `labels` of the same half.",
        stages.table,
    ),
    Section(
        "What INT8 costs in accuracy",
        "quantization_accuracy",
        "Points of test mAP50-95 lost against the float engine (negative: gained), OpenVINO, whole test splits.",
        lambda: quantization_accuracy.table(quantization_accuracy.NETWORKS, trial=False),
    ),
    Section(
        "RepVGG against QARepVGG blocks",
        "repvgg_table",
        "The same network with either block, quantized in the same ways; points lost against float (negative: gained).",
        lambda: repvgg_table.table(repvgg_table.NETWORKS, trial=False),
    ),
    Section(
        "One INT8 file, four runtimes",
        "runtime_agreement",
        "Against torch's fake quantization on 200 photographs of bccd; the limits are 0.3 pixels of mean box error on "
        "confident anchors and 0.5 points of mAP50-95.",
        runtime_agreement.table,
    ),
    Section(
        "How much faster INT8 is",
        "engine_speed",
        "Shortest wall and processor time of a call, all forms in turns in one process.",
        engine_speed.table,
    ),
    Section(
        "Reading an annotation file",
        "annotation_reading",
        "A generated file in Objects365's form, each reader in a process of its own; the peak is above what it had "
        "after its imports. pycocotools needs some 20 GB for the whole file and was not started on it.",
        annotation_reading.table,
    ),
    Section(
        "Data at the size of Objects365",
        "data_at_size",
        "Validation without decoding and publication of the tables, opening them, 8 processes that go through all "
        "boxes at once, the check of pictures at 640 pixels with one thread, and the search for near duplicates.",
        data_at_size.table,
    ),
    Section(
        "What Airflow costs",
        "orchestration",
        "Between two steps: from the end of the one process to the moment at which the next one's has loaded what the "
        "command loads before it looks at its step; a real standalone with the LocalExecutor, steps without work. "
        "Load: processes that want one of the two cores.",
        orchestration.table,
    ),
    Section(
        "Steps killed at random",
        "soak",
        "The typed chain with `pico` at 64 px; SIGKILL or SIGTERM to a step, to a process below it or to all of them, "
        "at random moments. After every kill the workspace is looked at, and a round that comes to its end is compared "
        "with a chain that nobody disturbed: every weight, table and metric, the gate's accuracy, the registry. A "
        "fault is whatever was not as it should be. Seven of the eight have been repaired since: SIGTERM while a "
        "library was imported or exported, told as a crash, and a kill that left MLflow's SQLite database with half of "
        "its tables. The eighth, a traceback in the words of a step that ended well, was not met again.",
        soak.table,
    ),
)


def page() -> str:
    """The whole page as Markdown."""
    return "\n".join([HEADING, *(_section(section) for section in SECTIONS)])


def _section(section: Section) -> str:
    rows = Rows(section.script).all()
    machines = "; ".join(sorted({row["machine"] for row in rows}))
    where = f"{len(rows)} rows, measured on {machines}." if rows else "No row has been measured yet."
    table = section.table() if rows else ""
    text = textwrap.fill(f"`benchmarks/{section.script}.py`. {section.text} {where}", 118)
    parts = [f"## {section.title}", text, table]
    return "\n\n".join(part for part in parts if part) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
