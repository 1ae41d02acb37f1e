"""Candidate against champion, on today's test images that neither has learned from.

A retrained engine may be a little worse than the champion and still pass, within `gate.champion_margin`. So that a
line of champions cannot sink step by step, each registered engine that was measured below the best of its line carries
that one along (folder `best/` of its bundle), and the next candidate is compared with it too, on the same terms.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline_tasks import seen_images
from pipeline_tasks.seen_images import CANDIDATE, LINEAGE_FILE, Exclusion, HeldOutImages, SeenImages
from pipeline_tasks.tracking.registry import ITSELF
from pipeline_tasks.verdict import Rule
from pipeline_tasks.workspace import write_json

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from model.data.image_set import ImageSet
    from model.detections import Detections
    from pipeline_tasks.execution import StepContext
    from pipeline_tasks.gate_parameters import GateParameters

BEST_OF_LINE = "best"
"""Folder in a bundle: engine and lineage of the best ancestor, where that one is not the bundle's own engine."""
VERSION = "version"
"""Field of the carried lineage: name and version in the registry."""
CERTAIN_SHARE = 0.95


@dataclass(frozen=True)
class Comparison:
    """The candidate beside a registered engine: mean AP50-95 over the classes both know, on the clean test images.

    share_of_resamples_worse: share of bootstrap resamples of the images in which the candidate is worse.
    interval_points: 95 % of the resampled differences lie in it. The numbers are None when there is no clean image,
    no class in common, or no box of one. images: the clean ones; images_with_boxes: those among them with a box of a
    class that both know. hashed: whether near-duplicates could be looked for, not only equal files.
    """

    champion: str
    champion_map50_95: float | None
    candidate_map50_95: float | None
    images: int
    images_with_boxes: int
    excluded: tuple[Exclusion, ...]
    hashed: bool
    shared_classes: tuple[str, ...]
    removed_classes: tuple[str, ...]
    added_classes: dict[str, float | None]
    """AP50-95 of each class that the champion lacks, None without boxes in the candidate's clean test images."""
    share_of_resamples_worse: float | None
    interval_points: tuple[float, float] | None
    images_unknown_of: tuple[str, ...] = ()
    """Checkpoints from outside that one of the two descends from: nobody knows which test images these have seen."""

    @property
    def difference_points(self) -> float | None:
        """Candidate minus champion."""
        if self.champion_map50_95 is None or self.candidate_map50_95 is None:
            return None
        return 100 * (self.candidate_map50_95 - self.champion_map50_95)

    @property
    def telling_images(self) -> int:
        """Clean images that can show a difference: one without a box of a shared class hardly can."""
        return self.images_with_boxes if self.shared_classes else self.images

    def to_json(self) -> dict[str, Any]:
        """For verdict.json."""
        return {
            **asdict(self),
            "excluded_images": len(self.excluded),
            "difference_points": self.difference_points,
        }

    def how(self) -> str:
        """On what was compared, for the sentences of the rules."""
        near = sum(exclusion.bits is not None for exclusion in self.excluded)
        excluded = f"{len(self.excluded)} excluded, {near} of them near-duplicates"
        unhashed = "" if self.hashed else "; not all hashes are known, so copies were looked for by content only"
        unknown = f"; images seen by {', '.join(self.images_unknown_of)} are unknown" if self.images_unknown_of else ""
        boxed = f"{self.images_with_boxes} with boxes, " if self.images_with_boxes < self.images else ""
        return f"{self.images} clean test images, {boxed}{excluded}, {self.champion}{unhashed}{unknown}"


@dataclass(frozen=True)
class Comparisons:
    """With the champion, and with the best of its line where that is another engine."""

    champion: Comparison
    best_of_line: Comparison | None


def compare(
    context: StepContext, candidate: Detections, test_set: ImageSet, held_out: HeldOutImages, seen: SeenImages
) -> Comparisons | None:
    """Measure the pinned champion beside the candidate; None without a champion or with the rule switched off.

    held_out: the images of test_set, in its order. seen: what the candidate has learned from.
    """
    if context.champion is None or context.parameters.gate.champion_margin is None:
        return None
    name = _name(context)
    bench = _Bench(context, candidate, test_set, held_out, seen)
    best = context.champion / BEST_OF_LINE
    return Comparisons(
        bench.compare(name, context.champion),
        bench.compare(f"{_version(best)}, the best ancestor of {name}", best) if best.is_dir() else None,
    )


def rules(compared: Comparisons | None, given: GateParameters) -> list[Rule]:
    """The champion's rules: enough clean images, not worse than it or the best of its line, its classes, new ones."""
    if compared is None or given.champion_margin is None:
        return []
    champion, best = compared.champion, compared.best_of_line
    least = given.minimum_comparison_images
    return [
        Rule(
            "clean test images for the champion", least, champion.telling_images, "images", champion.how(),
            champion.telling_images >= least, "minimum_comparison_images",
        ),
        *_not_worse("mAP50-95 against the champion", champion, given.champion_margin),
        *([] if best is None else _not_worse("mAP50-95 against the best of its line", best, given.champion_margin)),
        *_class_rules(champion, given),
    ]  # fmt: skip


def carry_best_of_line(context: StepContext, verdict: dict[str, Any], bundle: Path) -> str:
    """Put the best ancestor into a bundle, unless the candidate was measured at least as good; gives the best's name.

    Where the comparison was switched off nothing was measured, and on fewer images than a comparison needs nothing was
    shown (no rule judges those left for the ancestor): it stays the one to beat.
    """
    if context.champion is None:
        return ITSELF
    carried = context.champion / BEST_OF_LINE
    best, compared = (
        (carried, verdict["best_of_line_comparison"])
        if carried.is_dir()
        else (context.champion, verdict["champion_comparison"])
    )
    if compared and compared["images_with_boxes"] >= context.parameters.gate.minimum_comparison_images:
        difference = compared["difference_points"]
        if difference is not None and difference >= 0:
            return ITSELF
    shutil.copytree(best / "engine", bundle / BEST_OF_LINE / "engine")
    lineage = json.loads((best / LINEAGE_FILE).read_text(encoding="utf-8"))
    named = {VERSION: _name(context), **lineage}  # one that was carried before has its name already
    write_json(bundle / BEST_OF_LINE / LINEAGE_FILE, named)
    return str(named[VERSION])


def _name(context: StepContext) -> str:
    entry = context.run["champion"]
    return f"{entry['name']} v{entry['version']}"


def _version(best: Path) -> str:
    version: str = json.loads((best / LINEAGE_FILE).read_text(encoding="utf-8"))[VERSION]
    return version


def _not_worse(name: str, compared: Comparison, margin: float) -> list[Rule]:
    """ "Worse" needs both: a difference beyond the margin, and at least 95 % of the resamples on the other's side, so
    that neither noise nor a tiny loss decides. Without a clean image or a shared class other rules fail; without a box
    of a shared class this one does, as nothing shows that the candidate is as good.
    """
    difference, share = compared.difference_points, compared.share_of_resamples_worse
    if difference is None or share is None:
        if not compared.images or not compared.shared_classes:
            return []
        lacking = f"no box of {', '.join(compared.shared_classes)} in the clean test images"
        return [Rule(name, -margin, lacking, "points", compared.how(), False, "champion_margin")]
    worse = difference < -margin and share >= CERTAIN_SHARE
    how = f"{compared.how()}, worse in {share:.0%} of the resamples"
    return [Rule(name, -margin, difference, "points", how, not worse, "champion_margin")]


def _class_rules(compared: Comparison, given: GateParameters) -> list[Rule]:
    removed = ", ".join(compared.removed_classes) or "none removed"
    kept = given.allow_removed_classes or not compared.removed_classes
    rules = [
        Rule("classes of the champion", "none removed", removed, "", compared.champion, kept, "allow_removed_classes")
    ]
    if compared.added_classes and given.minimum_added_class_map is not None:
        least, parameter = given.minimum_added_class_map, "minimum_added_class_map"
        lacking = [name for name, value in compared.added_classes.items() if value is None]
        name, value = min(compared.added_classes.items(), key=lambda entry: -1.0 if entry[1] is None else entry[1])
        how = f"worst of {len(compared.added_classes)} added classes: {name}"
        measured = f"no box of {', '.join(lacking)} in the test images" if value is None else value
        passed = value is not None and value >= least
        rules.append(Rule("AP50-95 of added classes", least, measured, "", how, passed, parameter))
    return rules


@dataclass(frozen=True)
class _Bench:
    """What every comparison of one gate run shares."""

    context: StepContext
    candidate: Detections
    test_set: ImageSet
    images: HeldOutImages
    seen_by_candidate: SeenImages

    def compare(self, name: str, bundle: Path) -> Comparison:
        """The candidate beside the engine of a bundle."""
        given = self.context.parameters.gate
        seen_by_other = seen_images.seen_by_bundle(bundle)
        seen = {name: seen_by_other, CANDIDATE: self.seen_by_candidate}
        excluded = seen_images.exclusions(self.images, seen, given.near_duplicate_bits)
        rows = _other_rows(len(self.test_set), excluded)
        clean, class_names = self.test_set.subset(rows), _class_names(bundle)
        shared = tuple(one for one in self.test_set.class_names if one in class_names)
        boxed = _images_with_boxes(clean, shared)
        measured = self._measured(bundle, clean, rows, shared) if boxed else {}
        return Comparison(
            champion=name,
            images=len(clean),
            images_with_boxes=boxed,
            excluded=tuple(excluded.values()),
            hashed=seen_by_other.hashed and self.seen_by_candidate.hashed and None not in self.images.hashes,
            shared_classes=shared,
            removed_classes=tuple(sorted(set(class_names) - set(self.test_set.class_names))),
            added_classes=self._added_classes(class_names),
            images_unknown_of=tuple(f"{one} of {who}" for who, known in seen.items() for one in known.unknown),
            **{**dict.fromkeys(MEASURED), **measured},
        )

    def _measured(
        self, bundle: Path, clean: ImageSet, rows: NDArray[np.int64], shared: tuple[str, ...]
    ) -> dict[str, Any]:
        from model.bootstrap import paired_difference

        theirs = _champion_detections(self.context, bundle, clean)
        ours = of_images(self.candidate, rows)
        compared = paired_difference(ours, theirs, clean, shared, seed=self.context.parameters.start.seed)
        low, high = compared.interval()
        values = (compared.first, compared.second, compared.share_below_zero, (100 * low, 100 * high))
        return dict(zip(MEASURED, values, strict=True))

    def _added_classes(self, class_names: list[str]) -> dict[str, float | None]:
        """Images that only the other engine has seen count here: it has no say about these classes."""
        from model.evaluation import evaluate

        added = [name for name in self.test_set.class_names if name not in class_names]
        if not added:
            return {}
        seen = {CANDIDATE: self.seen_by_candidate}
        near_bits = self.context.parameters.gate.near_duplicate_bits
        rows = _other_rows(len(self.test_set), seen_images.exclusions(self.images, seen, near_bits))
        per_class = evaluate(of_images(self.candidate, rows), self.test_set.subset(rows)).per_class_ap
        return {name: per_class.get(name) for name in added}


MEASURED = ("candidate_map50_95", "champion_map50_95", "share_of_resamples_worse", "interval_points")


def _images_with_boxes(images: ImageSet, class_names: tuple[str, ...]) -> int:
    """Images with a box of these classes, crowd regions left out."""
    import numpy as np

    boxes = images.all_boxes()
    labels = [images.class_names.index(name) for name in class_names]
    return len(np.unique(boxes.image_index[np.isin(boxes.labels, labels) & ~boxes.is_crowd]))


def _other_rows(count: int, excluded: dict[int, Exclusion]) -> NDArray[np.int64]:
    import numpy as np

    return np.array([row for row in range(count) if row not in excluded], dtype=np.int64)


def _class_names(bundle: Path) -> list[str]:
    names: list[str] = json.loads((bundle / "engine" / "engine.json").read_text(encoding="utf-8"))["class_names"]
    return names


def _champion_detections(context: StepContext, bundle: Path, images: ImageSet) -> Detections:
    """A registered engine's detections with the candidate's labels; classes the candidate lacks are left out."""
    import numpy as np

    from model.detections import Detections
    from pipeline_tasks.gate import build_engine, detect_with, read_preprocessing

    folder = bundle / "engine"
    engine = build_engine(folder / "model.onnx", context.state / "champion" / bundle.name, context.parameters.gate)
    found = detect_with(context, engine, images, read_preprocessing(folder))
    names = list(images.class_names)
    mapping = np.array([names.index(name) if name in names else -1 for name in _class_names(bundle)], dtype=np.int64)
    labels = mapping[found.labels]
    known = labels >= 0
    return Detections(found.image_index[known], found.boxes_xyxy[known], found.scores[known], labels[known])


def of_images(found: Detections, rows: NDArray[np.int64]) -> Detections:
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
