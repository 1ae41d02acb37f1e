"""What a pipeline run says of itself in MLflow's table of runs and on its page: tags, and a description in Markdown."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

PICTURES = ("plots/precision_recall.png", "plots/confusion_matrix.png", "plots/predictions.png")
"""Of the gate, in the order in which the page shows them."""
GATE_FILES = ("verdict.json", "accuracy.json", "latency.json")

Content = Mapping[str, Any]


def tags(frozen: Content) -> dict[str, str]:
    """Which data and which networks, for the columns of the table."""
    start, target = frozen["parameters"]["start"], frozen["datasets"]["target"]
    named = f"{Path(target['path']).name} {target['digest'][:6]}"
    return {"nasline.data": named, "nasline.variant": f"{start['student_variant']} < {start['teacher_variant']}"}


def description(frozen: Content) -> str:
    """The page before the gate has spoken."""
    start = frozen["parameters"]["start"]
    named = {role: entry for role, entry in frozen["datasets"].items() if entry}
    sets = [f"{role}: `{entry['path']}` ({entry['digest'][:12]})" for role, entry in named.items()]
    champion = frozen.get("champion")
    met = f"{champion['name']} v{champion['version']}" if champion else "none"
    facts = [
        f"student {start['student_variant']}, teacher {start['teacher_variant']}, {start['image_size']} pixels, "
        f"for the model `{start['model_name']}`; the champion at the start: {met}",
        *sets,
        f"code {frozen['code_version']}",
    ]
    return "\n".join(["**Run**", "", *(f"- {fact}" for fact in facts)])


def with_verdict(before: str, gate: Path, run_id: str, delivered: Sequence[str]) -> str:
    """The page with the verdict's table and what was measured before it, and the gate's pictures behind it.

    Args:
        before: the page so far.
        gate: what the gate published.
        run_id: MLflow's run that has its pictures, and `delivered`, the names of those it has.
    """
    from pipeline_tasks.version_page import description as measured

    contents = [json.loads((gate / name).read_text(encoding="utf-8")) for name in GATE_FILES]
    pictures = [_picture(run_id, name) for name in PICTURES if name in delivered]
    return "\n\n".join([measured(*contents), before, *(["**Test images**"] if pictures else []), *pictures])


def gate_tag(gate: Path) -> dict[str, str]:
    """`accepted` or `rejected`, short enough for a column; the sentence is in `nasline.verdict`."""
    verdict = json.loads((gate / GATE_FILES[0]).read_text(encoding="utf-8"))
    return {"nasline.gate": "accepted" if verdict["passed"] else "rejected"}


def _picture(run_id: str, name: str) -> str:
    """MLflow's page lies at the server's root, so an address without a host is the server's own."""
    address = urlencode({"path": name, "run_uuid": run_id})
    return f"![{Path(name).stem.replace('_', ' ')}](get-artifact?{address})"
