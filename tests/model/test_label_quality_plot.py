"""The picture of pseudo-labels' quality: for few and for many classes, and the same file for the same numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from model.data.images import read_image
from model.label_quality_plot import draw_label_quality


def _quality(classes: int) -> dict[str, Any]:
    """One class was neither kept nor there, and one was kept but is not there, so that its recall is unknown."""
    per_class: dict[str, dict[str, float | None]] = {
        f"class {place}": {"precision": 0.9, "recall": place / classes, "kept": 5, "truth": 9, "threshold": 0.4}
        for place in range(classes)
    }
    per_class["nowhere"] = {"precision": None, "recall": None, "kept": 0, "truth": 0}
    per_class["invented"] = {"precision": 0.0, "recall": None, "kept": 2, "truth": 0}
    return {"precision": 0.9, "recall": 0.5, "kept": 5 * classes, "truth": 9 * classes, "per_class": per_class}


def test_many_classes_are_cut_and_equal_numbers_give_equal_files(tmp_path: Path) -> None:
    few = {"none": _quality(3), "average": _quality(3)}
    draw_label_quality(few, tmp_path / "few.png")
    draw_label_quality(few, tmp_path / "again.png")
    assert (tmp_path / "few.png").read_bytes() == (tmp_path / "again.png").read_bytes()
    for classes in (24, 200):
        draw_label_quality({"pseudo-labels": _quality(classes)}, tmp_path / f"{classes}.png")
    heights = [read_image(tmp_path / name).shape[0] for name in ("few.png", "24.png", "200.png")]
    assert heights[0] < heights[1] == heights[2]


def test_nothing_measured_is_nothing_to_draw(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no pseudo-labels were measured"):
        draw_label_quality({}, tmp_path / "none.png")
