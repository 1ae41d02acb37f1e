"""Agreement figures against differences put in by hand."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from model.engines import EngineOutput
from model.engines.agreement import compare_outputs


class FixedEngine:
    """Gives the same answer for every image: three anchors, two classes; the first two anchors are confident."""

    name, runtime_version, precision, threads = "fixed", "1", "float32", 1
    fixed_batch = None

    def __init__(self, box_shift: float = 0.0, score_shift: float = 0.0, background_shift: float = 0.0) -> None:
        self.boxes_xyxy = np.array([[0, 0, 10, 10], [5, 5, 20, 20], [1, 1, 2, 2]], np.float32)
        self.scores = np.array([[0.9, 0.1], [0.2, 0.4], [0.1, 0.2]], np.float32)
        self.boxes_xyxy[0, 0] += box_shift
        self.boxes_xyxy[2] += 100 * box_shift  # not confident: must not count
        self.scores[0, 0] += score_shift
        self.scores[2, 0] += background_shift

    def run(self, images: NDArray[np.uint8]) -> EngineOutput:
        return np.repeat(self.boxes_xyxy[None], len(images), 0), np.repeat(self.scores[None], len(images), 0)


IMAGES = np.zeros((5, 3, 8, 8), np.uint8)


def test_equal_engines_agree() -> None:
    report = compare_outputs(FixedEngine(), FixedEngine(), IMAGES, batch_size=2)
    assert (report.images, report.confident_anchors) == (5, 10)
    assert report.box_error_max_px == report.score_error_max == report.score_error_all_max == 0.0


def test_differences_are_measured_on_confident_anchors() -> None:
    candidate = FixedEngine(box_shift=0.8, score_shift=-0.04, background_shift=0.1)
    report = compare_outputs(FixedEngine(), candidate, IMAGES)
    assert report.box_error_max_px == pytest.approx(0.8, abs=1e-6)
    assert report.box_error_mean_px == pytest.approx(0.8 / 8, abs=1e-6)  # one of 2 x 4 coordinates
    assert report.score_error_max == pytest.approx(0.04, abs=1e-6)
    assert report.score_error_mean == pytest.approx(0.04 / 4, abs=1e-6)
    assert report.score_error_all_max == pytest.approx(0.1, abs=1e-6)
    assert report.to_json()["candidate"] == "fixed float32"


def test_no_confident_anchor_is_visible_in_the_report() -> None:
    report = compare_outputs(FixedEngine(), FixedEngine(box_shift=1), IMAGES, confident_score=0.95)
    assert report.confident_anchors == 0 and report.box_error_mean_px == 0.0


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("field", ["boxes_xyxy", "scores"])
def test_what_is_no_number_does_not_pass_for_agreement(field: str, value: float) -> None:
    broken = FixedEngine()
    getattr(broken, field)[1, 1] = value
    for pair in ((broken, FixedEngine()), (FixedEngine(), broken)):
        with pytest.raises(ValueError, match="fixed float32 gives boxes or scores that are no finite numbers"):
            compare_outputs(*pair, IMAGES)
    unconfident = FixedEngine()
    unconfident.boxes_xyxy[2] = value
    assert compare_outputs(FixedEngine(), unconfident, IMAGES).box_error_max_px == 0.0


def test_nothing_to_compare_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one image"):
        compare_outputs(FixedEngine(), FixedEngine(), IMAGES[:0])
    other = FixedEngine()
    other.scores = other.scores[:, :1]
    with pytest.raises(ValueError, match="scores"):
        compare_outputs(FixedEngine(), other, IMAGES)
