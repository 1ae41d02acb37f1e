"""From pictures to detections and to pictures with boxes: what a user of an engine touches."""

from __future__ import annotations

import glob
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import numpy as np
from jaxtyping import Float32, Int64, UInt8
from numpy.typing import NDArray

from model.data.images import IMAGE_SUFFIXES, read_image, write_image
from model.detections import detections_in_original_pixels
from model.drawing import draw_boxes
from model.preprocessing import Preprocessing

if TYPE_CHECKING:
    from model.engines import Runtime

ENGINE_FILE = "engine.json"
Source: TypeAlias = Any
"""A path, folder or glob; an array uint8 (H, W, 3), (3, H, W), (H, W) or a batch of four axes; a PIL image; a torch
tensor of these shapes; or a list of them."""


class Runs(Protocol):
    """Anything that turns pictures uint8 (B, 3, S, S) into boxes (B, A, 4) in input pixels and scores (B, A, C)."""

    def run(self, images: NDArray[np.uint8]) -> tuple[NDArray[np.float32], NDArray[np.float32]]: ...


@dataclass(frozen=True)
class DetectionPrediction:
    """N detections of one image in falling order of confidence; boxes in pixels of that image, inside it."""

    bboxes_xyxy: Float32[NDArray[np.float32], "n 4"]
    labels: Int64[NDArray[np.int64], " n"]
    confidence: Float32[NDArray[np.float32], " n"]
    image_shape: tuple[int, int]  # height, width

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class ImageDetectionPrediction:
    """One image with its detections.  ``name`` is the file it came from, or ``image_<i>``."""

    image: UInt8[NDArray[np.uint8], "H W 3"]  # RGB
    class_names: tuple[str, ...]
    prediction: DetectionPrediction
    name: str

    def draw(self, box_thickness: int | None = None, show_confidence: bool = True) -> NDArray[np.uint8]:
        """The RGB picture with boxes and class names; ``box_thickness`` in pixels."""
        found = self.prediction
        scores = found.confidence if show_confidence else None
        return draw_boxes(self.image, found.bboxes_xyxy, found.labels, self.class_names, scores, box_thickness)

    def show(self) -> None:
        """Open a window with the drawn picture (matplotlib's; in a notebook it appears inline)."""
        from matplotlib import pyplot

        figure, axes = pyplot.subplots(num=self.name)
        axes.imshow(self.draw())
        axes.set_axis_off()
        figure.tight_layout()
        pyplot.show()

    def save(self, output_path: str | Path) -> Path:
        """Write the drawn picture; a path without a picture's suffix is a folder.  Returns the file's path."""
        path = Path(output_path)
        if path.suffix.lower() not in IMAGE_SUFFIXES:
            path = path / f"{Path(self.name).stem}.jpg"
        write_image(path, self.draw())
        return path

    def to_json(self) -> dict[str, Any]:
        """Name, size and detections as plain values, ready for ``json.dumps``."""
        height, width = self.prediction.image_shape
        found = self.prediction
        rows = zip(found.bboxes_xyxy.tolist(), found.labels.tolist(), found.confidence.tolist(), strict=True)
        detections = [
            {"label": label, "class_name": self.class_names[label], "confidence": score, "bbox_xyxy": box}
            for box, label, score in rows
        ]
        return {"image": self.name, "width": width, "height": height, "detections": detections}


class ImagesDetectionPrediction(Sequence[ImageDetectionPrediction]):
    """The results of several images, in their order."""

    def __init__(self, results: Iterable[ImageDetectionPrediction]) -> None:
        self._results = list(results)

    def __len__(self) -> int:
        return len(self._results)

    def __getitem__(self, index: Any) -> Any:
        return self._results[index]

    def __iter__(self) -> Iterator[ImageDetectionPrediction]:
        return iter(self._results)

    def show(self) -> None:
        """One window after another."""
        for result in self:
            result.show()

    def save(self, output_folder: str | Path) -> list[Path]:
        """Write every drawn picture as ``<name>.jpg``; equal names get a number.  Returns the files' paths."""
        used: dict[str, int] = {}
        return [result.save(Path(output_folder) / unique_file_name(result.name, used)) for result in self]

    def to_json(self) -> list[dict[str, Any]]:
        return [result.to_json() for result in self]


def unique_file_name(name: str, used: dict[str, int]) -> str:
    """``<stem>.jpg`` for a result's name, ``<stem>_1.jpg`` when ``used`` has it already; remembers it there."""
    stem = Path(name).stem
    while stem in used:
        used[stem] += 1
        stem = f"{Path(name).stem}_{used[stem]}"
    used[stem] = 0
    return f"{stem}.jpg"


class Detector:
    """An engine with its class names and pre-processing."""

    def __init__(
        self,
        engine: Runs,
        class_names: Sequence[str],
        preprocessing: Preprocessing,
        *,
        score_threshold: float = 0.25,
        iou_threshold: float = 0.7,
        max_detections: int = 300,
    ) -> None:
        self.engine = engine
        self.class_names = tuple(class_names)
        self.preprocessing = preprocessing
        self.score_threshold = score_threshold
        self.iou_threshold = iou_threshold
        self.max_detections = max_detections

    def predict(
        self,
        source: Source,
        *,
        score_threshold: float | None = None,
        iou_threshold: float | None = None,
        max_detections: int | None = None,
        batch_size: int = 8,
    ) -> ImageDetectionPrediction | ImagesDetectionPrediction:
        """Detections of one image, or of several when ``source`` is a list, a batch, a folder or a glob.

        None means the detector's own value.  Raises ``ValueError`` for a source without images or an unreadable file,
        naming it.
        """
        results = self.stream(
            source,
            score_threshold=score_threshold,
            iou_threshold=iou_threshold,
            max_detections=max_detections,
            batch_size=batch_size,
        )
        return next(results) if _is_single(source) else ImagesDetectionPrediction(results)

    def stream(
        self,
        source: Source,
        *,
        score_threshold: float | None = None,
        iou_threshold: float | None = None,
        max_detections: int | None = None,
        batch_size: int = 8,
    ) -> Iterator[ImageDetectionPrediction]:
        """The same one by one, with no more than a batch of pictures in memory."""
        limits = {
            "score_threshold": self.score_threshold if score_threshold is None else score_threshold,
            "iou_threshold": self.iou_threshold if iou_threshold is None else iou_threshold,
        }
        for name, value in limits.items():
            if not 0 <= value <= 1:
                raise ValueError(f"{name} must be between 0 and 1, got {value}")
        most = self.max_detections if max_detections is None else max_detections
        for name, count in (("max_detections", most), ("batch_size", batch_size)):
            if count < 1:
                raise ValueError(f"{name} must be at least 1, got {count}")
        pictures = _pictures(source)
        while batch := list(islice(pictures, batch_size)):
            yield from self._detect(batch, most, **limits)

    def _detect(
        self, batch: list[tuple[str, NDArray[np.uint8]]], max_detections: int, **limits: float
    ) -> Iterator[ImageDetectionPrediction]:
        fitted = [self.preprocessing.apply(image) for _, image in batch]
        boxes_xyxy, scores = self.engine.run(np.stack([pixels for pixels, _ in fitted]))
        letterboxes = [letterbox for _, letterbox in fitted]
        tables = detections_in_original_pixels(
            boxes_xyxy,
            scores,
            letterboxes,
            score_threshold=limits["score_threshold"],
            iou_threshold=limits["iou_threshold"],
            max_detections=max_detections,
        )
        for (name, image), rows in zip(batch, tables, strict=True):
            boxes, confidence, labels = rows[:, :4], rows[:, 4], rows[:, 5].astype(np.int64)
            height, width = image.shape[:2]
            yield ImageDetectionPrediction(
                image, self.class_names, DetectionPrediction(boxes, labels, confidence, (height, width)), name
            )


def open_detector(directory: Path, runtime: Runtime = "openvino", threads: int = 0) -> Detector:
    """The detector in an engine directory: ``engine.json`` beside the network.

    ``threads`` 0 leaves the number to the runtime.  Raises ``ValueError`` naming the file and what is wrong with it.
    """
    from model.engines import load_engine

    path = directory / ENGINE_FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return Detector(
            load_engine(directory, runtime=runtime, threads=threads),
            content["class_names"],
            Preprocessing.from_json(content["preprocessing"]),
            score_threshold=content["score_threshold"],
            iou_threshold=content["iou_threshold"],
        )
    except FileNotFoundError as error:
        raise ValueError(f"{directory} is no engine directory: it has no {ENGINE_FILE}; export writes one") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON ({error}); export the engine again") from error
    except KeyError as error:
        raise ValueError(f"{path} lacks the field {error}; export the engine again") from error


def _is_single(source: Source) -> bool:
    if isinstance(source, str | Path):
        return Path(source).is_file()
    if isinstance(source, np.ndarray) or hasattr(source, "detach"):
        return len(source.shape) < 4
    return hasattr(source, "convert")


def _pictures(source: Source) -> Iterator[tuple[str, NDArray[np.uint8]]]:
    """Name and RGB picture of everything in the source, opened when asked for."""
    if isinstance(source, str | Path):
        yield from ((str(path), read_image(path)) for path in _files(source))
        return
    parts = [source] if _is_single(source) else source
    if not isinstance(parts, Iterable):
        raise ValueError(f"cannot predict on {type(source).__name__}; give a path, an array, a PIL image or a list")
    empty = True
    for position, part in enumerate(parts):
        empty = False
        if isinstance(part, str | Path):
            yield from _pictures(part)
        else:
            yield f"image_{position}", _as_rgb(part)
    if empty:
        raise ValueError("the list of images to predict on is empty")


def _files(source: str | Path) -> list[Path]:
    """The picture files that a path, folder or glob names, sorted."""
    text, path = str(source), Path(source)
    if text.startswith(("http://", "https://")):
        raise ValueError(f"cannot predict on the address {text}; download the image first")
    if path.is_file():
        return [path]
    found = path.iterdir() if path.is_dir() else (Path(name) for name in glob.glob(text, recursive=True))
    files = sorted(file for file in found if file.suffix.lower() in IMAGE_SUFFIXES and file.is_file())
    if not files:
        raise ValueError(f"no image found at {text}; expected a file, a folder or a glob of {sorted(IMAGE_SUFFIXES)}")
    return files


def _as_rgb(picture: Any) -> NDArray[np.uint8]:
    """uint8 (H, W, 3) from an array, a torch tensor or a PIL image."""
    if hasattr(picture, "convert"):
        return np.asarray(picture.convert("RGB"), dtype=np.uint8)
    array = np.asarray(picture.detach().cpu()) if hasattr(picture, "detach") else picture
    if not isinstance(array, np.ndarray) or array.dtype != np.uint8:
        kind = array.dtype if isinstance(array, np.ndarray) else type(picture).__name__
        raise ValueError(f"an image must be uint8 with values 0 to 255, got {kind}")
    if array.ndim == 2:
        return np.repeat(array[:, :, None], 3, axis=2)
    if array.ndim == 3 and array.shape[2] == 3:
        return array
    if array.ndim == 3 and array.shape[0] == 3:
        return np.ascontiguousarray(array.transpose(1, 2, 0))
    raise ValueError(f"an image must have the shape (H, W, 3), (3, H, W) or (H, W), got {array.shape}")
