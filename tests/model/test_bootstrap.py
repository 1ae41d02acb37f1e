"""The paired bootstrap: equal to measuring every draw anew, certain where it must be, and what it refuses."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from evaluation_scenes import coco_set, disturbed

from model.bootstrap import paired_difference
from model.data.image_set import ImageSet, concatenate
from model.detections import Detections
from model.evaluation import evaluate


@pytest.fixture(scope="module")
def cells(shared: Path) -> ImageSet:
    return coco_set(shared / "data/bccd", "test")


def repeated(found: Detections, drawn: np.ndarray) -> Detections:
    """The detections of drawn images, an image drawn twice with its detections twice."""
    parts = [found.select(found.image_index == image) for image in drawn]
    index = np.concatenate([np.full(len(part), place) for place, part in enumerate(parts)])
    columns = (np.concatenate([getattr(part, name) for part in parts]) for name in ("boxes_xyxy", "scores", "labels"))
    return Detections(index, *columns)


def mean_ap(found: Detections, images: ImageSet, names: list[str]) -> float:
    per_class = evaluate(found, images).per_class_ap
    values = [per_class[name] for name in names if not math.isnan(per_class.get(name, math.nan))]
    return sum(values) / len(values) if values else 0.0


def test_a_draw_is_what_measuring_the_drawn_images_gives(cells: ImageSet) -> None:
    names = list(cells.class_names[:2])
    ours, theirs = disturbed(cells, 0, ties=False), disturbed(cells, 1, ties=False)
    found = paired_difference(ours, theirs, cells, names, resamples=3, seed=4)
    assert found.first == pytest.approx(mean_ap(ours, cells, names), abs=1e-12)
    assert found.second == pytest.approx(mean_ap(theirs, cells, names), abs=1e-12)
    random = np.random.default_rng(4)
    for difference in found.resampled:
        drawn = np.sort(random.integers(0, len(cells), len(cells)))
        images = concatenate([cells.subset([image]) for image in drawn])
        first, second = (mean_ap(repeated(one, drawn), images, names) for one in (ours, theirs))
        assert difference == pytest.approx(first - second, abs=1e-12)


def test_perfect_against_blind_is_certain(cells: ImageSet) -> None:
    truth = cells.all_boxes()
    perfect = Detections(
        truth.image_index, truth.boxes_xyxy.astype(np.float32), np.ones(len(truth.labels), np.float32), truth.labels
    )
    blind = perfect.select([])
    found = paired_difference(blind, perfect, cells, cells.class_names, resamples=40)
    assert (found.first, found.share_below_zero) == (0.0, 1.0)
    assert found.second == pytest.approx(1.0, abs=1e-3)  # float32 corners of nearly touching boxes
    assert paired_difference(perfect, blind, cells, cells.class_names, resamples=40).share_below_zero == 0.0


def test_the_same_detector_never_differs(cells: ImageSet) -> None:
    found = disturbed(cells, 0, ties=True)
    compared = paired_difference(found, found, cells, cells.class_names, resamples=20)
    assert (compared.share_below_zero, compared.interval()) == (0.0, (0.0, 0.0))


def test_interval_holds_the_share_that_was_asked_for(cells: ImageSet) -> None:
    ours, theirs = disturbed(cells, 0, ties=False), disturbed(cells, 1, ties=False)
    compared = paired_difference(ours, theirs, cells, cells.class_names, resamples=200)
    low, high = compared.interval(0.8)
    inside = ((compared.resampled >= low) & (compared.resampled <= high)).mean()
    assert inside == pytest.approx(0.8, abs=0.02)
    assert low < compared.first - compared.second < high


def test_what_cannot_be_compared_is_refused(cells: ImageSet) -> None:
    nothing = disturbed(cells, 0, ties=False).select([])
    with pytest.raises(ValueError, match="no images to compare"):
        paired_difference(nothing, nothing, cells.subset([]), cells.class_names)
    with pytest.raises(ValueError, match="no class 'dragon'"):
        paired_difference(nothing, nothing, cells, ["dragon"])
