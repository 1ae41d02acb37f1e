"""What a registered model takes and gives, so that MLflow can check a request and show how to make one."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mlflow.models import ModelSignature

MAX_DETECTIONS = 300
EXAMPLE_PIXELS = 32


def signature(engine: Path) -> ModelSignature:
    """Pictures as strings in, detections out; the parameters' defaults are the engine's own thresholds."""
    from mlflow.models import ModelSignature
    from mlflow.types.schema import ColSpec, DataType, ParamSchema, ParamSpec, Schema

    told = json.loads((engine / "engine.json").read_text(encoding="utf-8"))
    params = ParamSchema(
        [
            ParamSpec("score_threshold", DataType.double, float(told["score_threshold"])),
            ParamSpec("iou_threshold", DataType.double, float(told["iou_threshold"])),
            ParamSpec("max_detections", DataType.long, MAX_DETECTIONS),
        ]
    )
    return ModelSignature(inputs=Schema([ColSpec(DataType.string)]), outputs=_outputs(), params=params)


def input_example() -> list[str]:
    """A small grey picture as an address that holds it."""
    import cv2
    import numpy as np

    _, content = cv2.imencode(".png", np.full((EXAMPLE_PIXELS, EXAMPLE_PIXELS, 3), 114, np.uint8))
    return [f"data:image/png;base64,{base64.b64encode(content.tobytes()).decode('ascii')}"]


def _outputs() -> object:
    from mlflow.types.schema import Array, ColSpec, DataType, Object, Property, Schema

    detection = Object(
        [
            Property("label", DataType.long),
            Property("class_name", DataType.string),
            Property("confidence", DataType.double),
            Property("bbox_xyxy", Array(DataType.double)),
        ]
    )
    return Schema(
        [
            ColSpec(DataType.string, "image"),
            ColSpec(DataType.long, "width"),
            ColSpec(DataType.long, "height"),
            ColSpec(Array(detection), "detections"),
        ]
    )
