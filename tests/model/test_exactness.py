"""What docs/exactness.md says: what other tests leave of the golden files, and apart, what the reference gets wrong."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch

import model
from model.assigner import Targets, assign_task_aligned
from model.boxes import postprocess
from model.data.augmentation import change_colours, warp_boxes
from model.detector import Detector
from model.head import make_anchor_grid
from model.preprocessing import Preprocessing
from model.schedule import WarmupCosine

DOCUMENT = "docs/exactness.md"


def test_the_document_names_every_golden_file_and_only_tests_that_exist(repository: Path, golden) -> None:
    text = (repository / DOCUMENT).read_text(encoding="utf-8")
    files = {path.name for path in golden.folder.iterdir() if path.suffix in (".json", ".npz", ".py")}
    assert len(files) >= 24
    named = set(re.findall(r"`([\w]+\.(?:json|npz|py))`", text))
    assert files <= named, f"not in {DOCUMENT}: {sorted(files - named)}"
    for path in set(re.findall(r"`((?:tests|model|pipeline_tasks)/[\w/]+\.py)`", text)):
        assert (repository / path).is_file(), f"{DOCUMENT} names {path}"


@pytest.mark.parametrize(("variant", "listing"), [("s", "s_keys"), ("m", "m_keys")])
def test_folded_keys_are_the_references_with_every_norm_folded(golden, variant, listing):
    """The reference's fully fused form keeps the norms outside QARepVGG blocks; ours turns them into a bias."""
    theirs = {key: shape for key, shape in golden.json(listing)["fully_fused_form"]["keys"]}
    expected = {key: shape for key, shape in theirs.items() if ".bn." not in key}
    expected |= {
        key.replace(".bn.weight", ".conv.bias"): shape for key, shape in theirs.items() if key.endswith(".bn.weight")
    }
    with torch.device("meta"):
        folded = model.build(variant, 80).eval().fuse()
    assert {key: list(value.shape) for key, value in folded.state_dict().items()} == expected


def test_pixels_of_preprocessing_are_exact(golden):
    """The golden files were made with OpenCV's bilinear resize, and so are ours."""
    arrays = golden.arrays("preprocess")
    for case, size in {"small_landscape": 64, "small_portrait": 64, "coco_landscape": 640, "coco_big": 640}.items():
        pixels, _ = Preprocessing(size, margin=4).apply(arrays[f"{case}.image_hwc"])
        complete = f"{case}.output_uint8_chw"
        if complete in arrays:
            np.testing.assert_array_equal(pixels, arrays[complete])
        else:
            np.testing.assert_array_equal(pixels[:, ::8, ::8], arrays[f"{complete}_every8"])


def _cosine(config: dict, warmup_steps: int) -> WarmupCosine:
    total = config["L"] * config["max_epochs"]
    return WarmupCosine(config["initial_lr"], total, warmup_steps, final_ratio=config["final"])


@pytest.mark.parametrize(("case", "warmup_steps"), [("coco_short_epoch", 1000), ("epoch_warmup_clean", 150)])
def test_after_any_warmup_the_cosine_is_the_references(golden, case, warmup_steps):
    """During warm-up ours rises with every step: theirs is squeezed into one epoch, or rises once an epoch."""
    record = golden.json("schedules")[case]
    schedule = _cosine(record["config"], warmup_steps)
    rates = {int(step): rate for step, rate in record["lr_used_at_step"].items() if int(step) >= warmup_steps}
    assert len(rates) > 10
    assert {step: schedule.at(step) for step in rates} == pytest.approx(rates, rel=1e-6)  # golden README


@pytest.mark.parametrize("case", ["finetune_rf100", "finetune_rf100_long_epoch"])
def test_the_cosine_does_not_wait_for_step_1000(golden, case):
    """The reference inherits 1000 warm-up steps beside 3 warm-up epochs: it stays at the full rate, or jumps to it."""
    record = golden.json("schedules")[case]
    config, theirs = record["config"], {int(step): rate for step, rate in record["lr_used_at_step"].items()}
    warmup_steps = config["L"] * config["warm_epochs"]
    schedule = _cosine(config, warmup_steps)
    rates = [schedule.at(step) for step in range(config["L"] * config["max_epochs"])]
    assert rates.index(max(rates)) == warmup_steps - 1
    assert all(
        later <= earlier for earlier, later in zip(rates[warmup_steps:], rates[warmup_steps + 1 :], strict=False)
    )
    if warmup_steps < 1000:
        assert theirs[1000] == config["initial_lr"] > rates[1000]
    else:
        assert theirs[1001] == config["initial_lr"] > 1.4 * theirs[1000]
        assert rates[1001] == pytest.approx(rates[1000], rel=2e-3)


def test_the_references_affine_boxes_are_ours_but_for_its_swapped_limits(golden):
    """On a target that is not square it clips x to the height and y to the width; with them ours are its own."""
    cases = [case for case in golden.json("augment")["affine"] if len(set(case["target_hw"])) == 2]
    assert len(cases) == 3
    differing = 0
    for case in cases:
        boxes = np.array(case["boxes_in"])[:, :4].astype(np.float32)
        height, width = case["target_hw"]
        moved = warp_boxes(boxes, np.array(case["M"]))
        theirs = np.array(case["boxes_reference"])[:, :4]
        np.testing.assert_allclose(np.clip(moved, 0, [height, width, height, width]), theirs, atol=1e-9)
        differing += not np.allclose(np.clip(moved, 0, [width, height, width, height]), theirs)
    assert differing == 2


def test_colours_of_the_reference_come_back_where_nothing_changes(golden):
    """It adds whole steps to hue, saturation and value of BGR pictures; we turn and scale those of RGB pictures."""
    for case in golden.json("augment")["hsv"]:
        picture = np.array(case["image_in"], np.uint8)[..., ::-1].copy()
        theirs = np.array(case["image_out"], np.uint8)[..., ::-1]
        if not any(case["unit_gains"]):
            np.testing.assert_array_equal(change_colours(picture, 0.0, 0.0, 0.0), theirs)


def test_what_our_selection_keeps_before_suppression_is_in_the_references(golden):
    """Its export keeps the 50 anchors of the best top class with all their classes, ours the 50 best pairs of both."""
    arrays = golden.arrays("postprocess")
    for image in range(2):
        rows = postprocess(
            arrays["boxes"][image],
            arrays["scores"][image],
            score_threshold=0.0,
            iou_threshold=1.0,  # nothing is suppressed
            pre_nms_top_k=50,
        )
        assert len(rows) == 50
        kept = arrays["export_pre_nms_50.boxes"][image]
        scores = arrays["export_pre_nms_50.scores"][image]
        for row in rows:
            (anchor,) = np.flatnonzero((kept == row[:4]).all(axis=1))
            assert scores[anchor, int(row[5])] == row[4]


def test_a_cap_keeps_the_best_detections_of_all_classes(golden):
    """The reference's export groups rows by class and cuts the list there, so high class ids are lost first."""
    arrays = golden.arrays("postprocess")
    settings = {"score_threshold": 0.25, "iou_threshold": 0.7, "pre_nms_top_k": 1024}
    for image in range(2):
        everything = arrays[f"predict_default.image{image}"]
        capped = postprocess(arrays["boxes"][image], arrays["scores"][image], max_detections=20, **settings)
        np.testing.assert_array_equal(capped, everything[:20])
        assert capped[:, 5].max() == 5  # the highest class id
        assert (np.diff(capped[:, 4]) <= 0).all()
        by_class = everything[np.lexsort((-everything[:, 4], everything[:, 5]))][:20]
        assert set(by_class[:, 5]) == {0.0}


class _OneBox:
    """An engine that sees one box, with little confidence."""

    def run(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return np.array([[[8, 8, 72, 40]]], np.float32), np.full((1, 1, 1), 0.05, np.float32)


def test_a_threshold_of_zero_is_zero_and_boxes_end_at_the_picture():
    """The reference takes 0 for "not given" and clips nothing."""
    detector = Detector(_OneBox(), ["thing"], Preprocessing(64))
    picture = np.zeros((64, 64, 3), np.uint8)
    assert len(detector.predict(picture).prediction) == 0
    found = detector.predict(picture, score_threshold=0).prediction
    assert found.bboxes_xyxy.tolist() == [[8, 8, 64, 40]]


def _assign(boxes: list[list[float]], predicted: torch.Tensor, points: torch.Tensor):
    count = len(boxes)
    targets = Targets(
        torch.tensor([boxes]), torch.zeros(1, count, dtype=torch.int64), torch.ones(1, count), torch.ones(1, count) > 0
    )
    return assign_task_aligned(torch.full((1, len(points), 1), 0.5), predicted, points, targets)


def test_a_box_around_the_origin_is_learned():
    """The reference takes a row of its targets for padding when left + top + right + bottom is not above 0."""
    grid = make_anchor_grid([(8, 8), (4, 4), (2, 2)], torch.device("cpu"), torch.float32)
    assignment = _assign([[-40.0, -40.0, 20.0, 20.0]], grid.anchors_xyxy[None], grid.anchor_points)
    assert assignment.positive.any()


def test_an_anchor_that_overlaps_nothing_stays_background():
    """The reference may call it positive with weight 0, by the order of ties, and then teaches it nothing at all."""
    grid = make_anchor_grid([(8, 8), (4, 4), (2, 2)], torch.device("cpu"), torch.float32)
    elsewhere = torch.full((1, len(grid.anchor_points), 4), 1000.0) + torch.tensor([0.0, 0.0, 9.0, 9.0])
    assignment = _assign([[0.0, 0.0, 64.0, 64.0]], elsewhere, grid.anchor_points)
    assert not assignment.positive.any()
