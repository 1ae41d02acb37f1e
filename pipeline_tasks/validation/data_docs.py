"""Data Docs that can be read anywhere: pages without foreign addresses, and a first page with the whole picture.

Great Expectations' pages take styles and scripts from public servers: without a network they are unstyled and the
list of results stays empty. What they say is kept; scripts, links and pictures go, a small style sheet comes.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from pipeline_tasks.validation.plain_text import plain_text

LISTED_ENTRIES = 200
LISTED_CLASSES = 400

_FOREIGN = re.compile(
    r"<script\b.*?</script>|<style\b.*?</style>|<link\b[^>]*>|<img\b[^>]*>|<footer\b.*?</footer>", re.DOTALL
)
_NEWSLETTER = re.compile(r"<p>Stay current on everything GX.*?</p>", re.DOTALL)

STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; --good: #1a7f37; --bad: #cf222e; --mark: #0969da; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin: 0 0 .5rem; } h2 { font-size: 1.2rem; margin: 2rem 0 .5rem; }
h3, h4, h5, h6 { font-size: 1rem; margin: 1rem 0 .3rem; }
a { color: var(--mark); } .note { opacity: .75; }
table { border-collapse: collapse; margin: .5rem 0 1rem; width: 100%; }
th, td { text-align: left; vertical-align: top; padding: .25rem .6rem; border-bottom: 1px solid var(--line); }
td { overflow-wrap: anywhere; min-width: 5rem; }
th { font-weight: 600; } td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
.scroll { overflow-x: auto; } .verdict { font-weight: 600; }
.passed { color: var(--good); } .failed { color: var(--bad); }
.bar { background: var(--mark); height: .7rem; border-radius: 2px; min-width: 1px; }
nav ol, nav ul { padding-left: 0; list-style: none; } nav li { display: inline-block; margin-right: 1rem; }
.alert { background: var(--soft); padding: .3rem .6rem; border-radius: 4px; }
.badge { background: var(--soft); border-radius: 4px; padding: 0 .4rem; font-weight: normal; }
.card.mb-3, .popover, .collapse { display: none; } .collapse:target { display: block; }
.fas::before { font-style: normal; font-weight: bold; }
.fa-check-circle::before, .fa-check::before { content: "✓"; color: var(--good); }
.fa-times::before, .fa-exclamation-triangle::before { content: "✗"; color: var(--bad); }
""".strip()


Entries = Sequence[dict[str, Any]]


def finish(docs: Path, content: dict[str, Any], quarantine: Entries, warnings: Entries) -> None:
    """Make Great Expectations' pages below `docs` self-contained and write `docs`/index.html in their place.

    `content` is that of validation.json, `quarantine` and `warnings` are the first entries of these lists.
    """
    shutil.rmtree(docs / "static", ignore_errors=True)
    for page in docs.rglob("*.html"):
        text = _NEWSLETTER.sub("", _FOREIGN.sub("", page.read_text(encoding="utf-8")))
        page.write_text(text.replace("</head>", f"<style>{STYLE}</style></head>", 1), encoding="utf-8")
    pages = {page.parents[2].name: page.relative_to(docs).as_posix() for page in docs.glob("validations/*/*/*/*.html")}
    (docs / "index.html").write_text(_first_page(content, pages, quarantine, warnings), encoding="utf-8")


def _first_page(content: dict[str, Any], pages: dict[str, str], quarantine: Entries, warnings: Entries) -> str:
    verdict = "passed" if content["passed"] else "failed"
    body = [
        "<h1>Data validation</h1>",
        f'<p class="verdict {verdict}">{"Passed" if content["passed"] else "Refused: nothing was published"}</p>',
        *(f'<p class="failed">{_shown(sentence)}</p>' for sentence in content["violations"]),
        *(_set_section(role, described) for role, described in content["sets"].items()),
        _suite_section(content["great_expectations"], pages),
        _quarantine_section(content["sets"], quarantine),
        _warning_section(content["sets"], warnings),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>Data validation</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{STYLE}</style></head><body>\n" + "\n".join(body) + "\n</body></html>\n"
    )


def _set_section(role: str, described: dict[str, Any]) -> str:
    splits = described["splits"]
    columns = (
        "images",
        "boxes",
        "crowd_boxes",
        "images_without_boxes",
        "quarantined_images",
        "quarantined_boxes",
    )
    counts = _table(
        ("split", *(column.replace("_", " ") for column in columns)),
        [(split, *(values[column] for column in columns)) for split, values in splits.items()],
    )
    licences = described["licences"]
    images = _table(("licence of the images", "images"), list(licences["images"].items()))
    facts = [
        f"licence of the annotations: {licences['annotations']}",
        f"boxes clipped to their image: {described['clipped_boxes']}",
        f"boxes left out with their image: {described['boxes_left_out_with_their_image']}",
        f"images repeated within a split: {described['repeated_images_within_a_split']}",
        f"pictures that no record names: {described['pictures_without_record']}",
    ]
    return (
        f"<h2>{_shown(role)}</h2><p class=note>{_shown(described['source'])}</p>{counts}"
        f"{_balance(described['class_balance'])}{images}<p class=note>{_shown('; '.join(facts))}</p>"
    )


def _balance(balance: dict[str, Any]) -> str:
    if not balance:
        return ""
    totals = {name: sum(splits.values()) for name, splits in balance["boxes"].items()}
    largest = max(max(totals.values()), 1)
    names = list(balance["imbalance_ratio"])
    rows = "".join(
        f"<tr><td>{_shown(name)}</td>{''.join(_number(splits[s]) for s in names)}"
        f'<td style="width:40%"><div class=bar style="width:{100 * totals[name] / largest:.1f}%"></div></td></tr>'
        for name, splits in list(balance["boxes"].items())[:LISTED_CLASSES]
    )
    ratios = ", ".join(
        f"{s} {'none' if r is None else format(r, '.3g')}" for s, r in balance["imbalance_ratio"].items()
    )
    empty = "; ".join(f"{split}: {', '.join(c)}" for split, c in balance["classes_without_boxes"].items() if c)
    return (
        f"<div class=scroll><table><tr><th>class</th>{''.join(f'<th class=number>{_shown(s)}</th>' for s in names)}"
        f"<th>boxes in all splits</th></tr>{rows}</table></div>"
        f"<p class=note>most frequent over least frequent class: {_shown(ratios)}"
        f"{'; classes without boxes: ' + _shown(empty) if empty else ''}</p>"
    )


def _suite_section(great_expectations: dict[str, Any], pages: dict[str, str]) -> str:
    rows = []
    for name, result in great_expectations["suites"].items():
        label = "passed" if result["success"] else "failed"
        link = f'<a href="{_shown(pages[name])}">{_shown(name)}</a>' if name in pages else _shown(name)
        statistics = result["statistics"]
        broken = ", ".join(f"{rule} {count}" for rule, count in result["unexpected_rows"].items() if count) or "none"
        rows.append(
            f"<tr><td>{link}</td><td class={label}>{label}</td>{_number(statistics['successful_expectations'])}"
            f"{_number(statistics['evaluated_expectations'])}<td>{_shown(broken)}</td></tr>"
        )
    return (
        f"<h2>Great Expectations {_shown(great_expectations['version'])}</h2><table><tr><th>suite</th><th>result</th>"
        "<th class=number>fulfilled</th><th class=number>expectations</th><th>rows that break a rule</th></tr>"
        f"{''.join(rows)}</table>"
    )


def _quarantine_section(sets: dict[str, dict[str, Any]], quarantine: Entries) -> str:
    total = sum(one["quarantined_images"] + one["quarantined_boxes"] for one in sets.values())
    if not quarantine:
        return "<h2>Quarantine</h2><p>No image and no box was taken out.</p>"
    table = _entry_table(quarantine)
    return (
        f"<h2>Quarantine</h2><p>{total} images and boxes were taken out; the first {len(quarantine)} entries, all are "
        f'in <a href="../quarantine.csv">quarantine.csv</a>.</p>{table}'
    )


def _warning_section(sets: dict[str, dict[str, Any]], warnings: Entries) -> str:
    """What was published although it is odd: the counts by rule, then the first rows."""
    if not warnings:
        return "<h2>Warnings</h2><p>Nothing odd was found.</p>"
    counts = [(role, rule, count) for role, one in sets.items() for rule, count in one["warnings"].items()]
    return (
        f"<h2>Warnings</h2><p>These rows were published.</p>{_table(('role', 'rule', 'warnings'), counts)}"
        f'<p>The first {len(warnings)}; more are in <a href="../warnings.csv">warnings.csv</a>.</p>'
        f"{_entry_table(warnings)}"
    )


def _entry_table(entries: Entries) -> str:
    columns = ("role", "split", "file", "rule", "detail", "record", "remedy")
    return _table(columns, [tuple(entry[column] for column in columns) for entry in entries])


def _table(columns: Sequence[str], rows: Iterable[tuple[Any, ...]]) -> str:
    rows = list(rows)
    numeric = {i for i, value in enumerate(rows[0]) if isinstance(value, int)} if rows else set()
    head = "".join(f"<th{' class=number' if i in numeric else ''}>{_shown(c)}</th>" for i, c in enumerate(columns))
    body = "".join(
        "<tr>" + "".join(_number(v) if isinstance(v, int) else f"<td>{_shown(v)}</td>" for v in row) + "</tr>"
        for row in rows
    )
    return f"<div class=scroll><table><tr>{head}</tr>{body}</table></div>"


def _number(value: int) -> str:
    return f"<td class=number>{value}</td>"


def _shown(value: Any) -> str:
    """A foreign text in a page: no markup, nothing that cannot be seen."""
    return escape(plain_text(str(value)))
