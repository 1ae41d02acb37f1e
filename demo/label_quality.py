"""How good the demo's pseudo-labels are: they are compared with the boxes the generator kept back.

The pipeline itself never reads `hidden_truth.json`; only this comparison, after the run, does.
"""

from __future__ import annotations

from pathlib import Path


def label_quality(tables: Path, hidden_truth: Path) -> str:
    """Count, precision and recall of published pseudo-label tables, in words."""
    from pipeline_tasks import label_quality as product

    quality = product.label_quality(tables, hidden_truth)
    precision, recall = quality.to_json()["precision"] or 0.0, quality.to_json()["recall"] or 0.0
    return (
        f"{quality.kept} boxes kept; against the hidden truth (IoU 0.5) "
        f"precision {precision:.3f}, recall {recall:.3f} of {quality.truth}"
    )
