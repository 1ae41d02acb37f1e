"""Does an engine compute what its reference computes? Boxes and scores compared anchor by anchor on real images."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

from model.engines import Engine

CONFIDENT_SCORE = 0.3


@dataclass(frozen=True)
class AgreementReport:
    """Differences between two engines.

    Box errors are in input pixels (mean and maximum over the four coordinates) and score errors are absolute, both over
    the anchors whose best reference score is above ``confident_score``; 0 when there is none, so look at
    ``confident_anchors``. ``score_error_all_max`` is over every anchor and class.
    """

    reference: str
    candidate: str
    images: int
    confident_score: float
    confident_anchors: int
    box_error_mean_px: float
    box_error_max_px: float
    score_error_mean: float
    score_error_max: float
    score_error_all_max: float

    def to_json(self) -> dict[str, str | int | float]:
        """The fields as a JSON-ready dictionary."""
        return asdict(self)


def compare_outputs(
    reference: Engine,
    candidate: Engine,
    images: NDArray[np.uint8],
    *,
    confident_score: float = CONFIDENT_SCORE,
    batch_size: int = 8,
) -> AgreementReport:
    """Run both engines over the images, uint8 (B, 3, S, S), and report how far apart they are.

    Raises ValueError for no image, when the engines do not describe the same anchors and classes, or when one gives a
    score, or the box of a confident anchor, that is no finite number: no difference could be told from none.
    """
    if len(images) == 0:
        raise ValueError("comparing engines needs at least one image, got none")
    box_errors: list[NDArray[np.float32]] = []
    score_errors: list[NDArray[np.float32]] = []
    largest_score_error = 0.0
    for start in range(0, len(images), batch_size):
        expected_boxes, expected_scores = reference.run(images[start : start + batch_size])
        boxes, scores = candidate.run(images[start : start + batch_size])
        if boxes.shape != expected_boxes.shape or scores.shape != expected_scores.shape:
            raise ValueError(
                f"{candidate.name} gives boxes {boxes.shape} and scores {scores.shape}, "
                f"{reference.name} gives {expected_boxes.shape} and {expected_scores.shape}"
            )
        confident = expected_scores.max(axis=2) > confident_score  # (B, A)
        for engine, own_boxes, own_scores in (
            (reference, expected_boxes, expected_scores),
            (candidate, boxes, scores),
        ):
            if not (np.isfinite(own_scores).all() and np.isfinite(own_boxes[confident]).all()):
                raise ValueError(f"{engine.name} {engine.precision} gives boxes or scores that are no finite numbers")
        box_errors.append(np.abs(boxes - expected_boxes)[confident])
        score_errors.append(np.abs(scores - expected_scores)[confident])
        largest_score_error = max(largest_score_error, float(np.abs(scores - expected_scores).max()))
    box_error, score_error = np.concatenate(box_errors), np.concatenate(score_errors)
    return AgreementReport(
        reference=f"{reference.name} {reference.precision}",
        candidate=f"{candidate.name} {candidate.precision}",
        images=len(images),
        confident_score=confident_score,
        confident_anchors=len(box_error),
        box_error_mean_px=_mean(box_error),
        box_error_max_px=_max(box_error),
        score_error_mean=_mean(score_error),
        score_error_max=_max(score_error),
        score_error_all_max=largest_score_error,
    )


def _mean(values: NDArray[np.float32]) -> float:
    return float(values.mean(dtype=np.float64)) if values.size else 0.0


def _max(values: NDArray[np.float32]) -> float:
    return float(values.max()) if values.size else 0.0
