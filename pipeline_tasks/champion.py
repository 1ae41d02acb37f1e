"""Candidate against champion, on today's test images that neither has learned from."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline_tasks.verdict import Rule

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from model.data.image_set import ImageSet
    from model.detections import Detections
    from pipeline_tasks.execution import StepContext
    from pipeline_tasks.params import GateParameters

RESAMPLES = 100
LINEAGE_FILE = "lineage.json"


@dataclass(frozen=True)
class Comparison:
    """Mean AP50-95 over the classes both know, on the clean test images."""

    champion: str
    champion_map50_95: float
    candidate_map50_95: float
    images: int
    excluded_images: int
    shared_classes: tuple[str, ...]
    removed_classes: tuple[str, ...]
    share_of_resamples_worse: float
    """Share of bootstrap resamples of the images in which the candidate is worse."""

    @property
    def difference_points(self) -> float:
        """Candidate minus champion."""
        return 100 * (self.candidate_map50_95 - self.champion_map50_95)

    def to_json(self) -> dict[str, Any]:
        """For verdict.json."""
        return {**asdict(self), "difference_points": self.difference_points}


def compare(context: StepContext, candidate: Detections, test_set: ImageSet) -> Comparison | None:
    """Measure the pinned champion beside the candidate; None without a champion or with the rule switched off."""
    if context.champion is None or context.parameters.gate.champion_margin is None:
        return None
    clean = _clean_rows(context.champion, test_set)
    images = test_set.subset(clean)
    class_names = _class_names(context.champion)
    shared = tuple(name for name in test_set.class_names if name in class_names)
    theirs = _champion_detections(context, images, class_names)
    ours = _of_images(candidate, clean)
    entry = context.run["champion"]
    return Comparison(
        champion=f"{entry['name']} v{entry['version']}",
        champion_map50_95=_mean_ap(theirs, images, shared),
        candidate_map50_95=_mean_ap(ours, images, shared),
        images=len(images),
        excluded_images=len(test_set) - len(images),
        shared_classes=shared,
        removed_classes=tuple(sorted(set(class_names) - set(test_set.class_names))),
        share_of_resamples_worse=_share_worse(ours, theirs, images, shared, context.parameters.start.seed),
    )


def rules(comparison: Comparison | None, given: GateParameters) -> list[Rule]:
    """The champion's rules: enough clean images, no class lost, not worse.

    "Worse" needs both: a difference beyond the margin, and at least 95 % of the resamples on the champion's side, so
    that neither noise nor a tiny loss decides.
    """
    if comparison is None or given.champion_margin is None:
        return []
    how = f"{comparison.images} clean test images, {comparison.excluded_images} excluded, {comparison.champion}"
    enough = comparison.images >= given.minimum_comparison_images
    worse = comparison.difference_points < -given.champion_margin and comparison.share_of_resamples_worse >= 0.95
    kept = given.allow_removed_classes or not comparison.removed_classes
    removed = ", ".join(comparison.removed_classes) or "none removed"
    least, margin = given.minimum_comparison_images, given.champion_margin
    return [
        Rule("clean test images for the champion", least, comparison.images, "images", how, enough),
        Rule("mAP50-95 against the champion", -margin, comparison.difference_points, "points", how, not worse),
        Rule("classes of the champion", "none removed", removed, "", how, kept),
    ]


def _clean_rows(champion: Path, test_set: ImageSet) -> NDArray[np.int64]:
    """Test images that the champion was not trained, validated or pseudo-labelled on, by content."""
    import numpy as np

    seen = set(json.loads((champion / LINEAGE_FILE).read_text(encoding="utf-8"))["seen_images"])
    return np.array([i for i in range(len(test_set)) if test_set.sha256(i) not in seen], dtype=np.int64)


def _class_names(champion: Path) -> list[str]:
    names: list[str] = json.loads((champion / "engine" / "engine.json").read_text(encoding="utf-8"))["class_names"]
    return names


def _champion_detections(context: StepContext, images: ImageSet, class_names: list[str]) -> Detections:
    """The champion's detections with the candidate's labels; classes the candidate lacks are left out."""
    import numpy as np

    from model.detections import Detections
    from pipeline_tasks.gate import build_engine, detect_with, read_preprocessing

    assert context.champion is not None
    folder = context.champion / "engine"
    engine = build_engine(folder / "model.onnx", context.state / "champion", context.parameters.gate)
    found = detect_with(context, engine, images, read_preprocessing(folder))
    names = list(images.class_names)
    mapping = np.array([names.index(name) if name in names else -1 for name in class_names], dtype=np.int64)
    labels = mapping[found.labels]
    known = labels >= 0
    return Detections(found.image_index[known], found.boxes_xyxy[known], found.scores[known], labels[known])


def _of_images(found: Detections, rows: NDArray[np.int64]) -> Detections:
    """The detections of chosen images, renumbered; an image chosen twice brings its detections twice."""
    import numpy as np

    from model.detections import Detections

    order = np.argsort(found.image_index, kind="stable")
    first = np.searchsorted(found.image_index[order], rows, side="left")
    last = np.searchsorted(found.image_index[order], rows, side="right")
    counts = last - first
    chosen = order[np.repeat(first - np.cumsum(counts) + counts, counts) + np.arange(counts.sum())]
    image_index = np.repeat(np.arange(len(rows), dtype=np.int64), counts)
    return Detections(image_index, found.boxes_xyxy[chosen], found.scores[chosen], found.labels[chosen])


def _mean_ap(found: Detections, images: ImageSet, class_names: tuple[str, ...]) -> float:
    """Mean AP50-95 of the named classes that have boxes in these images."""
    import math

    from model.evaluation import evaluate

    per_class = evaluate(found, images).per_class_ap
    values = [per_class[name] for name in class_names if name in per_class and not math.isnan(per_class[name])]
    return sum(values) / len(values) if values else 0.0


def _share_worse(
    ours: Detections, theirs: Detections, images: ImageSet, class_names: tuple[str, ...], seed: int
) -> float:
    """Paired bootstrap over images (Efron & Tibshirani 1993, ch. 16): both engines see the same resamples."""
    import numpy as np

    random = np.random.default_rng(seed)
    worse = 0
    for _ in range(RESAMPLES):
        rows = random.integers(0, len(images), len(images))
        sample = images.subset(rows)
        ours_map = _mean_ap(_of_images(ours, rows), sample, class_names)
        worse += ours_map < _mean_ap(_of_images(theirs, rows), sample, class_names)
    return worse / RESAMPLES
