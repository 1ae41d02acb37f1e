"""Engines side by side, as the gate and `nasline bench` print them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from model.engines.latency import LatencyRecord
    from model.engines.processing_time import ProcessingRecord

COLUMNS = (
    "precision", "pixels", "batch", "threads", "min", "p50", "p90", "p99", "CPU min", "GPU p50", "spread", "mAP50-95",
    "mAP of",
)  # fmt: skip


@dataclass(frozen=True)
class EngineRow:
    """One engine: its latency, and its mAP50-95 where it was measured; map_of: on what, where rows differ in it."""

    record: LatencyRecord
    map50_95: float | None = None
    map_of: str = ""


def engine_table(rows: Sequence[EngineRow]) -> list[str]:
    """The lines to print: where it was measured, a heading, and a row for each engine; times in milliseconds."""
    first = rows[0].record
    device = f"{first.device.device}, {first.device.cores} CPU cores, load {first.device.load:.1f}"
    how = f"{first.repeats} runs each, interleaved, after {first.warmup_seconds:g} s of warm-up"
    names = [f"{row.record.name} ({row.record.runtime} {_short(row.record.runtime_version)})" for row in rows]
    columns = [("engine, times in ms", *names)]
    cells = [_cells(row) for row in rows]
    columns += [column for column in zip(COLUMNS, *cells, strict=True) if any(column[1:])]
    return [f"{device}; {how}", *_aligned(columns)]


def around_line(processing: Mapping[str, ProcessingRecord]) -> str:
    """What a picture costs before and behind the network, which the table's times leave out."""
    parts = [f"{name} {record.p50_ms:.2f} ms" for name, record in processing.items()]
    return f"around it, for one picture (median): {', '.join(parts)}"


def _cells(row: EngineRow) -> tuple[str, ...]:
    record = row.record
    gpu = "" if record.gpu_p50_ms is None else f"{record.gpu_p50_ms:.2f}"
    times = (record.min_ms, record.p50_ms, record.p90_ms, record.p99_ms, record.cpu_min_ms)
    noise = f"{record.spread:.0%}{' noisy' if record.noisy else ''}"
    accuracy = "" if row.map50_95 is None else f"{row.map50_95:.4f}"
    what = (record.precision, str(record.input_size), str(record.batch), str(record.threads or "all"))
    return (*what, *(f"{value:.2f}" for value in times), gpu, noise, accuracy, row.map_of)


def _aligned(columns: Sequence[Sequence[str]]) -> list[str]:
    """The first column to the left, the others to the right."""
    widths = [max(len(cell) for cell in column) for column in columns]
    return [
        "  ".join(cell.ljust(width) if not place else cell.rjust(width) for place, (cell, width) in enumerate(pairs))
        for pairs in (zip(line, widths, strict=True) for line in zip(*columns, strict=True))
    ]


def _short(version: str) -> str:
    """`2026.4.1-22982-...` as `2026.4.1`."""
    return version.partition("-")[0]
