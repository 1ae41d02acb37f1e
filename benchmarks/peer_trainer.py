"""The peer's detection trainer on prepared batches and any network; runs with the peer's packages on PYTHONPATH."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn
from ultralytics import settings
from ultralytics.models.yolo.detect import DetectionTrainer

Build = Callable[[], nn.Module]


class PreparedTrainer(DetectionTrainer):  # type: ignore[misc]
    """Trains what ``build`` makes, and takes the pictures and boxes of ``batches`` in place of its loader's."""

    def __init__(self, build: Build, batches: list[dict[str, Any]], overrides: dict[str, Any]) -> None:
        super().__init__(overrides=overrides)
        self._build, self._batches, self._taken = build, batches, 0

    def get_model(self, cfg: Any = None, weights: Any = None, verbose: bool = True) -> nn.Module:
        """The network; the peer's own way would build the one that ``model`` names."""
        return self._build()

    def preprocess_batch(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The next prepared batch as the peer's trainer makes it ready for the network."""
        self._taken += 1
        prepared: dict[str, Any] = super().preprocess_batch(dict(self._batches[self._taken % len(self._batches)]))
        return prepared


def make_trainer(build: Build, batches: list[dict[str, Any]], data: Path, folder: Path) -> PreparedTrainer:
    """A trainer with the peer's defaults on one thread of the CPU, but an optimiser step for every batch (``nbs``).

    ``data``: the peer's description of a data set.  It never gets to a validation; nothing is saved but its arguments.
    """
    os.environ["YOLO_OFFLINE"] = "true"
    settings.update({"sync": False, "mlflow": False})
    first = batches[0]["img"]
    overrides = {
        "model": "yolov8n.yaml", "data": str(data), "imgsz": first.shape[2], "batch": len(first),
        "nbs": len(first), "device": "cpu", "workers": 0, "pretrained": False, "plots": False, "val": False,
        "save": False, "project": str(folder), "name": "run", "exist_ok": True,
    }  # fmt: skip
    return PreparedTrainer(build, batches, overrides)
