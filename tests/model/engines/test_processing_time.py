"""Times before and behind the network: on every picture, with the engine's own boxes."""

from __future__ import annotations

import json
import time

import numpy as np
import pytest
from numpy.typing import NDArray

from model.engines import EngineOutput
from model.engines.processing_time import measure_processing
from model.preprocessing import Letterbox, Preprocessing

PICTURES = [np.zeros((20, 30, 3), np.uint8), np.zeros((50, 40, 3), np.uint8)]


class BoxEngine:
    """Two boxes in each image, one of them above the threshold; takes 20 ms, which counts nowhere here."""

    name, runtime_version, precision, threads = "boxes", "1", "int8", 1
    fixed_batch = None

    def run(self, images: NDArray[np.uint8]) -> EngineOutput:
        assert images.shape == (1, 3, 32, 32)
        time.sleep(0.02)
        boxes = np.array([[[1, 1, 9, 9], [2, 2, 20, 20]]], np.float32)
        return boxes, np.array([[[0.9], [0.1]]], np.float32)


class SlowPreprocessing(Preprocessing):
    def apply(self, image: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], Letterbox]:
        time.sleep(0.004)
        return super().apply(image)


def test_each_part_is_timed_alone() -> None:
    records = measure_processing(
        BoxEngine(), PICTURES, SlowPreprocessing(32), score_threshold=0.5, iou_threshold=0.7, rounds=3
    )
    before, behind = records["preprocessing"], records["postprocessing"]
    assert before.min_ms >= 4.0 and before.p50_ms <= before.p90_ms <= before.p99_ms
    assert behind.min_ms < 4.0, "neither the engine nor the fitting is in it"
    assert (before.images, before.repeats) == (2, 3)
    told = json.loads(json.dumps(before.to_json()))
    assert told["what"].startswith("a decoded picture made to fit")


def test_without_a_picture_it_is_refused() -> None:
    with pytest.raises(ValueError, match="no picture to time"):
        measure_processing(BoxEngine(), [], Preprocessing(32), score_threshold=0.5, iou_threshold=0.7)
