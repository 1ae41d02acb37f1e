"""Picture of what accuracy costs in time: every choice of float layers that was measured, and the one taken."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = {"ptq": "tab:blue", "qat": "tab:green"}
LABELS = {"ptq": "weights as trained in float", "qat": "weights after QAT"}


def draw_frontier(rows: Sequence[Mapping[str, Any]], budget_points: float, path: Path) -> None:
    """Draw ``frontier.json``: mAP50-95 over processor time for one image where that was measured, else predicted time.

    rows: the first is the float network; each has ``weights`` ("float", "ptq" or "qat"), ``map50_95``, ``added`` (the
    layers that selection left in float), ``predicted``, ``measured_cpu``, ``unit`` and ``published``.
    Raises ValueError without any.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if not rows:
        raise ValueError("no choice of float layers was measured, so there is no frontier to draw")
    figure = Figure(figsize=(8, 5), dpi=100, layout="constrained")
    axes = figure.subplots()
    measured = all(row["measured_cpu"] is not None for row in rows)
    key = "measured_cpu" if measured else "predicted"
    _draw_float(axes, rows[0], key, budget_points)
    for weights in ("ptq", "qat"):
        _draw_choices(axes, [row for row in rows if row["weights"] == weights], key, weights)
    how = "shortest processor time" if measured else "predicted time"
    axes.set(xlabel=f"{how} of one image [{rows[0]['unit']}]", ylabel="mAP50-95, validation split [points]")
    axes.set_title("Accuracy and time; numbers say how many layers selection left in float")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure).print_figure(path, metadata={"Software": None})  # without a date: equal plots, equal files


def _draw_float(axes: Axes, row: Mapping[str, Any], key: str, budget_points: float) -> None:
    accuracy = 100 * row["map50_95"]
    axes.plot(row[key], accuracy, "k^", markersize=8, label="float network")
    axes.axhline(accuracy - budget_points, color="grey", linestyle="--", label=f"budget, {budget_points:g} points")


def _draw_choices(axes: Axes, rows: Sequence[Mapping[str, Any]], key: str, weights: str) -> None:
    if not rows:
        return
    times, accuracies = [row[key] for row in rows], [100 * row["map50_95"] for row in rows]
    axes.scatter(times, accuracies, color=COLOURS[weights], s=30, label=LABELS[weights], zorder=3)
    for row, time, accuracy in zip(rows, times, accuracies, strict=True):
        axes.annotate(str(len(row["added"])), (time, accuracy), (4, 4), textcoords="offset points", fontsize=8)
        if row["published"]:
            axes.scatter(time, accuracy, s=160, facecolors="none", edgecolors="tab:red", label="published", zorder=4)
