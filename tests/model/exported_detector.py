"""One small quantized detector, exported once per test session: exporting takes seconds."""

from __future__ import annotations

import atexit
import functools
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

import model
from model.export import export_onnx
from model.preprocessing import Preprocessing
from model.quantization.quantize import QuantizationConfig, quantize
from model.yolo_nas import YoloNAS

INPUT_SIZE = 96
CLASS_NAMES = ("platelets", "red cells", "white cells")
CALIBRATION_IMAGES = 8


@dataclass(frozen=True)
class ExportedDetector:
    """A pico network with golden weights, quantized on real images; its ONNX files are made when first asked for.

    images: uint8 (16, 3, 96, 96); the first ``CALIBRATION_IMAGES`` calibrated it. Tests must not change the networks.
    """

    floating: YoloNAS
    quantized: YoloNAS
    images: NDArray[np.uint8]
    folder: Path

    @property
    def unseen_images(self) -> NDArray[np.uint8]:
        return self.images[CALIBRATION_IMAGES:]

    @property
    def float_onnx(self) -> Path:
        return self._export(self.floating, "model.float.onnx")

    @property
    def int8_onnx(self) -> Path:
        return self._export(self.quantized, "model.onnx")

    def _export(self, network: YoloNAS, name: str) -> Path:
        path = self.folder / name
        if not path.exists():
            export_onnx(network, path, preprocessing=Preprocessing(INPUT_SIZE), class_names=CLASS_NAMES)
        return path


def as_input(images: NDArray[np.uint8]) -> torch.Tensor:
    return torch.from_numpy(images).float() / 255


def golden_network(golden: object) -> YoloNAS:
    network = model.build("pico", len(CLASS_NAMES))
    golden.fill(network)  # type: ignore[attr-defined]
    return network.eval()


@functools.cache
def real_images(shared: Path, count: int = 16) -> NDArray[np.uint8]:
    """Photographs of blood cells, letterboxed to RGB (count, 3, 96, 96)."""
    files = sorted((shared / "data" / "bccd" / "images").glob("*.jpg"))[:count]
    assert len(files) == count
    preprocessing = Preprocessing(INPUT_SIZE)
    pictures = [cv2.cvtColor(cv2.imread(str(file)), cv2.COLOR_BGR2RGB) for file in files]
    return np.stack([preprocessing.apply(picture.astype(np.uint8))[0] for picture in pictures])


@functools.cache
def export_detector(golden: object, shared: Path) -> ExportedDetector:
    folder = Path(tempfile.mkdtemp(prefix="exported-detector-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    images = real_images(shared)
    floating = golden_network(golden).fuse()
    quantized = quantize(floating, [as_input(images[:CALIBRATION_IMAGES])], QuantizationConfig())
    return ExportedDetector(floating, quantized, images, folder)
