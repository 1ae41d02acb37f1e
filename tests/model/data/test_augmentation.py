"""Pictures and boxes move together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from model.data.augmentation import (
    AugmentationConfig,
    Sample,
    augment,
    change_colours,
    clip_and_filter,
    draw_affine,
    mixup,
    mosaic_placements,
    warp_boxes,
)
from model.preprocessing import Preprocessing

PREPROCESSING = Preprocessing(96)
NONE = AugmentationConfig.none()
# channels a marker is bright in, so that four marked pictures stay apart in a mosaic
CHANNELS = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0)]


def marked(height: int, width: int, box_xyxy: tuple[int, int, int, int], label: int = 0) -> Sample:
    """A black picture with one bright rectangle in the colour of its label, and its box."""
    image = np.zeros((height, width, 3), np.uint8)
    left, top, right, bottom = box_xyxy
    image[top:bottom, left:right] = CHANNELS[label]
    return Sample(image, np.array([box_xyxy], np.float32), np.array([label]), np.array([0.5], np.float32))


def empty(height: int = 60, width: int = 90) -> Sample:
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Sample(noise, np.empty((0, 4), np.float32), np.empty(0, np.int64), np.empty(0, np.float32))


SOURCES = [
    marked(60, 96, (20, 10, 50, 40), 0),
    marked(96, 50, (5, 30, 45, 70), 1),
    marked(40, 40, (8, 8, 30, 34), 2),
    marked(80, 96, (40, 20, 90, 70), 3),
]


def run(config: AugmentationConfig, seed: int, sources: list[Sample] = SOURCES, index: int = 0) -> Sample:
    random = np.random.default_rng(seed)
    return augment(index, len(sources), sources.__getitem__, PREPROCESSING, config, random)


def bright_hull(image: NDArray[np.uint8], colour: tuple[int, int, int]) -> NDArray[np.int64]:
    """Edges of the region that has this marker's colour, a grey border (114) left out."""
    wanted = np.array(colour) > 0
    mask = (image[:, :, wanted] > 127).all(axis=2) & (image[:, :, ~wanted] < 60).all(axis=2)
    rows, columns = np.nonzero(mask)
    return np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])


@pytest.mark.parametrize("index", range(4))
@pytest.mark.parametrize("margin", [0, 4])
def test_without_augmentation_it_is_the_evaluations_picture(index: int, margin: int) -> None:
    """Exact for sources that already have the input's size along their longer side, as the loader makes them."""
    source = SOURCES[index]
    if margin or max(source.image.shape[:2]) < 96:
        source = empty(96 - margin, 61)
    preprocessing = Preprocessing(96, margin=margin)
    sample = augment(0, 1, [source].__getitem__, preprocessing, NONE, np.random.default_rng(0))
    expected, letterbox = preprocessing.apply(source.image)
    np.testing.assert_array_equal(sample.image.transpose(2, 0, 1), expected)
    np.testing.assert_allclose(sample.boxes_xyxy, letterbox.to_input(source.boxes_xyxy), atol=1e-4)


@pytest.mark.parametrize(("height", "width"), [(40, 30), (31, 47), (90, 7)])
def test_enlarged_it_is_the_evaluations_picture_too(height: int, width: int) -> None:
    source = empty(height, width)
    sample = augment(0, 1, [source].__getitem__, PREPROCESSING, NONE, np.random.default_rng(0))
    expected, _ = PREPROCESSING.apply(source.image)
    np.testing.assert_array_equal(sample.image.transpose(2, 0, 1), expected)


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize(
    "change",
    [
        {},
        {"horizontal_flip_probability": 1.0},
        {"vertical_flip_probability": 1.0},
        {"rotation_degrees": 20.0},
        {"rotation_degrees": 20.0, "horizontal_flip_probability": 0.5},
        {"minimum_scale": 0.4, "maximum_scale": 0.6},
    ],
)
def test_box_stays_on_its_object(change: dict[str, Any], seed: int) -> None:
    config = replace(NONE, **{"minimum_scale": 0.7, "maximum_scale": 1.3, "translation": 0.1, **change})
    sample = run(config, seed, index=seed % 4)
    hull = bright_hull(sample.image, CHANNELS[seed % 4])
    # a pixel for the marker's soft edge; a turned corner is a tip that loses two more at half brightness
    tolerance = 3.0 if "rotation_degrees" in change else 1.0
    assert np.abs(sample.boxes_xyxy[0] - hull).max() <= tolerance


@pytest.mark.parametrize("seed", range(12))
def test_mosaic_boxes_stay_on_their_objects(seed: int) -> None:
    config = replace(NONE, mosaic_probability=1.0, minimum_scale=0.6, maximum_scale=0.9, translation=0.1)
    sample = run(config, seed)
    assert len(sample.labels) >= 1
    labels, counts = np.unique(sample.labels, return_counts=True)
    for label in labels[counts == 1]:
        box = sample.boxes_xyxy[sample.labels == label][0]
        assert np.abs(box - bright_hull(sample.image, CHANNELS[label])).max() <= 1.0


def test_mosaic_can_be_switched_off() -> None:
    config = replace(NONE, mosaic_probability=1.0)
    random = np.random.default_rng(0)
    sample = augment(2, 4, SOURCES.__getitem__, PREPROCESSING, config, random, mosaic_enabled=False)
    assert sample.labels.tolist() == [2]


def test_mosaic_places_tiles_as_the_reference(golden: Any) -> None:
    cases = golden.json("augment")["get_mosaic_coordinate"]
    for case in cases:
        width, height = case["tile_wh"]
        centre = np.array(case["center_xy"], float)
        matrix = mosaic_placements([(height, width)] * 4, Preprocessing(64), centre)[case["index"]]
        region, crop = case["result"]
        moved = warp_boxes(np.array([crop], np.float32), matrix)
        np.testing.assert_allclose(moved[0], region)


def test_warped_boxes_equal_the_references_on_square_targets(golden: Any) -> None:
    """On others the reference clips x to the height (facts 7.4), which is not copied."""
    square = [case for case in golden.json("augment")["affine"] if len(set(case["target_hw"])) == 1]
    assert len(square) == 2
    config = replace(NONE, minimum_box_side=2.0, minimum_visible_fraction=0.1, maximum_aspect_ratio=20.0)
    for case in square:
        boxes = np.array(case["boxes_in"])[:, :4].astype(np.float32)
        height, width = case["target_hw"]
        moved = warp_boxes(boxes, np.array(case["M"]))
        clipped, keep = clip_and_filter(moved, width, height, config)
        np.testing.assert_allclose(clipped, np.array(case["boxes_reference"])[:, :4], atol=1e-9)
        assert keep.tolist() == case["keep"]


def test_affine_matrix_equals_the_references(golden: Any) -> None:
    """Scale and shift about the centre; the draws are forced to the reference's."""

    class Draws:
        def __init__(self, scale: float, shift: NDArray[np.float64]) -> None:
            self.values = iter([scale, 0.0, shift])

        def uniform(self, *_: object, size: int | None = None) -> Any:
            return next(self.values)

        def random(self) -> float:
            return 1.0

    for case in golden.json("augment")["affine"]:
        height, width = case["image_hw"]
        if case["angle_deg"] or case["target_hw"] != [64, 64] or width % 2 == 0:
            continue
        shift = np.array(case["translate_fraction_xy"]) - 0.5
        matrix = draw_affine(NONE, 64, 0.0, Draws(case["scale"], shift))  # type: ignore[arg-type]
        centre = np.array([width // 2, height // 2])  # the reference's integer centre
        matrix[:, 2] -= matrix[:, :2] @ centre
        np.testing.assert_allclose(matrix, case["M"], atol=1e-9)
        return
    pytest.fail("no golden case fits")


def test_boxes_are_clipped_to_width_and_height_in_this_order() -> None:
    boxes = np.array([[-10.0, -10.0, 120.0, 70.0], [60.0, 5.0, 90.0, 45.0], [10.0, 55.0, 20.0, 65.0]])
    clipped, keep = clip_and_filter(boxes, 100, 50, NONE)
    np.testing.assert_array_equal(clipped, [[0, 0, 100, 50], [60, 5, 90, 45], [10, 50, 20, 50]])
    assert keep.tolist() == [True, True, False]


@pytest.mark.parametrize(
    ("box", "kept"),
    [
        ([10.0, 10.0, 12.0, 40.0], False),  # two pixels wide
        ([10.0, 10.0, 12.1, 40.0], True),
        ([-90.0, 10.0, 10.0, 40.0], False),  # a tenth is visible
        ([-89.0, 10.0, 10.0, 40.0], True),
        ([10.0, 10.0, 13.0, 70.0], False),  # twenty times as high as wide
        ([10.0, 10.0, 13.0, 69.0], True),
    ],
)
def test_boxes_not_worth_learning_are_dropped(box: list[float], kept: bool) -> None:
    _, keep = clip_and_filter(np.array([box]), 100, 100, AugmentationConfig())
    assert keep.tolist() == [kept]


@pytest.mark.parametrize(("probability", "mirrored"), [(0.0, 0), (1.0, 50)])
def test_flip_obeys_its_probability(probability: float, mirrored: int) -> None:
    config = replace(AugmentationConfig(), horizontal_flip_probability=probability, rotation_degrees=10.0)
    matrices = [draw_affine(config, 96, 48, np.random.default_rng(seed)) for seed in range(50)]
    assert sum(np.linalg.det(matrix[:, :2]) < 0 for matrix in matrices) == mirrored


def test_grey_stays_grey() -> None:
    grey = np.repeat(np.arange(256, dtype=np.uint8)[:, None, None], 3, axis=2)
    changed = change_colours(grey, 30.0, 0.4, 0.1)
    assert (changed == changed[:, :, :1]).all()
    assert changed[100, 0, 0] == 110


def test_no_colour_change_is_the_same_picture() -> None:
    image = empty().image
    # the way to 8-bit HSV and back costs up to 5 levels in a channel: hue has 180 steps
    assert np.abs(change_colours(image, 0.0, 0.0, 0.0).astype(int) - image.astype(int)).max() <= 5


def test_hue_turns_red_to_green() -> None:
    red = np.full((2, 2, 3), (255, 0, 0), np.uint8)
    np.testing.assert_array_equal(change_colours(red, 120.0, 0.0, 0.0), np.full((2, 2, 3), (0, 255, 0)))


def test_mixup_blends_and_keeps_boxes_of_both() -> None:
    first, second = marked(96, 96, (0, 0, 50, 50), 0), marked(96, 96, (10, 10, 90, 90), 1)
    mixed = mixup(first, second, 0.25)
    assert mixed.labels.tolist() == [0, 1]
    assert mixed.image[5, 5].tolist() == [64, 0, 0]
    assert mixed.image[30, 30].tolist() == [64, 191, 0]
    np.testing.assert_array_equal(mixed.boxes_xyxy, [[0, 0, 50, 50], [10, 10, 90, 90]])


def test_mixup_partner_is_augmented_too() -> None:
    """Both halves of the blend are flipped when every picture is."""
    sources = [marked(96, 96, (0, 0, 30, 30), 0), marked(96, 96, (0, 60, 30, 90), 1)]
    config = replace(NONE, mixup_probability=1.0, horizontal_flip_probability=1.0)
    samples = [run(config, seed, sources) for seed in range(6)]
    assert {label for sample in samples for label in sample.labels.tolist()} == {0, 1}
    assert all(sample.boxes_xyxy[:, 0].min() >= 66 for sample in samples)


def test_weights_of_pseudo_labels_are_carried_along() -> None:
    sample = run(replace(AugmentationConfig(), mixup_probability=1.0, mosaic_probability=1.0), 5)
    assert len(sample.weights) == len(sample.labels) > 0
    assert set(sample.weights.tolist()) == {0.5}


@pytest.mark.parametrize("seed", range(5))
def test_pictures_without_boxes_pass(seed: int) -> None:
    config = replace(AugmentationConfig(), mixup_probability=1.0, rotation_degrees=5.0)
    sample = run(config, seed, [empty(), empty(30, 90)])
    assert sample.image.shape == (96, 96, 3)
    assert sample.boxes_xyxy.shape == (0, 4)


def test_equal_generators_give_equal_samples() -> None:
    config = replace(AugmentationConfig(), mixup_probability=0.5)
    first, second, other = run(config, 1), run(config, 1), run(config, 2)
    np.testing.assert_array_equal(first.image, second.image)
    np.testing.assert_array_equal(first.boxes_xyxy, second.boxes_xyxy)
    assert (first.image != other.image).any()


def test_sources_are_left_as_they_are() -> None:
    """The loader hands out its cache."""
    before = [source.image.copy() for source in SOURCES]
    for source in SOURCES:
        source.image.flags.writeable = False
    for seed in range(10):
        run(replace(AugmentationConfig(), mixup_probability=0.5, rotation_degrees=5.0), seed)
    for source, image in zip(SOURCES, before, strict=True):
        np.testing.assert_array_equal(source.image, image)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AugmentationConfig(mosaic_probability=1.5), "mosaic_probability must be between 0 and 1, got 1.5"),
        (lambda: AugmentationConfig(translation=-0.1), "translation must be at least 0, got -0.1"),
        (lambda: AugmentationConfig(rotation_degrees=float("nan")), "rotation_degrees must be at least 0, got nan"),
        (lambda: AugmentationConfig(minimum_scale=2.0), "minimum_scale must be positive and at most maximum_scale"),
        (lambda: AugmentationConfig(mixup_concentration=0.0), "mixup_concentration must be positive, got 0"),
    ],
)
def test_settings_out_of_range_are_named(make: Callable[[], AugmentationConfig], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_each_box_may_have_a_matrix_of_its_own() -> None:
    random = np.random.default_rng(4)
    matrices, boxes = random.normal(size=(5, 2, 3)), random.uniform(0, 50, (5, 4)).astype(np.float32)
    together = warp_boxes(boxes, matrices)
    for box, matrix, moved in zip(boxes, matrices, together, strict=True):
        np.testing.assert_allclose(
            warp_boxes(box[None], matrix)[0], moved, rtol=1e-13
        )  # float64, another order of sums
    assert warp_boxes(boxes[:0], matrices[:0]).shape == (0, 4)
