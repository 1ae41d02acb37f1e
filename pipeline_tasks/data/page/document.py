"""The page itself."""

from __future__ import annotations

import math
from html import escape
from pathlib import Path

import numpy as np

from pipeline_tasks.data.page.figures import heat_map, histogram
from pipeline_tasks.data.page.pictures import choose, hue, write_pictures
from pipeline_tasks.data.page.statistics import Statistics, statistics
from pipeline_tasks.data.sets import OpenSet
from pipeline_tasks.data.versioning import written_aside

LISTED = 12
POLICY = "default-src 'none'; img-src 'self' data: file:; style-src 'unsafe-inline'"
"""No script runs in the page, whatever a class or a file is called."""

STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; --mark: #0969da; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 92rem; margin: 2rem auto; padding: 0 1.2rem; }
h1 { font-size: 1.5rem; margin: 0 0 .3rem; } h2 { font-size: 1.15rem; margin: 2rem 0 .6rem; }
p { margin: .2rem 0; } .note { opacity: .75; }
table { border-collapse: collapse; margin: .4rem 0; }
th, td { text-align: left; padding: .2rem .7rem; border-bottom: 1px solid var(--line); }
td { overflow-wrap: anywhere; max-width: 30rem; } th { font-weight: 600; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
td.long { width: 22rem; } .scroll { overflow-x: auto; }
.bar { height: .8rem; border-radius: 2px; min-width: 1px; display: flex; overflow: hidden; }
.bar span { display: block; background: var(--shade); }
.s0 { --shade: #0969da; } .s1 { --shade: #bf8700; } .s2 { --shade: #1a7f37; } .s3 { --shade: #8250df; }
.key { display: inline-block; width: .8rem; height: .8rem; border-radius: 2px; background: var(--shade); }
.swatch { display: inline-block; width: .7rem; height: .7rem; border-radius: 50%; background: hsl(var(--hue) 95% 58%); }
.figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(25rem, 1fr)); gap: 1rem; }
.columns { display: flex; flex-wrap: wrap; gap: 0 3rem; align-items: flex-start; }
figure { margin: 0; } .figures figure { border: 1px solid var(--line); border-radius: 6px; padding: .6rem .8rem; }
.figures figcaption { font-weight: 600; } .figures svg { width: 100%; height: auto; }
.bin { fill: var(--mark); } .bin:hover { fill: #bf8700; } .axis { stroke: currentColor; }
.mark { stroke: currentColor; stroke-dasharray: 3 3; opacity: .6; } .tick { font-size: 11px; fill: currentColor; }
.heat { width: 100%; max-width: 20rem; aspect-ratio: 1; border-radius: 4px; display: block; margin: .3rem auto; }
.sheet { display: grid; grid-template-columns: repeat(auto-fill, minmax(20rem, 1fr)); gap: 1rem; align-items: start; }
.picture svg { width: 100%; height: auto; display: block; border-radius: 4px; }
.picture figcaption { font-size: .8rem; opacity: .8; overflow-wrap: anywhere; }
.box rect { fill: transparent; stroke: hsl(var(--hue) 95% 58%); stroke-width: 2; vector-effect: non-scaling-stroke; }
.box.crowd rect { stroke-dasharray: 6 4; } .box:hover rect { fill: hsl(var(--hue) 90% 52% / .25); stroke-width: 4; }
.box text { fill: #fff; stroke: #000c; stroke-width: .22em; paint-order: stroke; font-weight: 600; }
""".strip()


def write_page(opened: OpenSet, target: Path, pictures: int) -> Path:
    """Write `target`/index.html and the small copies of at most `pictures` pictures; the folder must not exist.

    Nothing in the page leads out of the folder. Returns the page.
    """
    counted = statistics(opened.raw)
    with written_aside(target) as folder:
        shown = write_pictures(opened, choose(opened.raw, pictures), folder)
        (folder / "index.html").write_text(_page(opened, counted, shown), encoding="utf-8")
    return target / "index.html"


def _page(opened: OpenSet, counted: Statistics, pictures: list[str]) -> str:
    name = escape(opened.raw.metadata.name)
    parts = [
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{name}</title>',
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head><body>',
        f"<h1>{name}</h1>",
        *_summary(opened, counted),
        *_splits(counted),
        *(_classes(counted) if counted.class_names else []),
        *(_figures(counted) if counted.class_names else []),
        f"<h2>Pictures ({len(pictures)} of {_images(counted)})</h2>",
        '<p class="note">Two of every class, rare classes first, then any. Hover over a box for its class and size; '
        "dashed boxes are crowd regions, which are neither learned nor judged.</p>"
        if counted.class_names
        else "",
        f'<div class="sheet">{"".join(pictures)}</div></body></html>',
    ]
    return "\n".join(parts)


def _images(counted: Statistics) -> int:
    return sum(split.images for split in counted.splits)


def _summary(opened: OpenSet, counted: Statistics) -> list[str]:
    recognised, metadata = opened.recognised, opened.raw.metadata
    boxes = sum(split.boxes for split in counted.splits)
    lines = [
        f"<p><strong>{_images(counted)} images, {boxes} boxes, {len(counted.class_names)} classes</strong></p>",
        f'<p class="note">Format {escape(recognised.format)}: {escape(recognised.reason)}</p>',
    ]
    if metadata.source:
        lines.append(f'<p class="note">Source: {escape(metadata.source)}</p>')
    if counted.left_out:
        lines.append(
            f"<p>{counted.left_out} records cannot be used and are left out here; "
            "<code>nasline data validate</code> names them.</p>"
        )
    return lines


def _splits(counted: Statistics) -> list[str]:
    rows = []
    for place, split in enumerate(counted.splits):
        mean = split.boxes / split.images if split.images else 0.0
        name = f'<span class="key s{place % 4}"></span> {escape(split.name)}'
        numbers = (split.images, split.boxes, split.empty_images, f"{mean:.1f}", split.most_boxes)
        rows.append(f"<tr><td>{name}</td>{_numbers(numbers)}</tr>")
    titles = ("images", "boxes", "without boxes", "boxes per image", "most")
    table = f"<table><tr><th>split</th>{_number_titles(titles)}</tr>{''.join(rows)}</table>"
    beside = [("picture size", counted.picture_sizes), ("licence of the image", counted.licences)]
    lists = "".join(_listed(title, found) for title, found in beside)
    return ["<h2>Splits</h2>", f'<div class="columns">{table}{lists}</div>']


def _listed(title: str, found: list[tuple[str, int]]) -> str:
    rows = [f"<tr><td>{escape(name)}</td>{_numbers((count,))}</tr>" for name, count in found[:LISTED]]
    if len(found) > LISTED:
        more = sum(count for _, count in found[LISTED:])
        rows.append(f"<tr><td>{len(found) - LISTED} more</td>{_numbers((more,))}</tr>")
    return f"<table><tr><th>{title}</th>{_number_titles(('images',))}</tr>{''.join(rows)}</table>"


def _classes(counted: Statistics) -> list[str]:
    """A row a class, by number of boxes; the bar's parts are the splits."""
    total = sum(counted.class_counts.values(), np.zeros(len(counted.class_names), np.int64))
    most = max(int(total.max(initial=0)), 1)
    rows = []
    for category in np.argsort(-total, kind="stable").tolist():
        by_split = [int(counts[category]) for counts in counted.class_counts.values()]
        side = counted.class_side_px[category]
        swatch = f'<span class="swatch" style="--hue:{hue(category)}"></span>'
        name = f"<td>{swatch} {escape(counted.class_names[category])}</td>"
        middle = f'<td class="long">{_bar(by_split, most)}</td>'
        numbers = (total[category], *by_split, counted.class_images[category], "" if np.isnan(side) else f"{side:.0f}")
        rows.append(f"<tr>{name}{middle}{_numbers(numbers)}</tr>")
    titles = ("boxes", *counted.class_counts, "images", "median side, px")
    head = f"<tr><th>class</th><th></th>{_number_titles(titles)}</tr>"
    crowd = f"<p class='note'>{counted.crowd_boxes} of the boxes are crowd regions.</p>" if counted.crowd_boxes else ""
    return ["<h2>Classes</h2>", crowd, f'<div class="scroll"><table>{head}{"".join(rows)}</table></div>']


def _bar(by_split: list[int], most: int) -> str:
    parts = [
        f'<span class="s{place % 4}" style="width:{100 * count / most:.2f}%"></span>'
        for place, count in enumerate(by_split)
    ]
    return f'<div class="bar">{"".join(parts)}</div>'


def _figures(counted: Statistics) -> list[str]:
    figures = [
        histogram(counted.sizes, "Size of boxes", "side of a square of the same area, pixels", _plain, 4, (32, 96)),
        histogram(counted.shares, "Size of boxes in their picture", "share of the picture's area", _share, 4),
        histogram(counted.aspects, "Shape of boxes", "width : height", _ratio, 4),
        histogram(counted.boxes_per_image, "Boxes per image", "boxes", _plain, 8),
        heat_map(counted.centres, "Where the centres of boxes lie in the picture"),
    ]
    return [
        "<h2>Boxes</h2>",
        '<p class="note">The lines at 32 and 96 pixels part what COCO calls small, medium and large.</p>',
        f'<div class="figures">{"".join(figures)}</div>',
    ]


def _plain(value: float) -> str:
    return f"{value:.0f}" if value >= 2 else f"{value:.2g}"


def _share(value: float) -> str:
    return f"{100 * value:.2g} %" if value < 0.995 else "100 %"


def _ratio(value: float) -> str:
    return f"{value:.3g}:1" if value >= 1 else f"1:{1 / value:.3g}" if not math.isclose(value, 1) else "1:1"


def _numbers(values: tuple[object, ...]) -> str:
    return "".join(f'<td class="number">{escape(str(value))}</td>' for value in values)


def _number_titles(titles: tuple[str, ...]) -> str:
    return "".join(f'<th class="number">{escape(title)}</th>' for title in titles)
