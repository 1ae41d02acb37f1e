"""The curves of several runs in one picture: a panel for each step and metric, a line for each run."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline_tasks.steps import STEP_NAMES

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes

    from pipeline_tasks.run_facts import RunFacts

SHOWN = ("loss", "map50_95", "map50", "learning_rate")
"""Metrics with a panel, in this order; one that a step does not have is left out."""
PANEL_INCHES = (4.2, 3.0)


def draw(found: Sequence[RunFacts], path: Path) -> bool:
    """Write the picture; False, and nothing written, where no run has curves of these metrics."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    steps = [step for step in _steps(found) if _metrics(found, step)]
    if not steps:
        return False
    columns = max(len(_metrics(found, step)) for step in steps)
    width, height = PANEL_INCHES
    figure = Figure(figsize=(width * columns, height * len(steps) + 0.5), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(steps), columns, squeeze=False)
    for row, step in zip(grid, steps, strict=True):
        metrics = _metrics(found, step)
        for axes, metric in zip(row, metrics, strict=False):
            _draw_panel(axes, found, step, metric)
        for axes in row[len(metrics) :]:
            axes.set_axis_off()
    lines = _legend(grid.flat)
    figure.legend(lines.values(), list(lines), loc="outside upper center", ncols=min(4, len(lines)))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    return True


def _steps(found: Sequence[RunFacts]) -> list[str]:
    """In the order of the pipeline; steps that only another release has come last."""
    known = {step for one in found for step in one.curves}
    order = {name: place for place, name in enumerate(STEP_NAMES)}
    return sorted(known, key=lambda step: (order.get(step.split("/")[0], len(order)), step))


def _metrics(found: Sequence[RunFacts], step: str) -> list[str]:
    known = {name for one in found for name in one.curves.get(step, {})}
    return [name for name in SHOWN if name in known]


def _draw_panel(axes: Axes, found: Sequence[RunFacts], step: str, metric: str) -> None:
    from matplotlib.ticker import MaxNLocator

    for place, one in enumerate(found):
        points = one.curves.get(step, {}).get(metric)
        if points:
            epochs, values = zip(*points, strict=True)
            marker = "o" if len(points) < 30 else ""
            axes.plot(epochs, values, color=f"C{place % 10}", marker=marker, markersize=3, label=one.run)
    axes.set_title(f"{step}: {metric}", fontsize=10)
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)


def _legend(panels: Iterable[Axes]) -> dict[str, Artist]:
    """Each run once, whichever panel it is in."""
    known: dict[str, Artist] = {}
    for axes in panels:
        for handle, name in zip(*axes.get_legend_handles_labels(), strict=True):
            known.setdefault(name, handle)
    return known
