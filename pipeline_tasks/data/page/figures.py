"""Figures of the page as SVG or PNG inside it: no script, no file beside it."""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from html import escape

import cv2
import numpy as np
from numpy.typing import NDArray

from pipeline_tasks.data.page.statistics import Histogram

WIDTH, HEIGHT = 440, 190
LEFT, BOTTOM, TOP = 8, 34, 16


def histogram(
    found: Histogram, title: str, axis: str, label: Callable[[float], str], every: int, marks: Sequence[float] = ()
) -> str:
    """Bars of equal width, the value of every `every`-th edge below; `marks` are values with a dashed line."""
    count = len(found.counts)
    bar = (WIDTH - 2 * LEFT) / max(count, 1)
    highest = max(int(found.counts.max(initial=0)), 1)
    room = HEIGHT - BOTTOM - TOP
    parts = []
    for index, value in enumerate(found.counts.tolist()):
        height = max(room * value / highest, 1.0 if value else 0.0)
        between = f"{label(found.edges[index])} to {label(found.edges[index + 1])}: {value}"
        parts.append(
            f'<rect class="bin" x="{LEFT + index * bar:.1f}" y="{TOP + room - height:.1f}" '
            f'width="{max(bar - 1, 1):.1f}" height="{height:.1f}"><title>{escape(between)}</title></rect>'
        )
    parts += [_mark(found, value, bar, label) for value in marks]
    parts += _axis(found, bar, label, axis, every)
    parts.append(f'<text class="tick" x="{LEFT}" y="{TOP - 4}">highest bar {highest}</text>')
    return _figure(title, f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img">{"".join(parts)}</svg>')


def _axis(found: Histogram, bar: float, label: Callable[[float], str], axis: str, every: int) -> list[str]:
    parts = [f'<line class="axis" x1="{LEFT}" x2="{WIDTH - LEFT}" y1="{HEIGHT - BOTTOM}" y2="{HEIGHT - BOTTOM}"/>']
    for index in range(0, len(found.edges), every):
        x = LEFT + index * bar
        anchor = "start" if index == 0 else "end" if WIDTH - x < 2 * LEFT else "middle"
        text = escape(label(found.edges[index]))
        parts.append(f'<text class="tick" x="{x:.1f}" y="{HEIGHT - BOTTOM + 13}" text-anchor="{anchor}">{text}</text>')
    parts.append(f'<text class="tick" x="{WIDTH / 2}" y="{HEIGHT - 5}" text-anchor="middle">{escape(axis)}</text>')
    return parts


def _mark(found: Histogram, value: float, bar: float, label: Callable[[float], str]) -> str:
    x = LEFT + bar * float(np.interp(value, found.edges, np.arange(len(found.edges))))
    line = f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>'
    return f'{line}<text class="tick" x="{x + 3:.1f}" y="{TOP - 4}">{escape(label(value))}</text>'


def heat_map(cells: NDArray[np.int64], title: str) -> str:
    """A picture of counts, rows from the top; the square root is shown, so that a single box can be seen."""
    strength = np.sqrt(cells / max(int(cells.max(initial=0)), 1))
    colours = cv2.applyColorMap((255 * strength).astype(np.uint8), cv2.COLORMAP_VIRIDIS)
    _, png = cv2.imencode(".png", colours)
    address = "data:image/png;base64," + base64.b64encode(png.tobytes()).decode()
    note = f"most in one of {cells.shape[1]} x {cells.shape[0]} cells: {int(cells.max(initial=0))}"
    return _figure(title, f'<img class="heat" alt="{escape(title)}" src="{address}"><p class="note">{note}</p>')


def _figure(title: str, content: str) -> str:
    return f"<figure><figcaption>{escape(title)}</figcaption>{content}</figure>"
