"""Letterboxing against golden images and boxes, and a whole prediction from image to original coordinates."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from model.boxes import postprocess
from model.preprocessing import Letterbox, Preprocessing

CASES = {"small_landscape": (64, 4), "small_portrait": (64, 4), "coco_landscape": (640, 4), "coco_big": (640, 4)}


@pytest.mark.parametrize("case", CASES)
def test_pixels_and_geometry_equal_golden(golden, case):
    arrays, record = golden.arrays("preprocess"), golden.json("preprocess")["cases"][case]
    network_input, letterbox = Preprocessing(*CASES[case]).apply(arrays[f"{case}.image_hwc"])
    assert list(network_input.shape) == record["out_shape"] and network_input.dtype == np.uint8
    assert (letterbox.left, letterbox.top) == (record["pad"]["left"], record["pad"]["top"])
    assert [letterbox.height, letterbox.width] == record["image_hw"]
    assert letterbox.scale == pytest.approx(record["scale"], rel=1e-12)
    complete = f"{case}.output_uint8_chw"
    expected = arrays[complete] if complete in arrays else arrays[f"{complete}_every8"]
    actual = network_input if complete in arrays else network_input[:, ::8, ::8]
    difference = np.abs(actual.astype(int) - expected.astype(int))
    assert difference.max() <= 1  # golden README: one grey level between resize implementations
    assert network_input.mean() / 255 == pytest.approx(record["mean"], abs=1e-3)


@pytest.mark.parametrize("case", CASES)
def test_boxes_return_as_in_golden(golden, case):
    arrays, record = golden.arrays("preprocess"), golden.json("preprocess")["cases"][case]
    height, width = record["image_hw"]
    letterbox = Preprocessing(*CASES[case]).letterbox(width, height)
    back = letterbox.to_original(arrays[f"{case}.boxes_in"])
    np.testing.assert_allclose(back, arrays[f"{case}.boxes_back"], rtol=0, atol=1e-3)
    np.testing.assert_allclose(letterbox.to_input(back), arrays[f"{case}.boxes_in"], rtol=0, atol=1e-3)


def test_whole_prediction_equals_golden(golden, small_network):
    """Image, preprocessing, network S, suppression, original coordinates: the same 28 rows in order."""
    expected = golden.json("predict_s")
    image = golden.arrays("preprocess")["coco_landscape.image_hwc"]
    network_input, letterbox = Preprocessing(640, margin=4).apply(image)
    with torch.inference_mode():
        (boxes_xyxy, scores), _ = small_network(torch.from_numpy(network_input)[None].float() / 255)
    detections = postprocess(
        boxes_xyxy[0].numpy(),
        scores[0].numpy(),
        score_threshold=expected["conf"],
        iou_threshold=expected["iou"],
        pre_nms_top_k=expected["nms_top_k"],
        max_detections=expected["max_predictions"],
    )
    rows = np.array(expected["rows"])
    assert detections[:, 5].tolist() == rows[:, 5].tolist()
    np.testing.assert_allclose(letterbox.to_original(detections[:, :4]), rows[:, :4], rtol=0, atol=0.05)
    np.testing.assert_allclose(detections[:, 4], rows[:, 4], rtol=0, atol=5e-5)


def test_image_of_the_input_size_passes_unchanged():
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    network_input, letterbox = Preprocessing(64).apply(image)
    np.testing.assert_array_equal(network_input, image.transpose(2, 0, 1))
    assert letterbox == Letterbox(scale=1.0, left=0, top=0, width=64, height=64)


def test_padding_surrounds_the_image():
    network_input, letterbox = Preprocessing(64, pad_value=7).apply(np.full((32, 64, 3), 200, dtype=np.uint8))
    assert (letterbox.left, letterbox.top) == (0, 16)
    assert (network_input[:, :16] == 7).all() and (network_input[:, 48:] == 7).all()
    assert (network_input[:, 16:48] == 200).all()


def test_extreme_aspect_keeps_a_pixel():
    network_input, _ = Preprocessing(32).apply(np.zeros((1, 1000, 3), dtype=np.uint8))
    assert (network_input == 0).sum() == 32 * 3


def test_json_round_trip():
    preprocessing = Preprocessing(320, margin=2, pad_value=0)
    assert Preprocessing.from_json(preprocessing.to_json()) == preprocessing
    assert set(preprocessing.to_json()) == {field.name for field in dataclasses.fields(Preprocessing)}


@pytest.mark.parametrize(
    "record, message",
    [
        ({"input_size": 64}, "must have the fields"),
        ({"input_size": 64, "margin": 0, "pad_value": 114, "mean": 0}, "must have the fields"),
        ({"input_size": "64", "margin": 0, "pad_value": 114}, "input_size must be a whole number, got '64'"),
        ({"input_size": 100, "margin": 0, "pad_value": 114}, "positive multiple of 32, got 100"),
        ({"input_size": 64, "margin": 64, "pad_value": 114}, "margin must be from 0 to below input_size"),
        ({"input_size": 64, "margin": 0, "pad_value": 300}, "pad_value must be from 0 to 255"),
    ],
)
def test_bad_records_are_refused(record, message):
    with pytest.raises(ValueError, match=message):
        Preprocessing.from_json(record)


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((4, 4), np.uint8),
        np.zeros((4, 4, 4), np.uint8),
        np.zeros((4, 4, 3), np.float32),
        np.zeros((0, 4, 3), np.uint8),
    ],
)
def test_only_rgb_uint8_images_are_taken(image):
    with pytest.raises(ValueError, match="expected an RGB image"):
        Preprocessing(32).apply(image)
