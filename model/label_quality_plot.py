"""Picture of what pseudo-labels are worth: precision and recall, per class and per way of making them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_CLASSES = 24
COLOURS = {"precision": "tab:blue", "recall": "tab:orange"}


def draw_label_quality(quality: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Draw ``PseudoLabelQuality.to_json()`` of one or more ways of labelling the same images.

    The classes are those of the first way, with ``threshold`` per class where it is known; of many classes the worst
    by recall are shown.  Raises ``ValueError`` without any.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if not quality:
        raise ValueError("no pseudo-labels were measured, so there is nothing to draw")
    first, rows = next(iter(quality)), _rows(next(iter(quality.values())))
    panels = 2 if len(quality) > 1 else 1
    figure = Figure(figsize=(5.5 * panels, 1.6 + 0.34 * max(len(rows), len(quality))), dpi=100, layout="constrained")
    axes = figure.subplots(1, panels, squeeze=False)[0]
    _draw(axes[0], rows, f"by class ({first})" if panels > 1 else "by class")
    if panels > 1:
        _draw(axes[1], [(way, entry) for way, entry in quality.items()], "by use of the mirrored image")
    figure.legend(*axes[0].get_legend_handles_labels(), fontsize=8, loc="outside lower center", ncols=2)
    whole = quality[first]
    figure.suptitle(f"Pseudo-labels against {whole['truth']} true boxes at IoU 0.5; {whole['kept']} kept")
    path.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure).print_figure(path, metadata={"Software": None})  # without a date: equal plots, equal files


def _rows(quality: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    known = [(name, entry) for name, entry in quality["per_class"].items() if entry["truth"] or entry["kept"]]
    return sorted(known, key=lambda row: row[1]["recall"] or 0.0)[:MOST_CLASSES]


def _draw(axes: Axes, rows: list[tuple[str, Mapping[str, Any]]], title: str) -> None:
    for place, (_, entry) in enumerate(rows):
        for offset, (name, colour) in zip((-0.19, 0.19), COLOURS.items(), strict=True):
            value = entry[name] or 0.0
            axes.barh(place + offset, value, height=0.36, color=colour, label=name if place == 0 else None)
            text = "unknown" if entry[name] is None else f"{value:.2f}"
            axes.text(value + 0.01, place + offset, text, va="center", fontsize=7)
    axes.set_yticks(range(len(rows)), [_label(name, entry) for name, entry in rows], fontsize=8)
    axes.invert_yaxis()
    axes.set(xlim=(0, 1.12), title=title)
    axes.grid(axis="x", alpha=0.3)


def _label(name: str, entry: Mapping[str, Any]) -> str:
    return f"{name}  ≥ {entry['threshold']:.2f}" if "threshold" in entry else name
