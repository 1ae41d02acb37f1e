"""Use an engine in three lines:

import nasline
result = nasline.load("models:/yolo_nas@champion").predict("street.jpg")
result.save("street-with-boxes.jpg")
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from model.detector import Detector
    from model.engines import Runtime

__all__ = ["load"]


def load(path_or_uri: str | Path, runtime: Runtime = "openvino", workspace: str | Path | None = None) -> Detector:
    """Open an engine.

    Args:
        path_or_uri: An engine directory (with engine.json), or `models:/NAME@ALIAS` or `models:/NAME/VERSION`.
        runtime: `openvino`, `onnxruntime` or, on an NVIDIA GPU, `tensorrt`.
        workspace: Where a registered engine is kept once fetched, and whose local registry is asked when
            MLFLOW_TRACKING_URI is not set. Default: NASLINE_WORKSPACE, or `.nasline`.

    Raises:
        ValueError: there is no engine at that place.
        pipeline_tasks.errors.DataError: the registry has no such model.
        pipeline_tasks.errors.UnavailableError: the registry does not answer.
    """
    from model.detector import open_detector

    if str(path_or_uri).startswith("models:/"):
        path_or_uri = _fetch(str(path_or_uri), workspace)
    return open_detector(Path(path_or_uri), runtime=runtime)


def _fetch(uri: str, workspace: str | Path | None) -> Path:
    """Only a registry address needs the pipeline's packages."""
    from pipeline_tasks.tracking.registry import fetch_model
    from pipeline_tasks.workspace import open_workspace

    place = str(workspace or os.environ.get("NASLINE_WORKSPACE", ".nasline"))
    return fetch_model(open_workspace(place), uri) / "engine"
