"""The picture of `nasline bench`: accuracy over latency, and the frontier of what was measured."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline_tasks.published_latency import DEVICE, PublishedLatency

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FAMILY_COLOURS = ("tab:orange", "tab:green", "tab:olive", "tab:purple", "tab:brown", "tab:cyan")
SIZE_INCHES = (10.0, 7.0)
TITLE_SIZE, LEGEND_SIZE = 11, 8
TITLE_POINTS = 640.0
COLUMN_POINTS = {2: 315.0, 1: 660.0}
"""Room for the text of an entry in a legend of so many columns, in points (72 to an inch)."""
USUAL_LINES = 8
"""Of a legend, for which the picture has room; more make it higher."""
LINE_INCHES = 0.165
TICKS_MS = tuple(step * 10.0**power for power in range(-2, 4) for step in (1, 2, 3, 5, 7))


@dataclass(frozen=True)
class Point:
    """An engine in the picture; map50_95 from 0 to 1, None where it is not known; batch: images of one call."""

    name: str
    latency_ms: float
    map50_95: float | None
    batch: int = 1


def frontiers(points: Sequence[Point]) -> list[list[Point]]:
    """The frontier of each batch, the smallest first: times of calls on more and on fewer images do not compare."""
    return [frontier([point for point in points if point.batch == batch]) for batch in _batches(points)]


def frontier(points: Sequence[Point]) -> list[Point]:
    """The engines that no other beats in both, from the fastest; those of unknown accuracy are not among them."""
    best: list[Point] = []
    known = [point for point in points if point.map50_95 is not None]
    for point in sorted(known, key=lambda one: (one.latency_ms, -(one.map50_95 or 0.0))):
        if not best or (point.map50_95 or 0.0) > (best[-1].map50_95 or 0.0):
            best.append(point)
    return best


def draw_bench(
    points: Sequence[Point], published: Sequence[PublishedLatency], latency: str, device: str, path: Path
) -> None:
    """Write the picture; `latency` says which time is drawn. Raises ValueError without a point."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if not points:
        raise ValueError("no engine was measured, so there is nothing to draw")
    figure = Figure(figsize=SIZE_INCHES, dpi=100, layout="constrained")
    axes = figure.subplots()
    _draw_published(axes, published)
    _draw_measured(axes, points)
    _set_scale(axes, [point.latency_ms for point in points] + [row.latency_ms for row in published])
    apart = f"\nhollow: published for the {DEVICE} and COCO, not measured here" if published else ""
    batches = " and ".join(map(str, _batches(points)))
    title = wrapped(
        f"Latency of one call and accuracy, batch {batches}, measured on {device}", TITLE_POINTS, TITLE_SIZE
    )
    axes.set_title(title + apart, fontsize=TITLE_SIZE)
    axes.set(xlabel=f"{latency} [ms], logarithmic", ylabel="mAP50-95 [points]")
    axes.margins(y=0.1)
    axes.grid(alpha=0.3)
    _draw_legend(figure, axes)
    path.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure).print_figure(path, metadata={"Software": None})  # without a date: equal plots, equal files


def wrapped(text: str, points: float, size: float) -> str:
    """The text in lines that are no wider, broken behind a blank or a slash where there is one."""
    lines: list[str] = [""]
    for piece in re.findall(r"[^\s/]*[\s/]?", text):
        if lines[-1] and _width(lines[-1] + piece.rstrip(), size) > points:
            lines.append("")
        for letter in piece:  # a piece may be wider than a line
            if lines[-1] and _width(lines[-1] + letter, size) > points and not letter.isspace():
                lines.append("")
            lines[-1] += letter
    return "\n".join(line.rstrip() for line in lines)


def _width(text: str, size: float) -> float:
    """In points, in the font of the picture."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import text_to_path

    return float(text_to_path.get_text_width_height_descent(text, FontProperties(size=size), ismath=False)[0])


def _draw_legend(figure: Figure, axes: Axes) -> None:
    """Below the picture; names that are too long for two columns take one, in as many lines as they need."""
    handles, labels = axes.get_legend_handles_labels()
    columns = 2 if all(_width(label, LEGEND_SIZE) <= COLUMN_POINTS[2] for label in labels) else 1
    texts = [wrapped(label, COLUMN_POINTS[columns], LEGEND_SIZE) for label in labels]
    lines = sum(text.count("\n") + 1 for text in texts) // columns
    figure.set_figheight(SIZE_INCHES[1] + max(0, lines - USUAL_LINES) * LINE_INCHES)
    legend = figure.legend(handles, texts, loc="outside lower center", ncols=columns, fontsize=LEGEND_SIZE)
    for text in legend.get_texts():
        text.set_parse_math(False)  # a name may hold dollars


def _draw_measured(axes: Axes, points: Sequence[Point]) -> None:
    """Numbered, with the names in the legend; an engine whose accuracy nobody told is a line at its latency."""
    several = len(_batches(points)) > 1
    for line in (line for line in frontiers(points) if len(line) > 1):
        label = f"frontier of the measured{f', batch {line[0].batch}' if several else ''}"
        times, values = [point.latency_ms for point in line], [_points(point.map50_95) for point in line]
        axes.step(times, values, where="post", color="tab:blue", linewidth=1.5, label=label)
    for number, point in enumerate(points, start=1):
        batch = f", batch {point.batch}" if point.batch > 1 else ""
        told = f"{number}: {point.name}{batch}, {point.latency_ms:.2f} ms"
        if point.map50_95 is None:
            axes.axvline(point.latency_ms, color="tab:blue", linestyle=":", label=f"{told}, accuracy unknown")
            axes.text(
                point.latency_ms, 0.98, f"{number} ", transform=axes.get_xaxis_transform(), ha="right", va="top",
                fontsize=9, fontweight="bold", color="tab:blue",
            )  # fmt: skip
        else:
            value = _points(point.map50_95)
            axes.plot(point.latency_ms, value, "o", color="tab:blue", zorder=4, label=f"{told}, {value:.1f} points")
            _label(axes, str(number), point.latency_ms, value, (-4, 7), "bold")


def _draw_published(axes: Axes, rows: Sequence[PublishedLatency]) -> None:
    """Each family hollow and in its own colour, a line through the variants of one precision."""
    series = dict.fromkeys((row.family, row.precision) for row in rows)
    families = list(dict.fromkeys(row.family for row in rows))
    for family, precision in series:
        chosen = [row for row in rows if (row.family, row.precision) == (family, precision)]
        colour = FAMILY_COLOURS[families.index(family) % len(FAMILY_COLOURS)]
        times, values = [row.latency_ms for row in chosen], [_points(row.map50_95) for row in chosen]
        style, marker = ("--", "s") if precision == "int8" else ("-", "o")
        axes.plot(
            times, values, style, marker=marker, color=colour, markerfacecolor="white", linewidth=0.8, markersize=5,
            label=f"{family} {precision.upper()} (published, {DEVICE})",
        )  # fmt: skip
        for row in chosen:
            _label(axes, row.variant, row.latency_ms, _points(row.map50_95), (6, -3))


def _label(
    axes: Axes, text: str, latency_ms: float, value: float, offset: tuple[int, int], weight: str = "normal"
) -> None:
    axes.annotate(
        text, (latency_ms, value), offset, textcoords="offset points", fontsize=8, zorder=5, fontweight=weight
    )  # fmt: skip


def _set_scale(axes: Axes, times: Sequence[float]) -> None:
    """A logarithmic axis with times a reader knows, and room at both ends."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    axes.set_xscale("log")
    axes.set_xlim(min(times) / 1.3, max(times) * 1.3)
    axes.xaxis.set_major_locator(FixedLocator(TICKS_MS))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda milliseconds, _: f"{milliseconds:g}"))


def _batches(points: Sequence[Point]) -> list[int]:
    return sorted({point.batch for point in points})


def _points(map50_95: float | None) -> float:
    assert map50_95 is not None
    return 100 * map50_95
