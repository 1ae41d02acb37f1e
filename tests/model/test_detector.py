"""Sources in, results in original pixels out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from model import engines
from model.data.images import read_image, write_image
from model.detector import (
    Detector,
    ImageDetectionPrediction,
    ImagesDetectionPrediction,
    open_detector,
    unique_file_name,
)
from model.preprocessing import Preprocessing

PREPROCESSING = Preprocessing(64)


class Marker:
    """An engine that puts a box on the right half of each picture, class by its colour, score by its brightness."""

    def __init__(self) -> None:
        self.batches: list[int] = []

    def run(self, images: NDArray[np.uint8]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        self.batches.append(len(images))
        assert images.dtype == np.uint8
        boxes = np.tile(np.array([[[32, 16, 80, 48], [0, 16, 32, 48]]], np.float32), (len(images), 1, 1))
        scores = np.zeros((len(images), 2, 3), np.float32)
        scores[:, 0] = images[:, :, 32, 32] / 255
        scores[:, 1, 2] = 0.3
        return boxes, scores


def picture(red: int = 230, green: int = 0) -> NDArray[np.uint8]:
    image = np.zeros((50, 100, 3), np.uint8)
    image[:, :, 0], image[:, :, 1] = red, green
    return image


@pytest.fixture
def detector() -> Detector:
    return Detector(Marker(), ("red", "green", "blue"), PREPROCESSING)


def one(result: Any) -> ImageDetectionPrediction:
    assert isinstance(result, ImageDetectionPrediction)
    return result


def several(result: Any) -> ImagesDetectionPrediction:
    assert isinstance(result, ImagesDetectionPrediction)
    return result


def assert_is_red_picture(result: ImageDetectionPrediction) -> None:
    found = result.prediction
    # 64 input pixels for 100; the first box reaches beyond the picture and is cut at its edge
    np.testing.assert_allclose(found.bboxes_xyxy, [[50, 0, 100, 50], [0, 0, 50, 50]], atol=1e-4)
    assert found.labels.tolist() == [0, 2]
    np.testing.assert_allclose(found.confidence, [230 / 255, 0.3], rtol=1e-6)
    kinds = [str(array.dtype) for array in (found.bboxes_xyxy, found.labels, found.confidence)]
    assert kinds == ["float32", "int64", "float32"]
    assert (found.image_shape, len(found)) == ((50, 100), 2)
    np.testing.assert_array_equal(result.image, picture())
    assert result.class_names == ("red", "green", "blue")


@pytest.mark.parametrize(
    "source",
    [
        picture(),
        picture().transpose(2, 0, 1),
        torch.from_numpy(picture()),
        torch.from_numpy(picture()).permute(2, 0, 1),
        Image.fromarray(picture()),
        Image.fromarray(picture()).convert("RGBA"),
    ],
)
def test_a_picture_in_memory(detector: Detector, source: Any) -> None:
    assert_is_red_picture(one(detector.predict(source)))


def test_a_file_and_its_name(detector: Detector, tmp_path: Path) -> None:
    write_image(tmp_path / "street.png", picture())
    for source in (tmp_path / "street.png", str(tmp_path / "street.png")):
        result = one(detector.predict(source))
        assert_is_red_picture(result)
        assert result.name == str(tmp_path / "street.png")


def test_grey_pictures(detector: Detector, tmp_path: Path) -> None:
    grey = np.full((50, 100), 200, np.uint8)
    Image.fromarray(grey).save(tmp_path / "grey.png")
    for source in (grey, tmp_path / "grey.png", Image.fromarray(grey)):
        assert sorted(one(detector.predict(source)).prediction.labels.tolist()) == [0, 1, 2, 2]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, red in (("b.png", 200), ("a.jpg", 250), ("c.PNG", 150)):
        write_image(tmp_path / "pictures" / name, picture(red))
    (tmp_path / "pictures" / "notes.txt").write_text("no picture")
    (tmp_path / "pictures" / "deeper").mkdir()
    return tmp_path / "pictures"


def test_a_folder_a_glob_and_a_list(detector: Detector, folder: Path) -> None:
    results = several(detector.predict(folder))
    assert [Path(result.name).name for result in results] == ["a.jpg", "b.png", "c.PNG"]
    assert [Path(result.name).name for result in several(detector.predict(f"{folder}/*.png"))] == ["b.png"]
    mixed = several(detector.predict([picture(), folder / "b.png", str(folder)]))
    assert len(mixed) == 5
    assert_is_red_picture(mixed[0])
    assert mixed[0].name == "image_0"


def test_a_batch_is_several_pictures(detector: Detector) -> None:
    for batch in (np.stack([picture(), picture(100)]), torch.from_numpy(np.stack([picture(), picture(100)]))):
        results = several(detector.predict(batch))
        assert len(results) == 2
        assert_is_red_picture(results[0])


def test_results_do_not_depend_on_the_batch_size(detector: Detector, folder: Path) -> None:
    alone = detector.predict(folder, batch_size=1)
    together = detector.predict(folder, batch_size=2)
    assert detector.engine.batches == [1, 1, 1, 2, 1]  # type: ignore[attr-defined]
    assert json.dumps(alone.to_json()) == json.dumps(together.to_json())


def test_stream_reads_no_further_than_needed(detector: Detector, folder: Path) -> None:
    (folder / "c.PNG").write_text("no picture")
    stream = detector.stream(folder, batch_size=1)
    assert Path(next(stream).name).name == "a.jpg"


def test_thresholds_and_maximum(detector: Detector) -> None:
    assert len(one(detector.predict(picture(), score_threshold=0.5)).prediction) == 1
    assert len(one(detector.predict(picture(), score_threshold=0.95)).prediction) == 0
    assert len(one(detector.predict(picture(), max_detections=1)).prediction) == 1
    crossed = np.array([[[0, 16, 64, 48], [0, 16, 60, 48]]], np.float32)
    both = np.full((1, 2, 3), [0.9, 0, 0], np.float32)
    detector.engine = type("Crossed", (), {"run": lambda self, images: (crossed, both)})()
    assert len(one(detector.predict(picture())).prediction) == 1
    assert len(one(detector.predict(picture(), iou_threshold=0.99)).prediction) == 2


def test_json_of_a_result(detector: Detector) -> None:
    content = json.loads(json.dumps(one(detector.predict(picture())).to_json()))
    assert (content["image"], content["width"], content["height"]) == ("image_0", 100, 50)
    first = content["detections"][0]
    assert (first["class_name"], first["label"]) == ("red", 0)
    assert first["confidence"] == pytest.approx(230 / 255)
    assert first["bbox_xyxy"] == pytest.approx([50, 0, 100, 50], abs=1e-4)


def test_saving_one_and_several(detector: Detector, folder: Path, tmp_path: Path) -> None:
    result = one(detector.predict(folder / "a.jpg"))
    assert result.save(tmp_path / "out" / "x.png") == tmp_path / "out" / "x.png"
    saved = read_image(tmp_path / "out" / "x.png")
    np.testing.assert_array_equal(saved, result.draw())
    assert (saved != result.image).any()
    assert result.save(tmp_path / "out") == tmp_path / "out" / "a.jpg"
    paths = several(detector.predict([folder / "a.jpg", folder / "a.jpg", folder / "b.png"])).save(tmp_path / "all")
    assert [path.name for path in paths] == ["a.jpg", "a_1.jpg", "b.jpg"]
    assert all(path.is_file() for path in paths)


def test_file_names_never_collide() -> None:
    used: dict[str, int] = {}
    names = [unique_file_name(name, used) for name in ("x/a.png", "a_1.png", "y/a.jpg", "a.bmp", "a_1.gif")]
    assert len(set(names)) == 5


def test_confidence_can_be_left_out_of_the_drawing(detector: Detector) -> None:
    result = one(detector.predict(picture()))
    assert (result.draw() != result.draw(show_confidence=False)).any()


def test_show_draws_with_matplotlib(detector: Detector, monkeypatch: pytest.MonkeyPatch) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown: list[int] = []
    monkeypatch.setattr(pyplot, "show", lambda: shown.append(len(pyplot.get_fignums())))
    one(detector.predict(picture())).show()
    pyplot.close("all")
    assert shown == [1]


def test_truncated_picture_is_named(detector: Detector, folder: Path) -> None:
    content = (folder / "a.jpg").read_bytes()
    (folder / "a.jpg").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"pictures/a\.jpg cannot be decoded: it is empty, truncated or no picture"):
        detector.predict(folder)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nowhere.jpg", "no image found at nowhere.jpg"),
        ("https://example.org/a.jpg", "download the image first"),
        ([], "the list of images to predict on is empty"),
        (7, "cannot predict on int"),
        ([7], "an image must be uint8 with values 0 to 255, got int"),
        (np.zeros((5, 5, 3)), "an image must be uint8 with values 0 to 255, got float64"),
        (np.zeros((5, 5, 4), np.uint8), r"must have the shape .*, got \(5, 5, 4\)"),
    ],
)
def test_sources_that_are_none_are_named(detector: Detector, source: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        detector.predict(source)


def test_empty_folder_is_named(detector: Detector, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no image found at"):
        detector.predict(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"score_threshold": 1.5}, "score_threshold must be between 0 and 1, got 1.5"),
        ({"iou_threshold": -0.1}, "iou_threshold must be between 0 and 1, got -0.1"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
    ],
)
def test_settings_out_of_range_are_named(detector: Detector, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        detector.predict(picture(), **options)


ENGINE = {
    "schema_version": 1,
    "class_names": ["red", "green", "blue"],
    "preprocessing": PREPROCESSING.to_json(),
    "score_threshold": 0.5,
    "iou_threshold": 0.6,
}


def test_open_detector_reads_engine_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Path, str, int]] = []

    def load(path: Path, runtime: str, threads: int) -> Marker:
        asked.append((path, runtime, threads))
        return Marker()

    monkeypatch.setattr(engines, "load_engine", load)
    (tmp_path / "engine.json").write_text(json.dumps(ENGINE))
    opened = open_detector(tmp_path, runtime="onnxruntime", threads=2)
    assert asked == [(tmp_path, "onnxruntime", 2)]
    assert (opened.class_names, opened.score_threshold, opened.iou_threshold) == (("red", "green", "blue"), 0.5, 0.6)
    assert one(opened.predict(picture())).prediction.labels.tolist() == [0]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"is no engine directory: it has no engine\.json"),
        ("{", r"engine\.json is not valid JSON"),
        (json.dumps({"class_names": []}), r"engine\.json lacks the field 'preprocessing'"),
    ],
)
def test_damaged_engine_directory_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str | None, message: str
) -> None:
    monkeypatch.setattr(engines, "load_engine", lambda *_, **__: Marker())
    if content is not None:
        (tmp_path / "engine.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        open_detector(tmp_path)
