"""The registered model as MLflow loads it: `mlflow.pyfunc.load_model("models:/NAME@champion").predict(images)`.

MLflow copies this file into the model (models from code, no pickle); it needs the package nasline where it is loaded.
"""

from __future__ import annotations

import base64
import binascii
from pathlib import Path
from typing import Any

import mlflow


class EngineModel(mlflow.pyfunc.PythonModel):  # type: ignore[misc, name-defined]
    """Runs the registered engine on images, as `nasline.load` does: equal pictures give equal boxes."""

    def load_context(self, context: Any) -> None:
        """Open the engine that lies in the model's artifacts."""
        import nasline

        self._detector = nasline.load(Path(context.artifacts["bundle"]) / "engine")

    # No annotations: MLflow would make the signature of them, which then could have no parameters.
    def predict(self, context, model_input, params=None):  # type: ignore[no-untyped-def]
        """Detections per image.

        Args:
            model_input: File names, or pictures in the request as `data:image/png;base64,...` (any format that can be
                decoded). MLflow makes a data frame with one column of whatever it is given; a list is taken too.
            params: `score_threshold` and `iou_threshold` in [0, 1], `max_detections`; default: the engine's own.

        Raises:
            ValueError: a file or a picture cannot be read, or a parameter is out of range.
        """
        given = model_input.iloc[:, 0] if hasattr(model_input, "iloc") else model_input
        pictures = [_picture(one) for one in given]
        return [result.to_json() for result in self._detector.stream(pictures, **(params or {}))]


def _picture(given: Any) -> Any:
    """A data address as RGB uint8 (H, W, 3); anything else as it is."""
    if not isinstance(given, str) or not given.startswith("data:"):
        return given
    from model.data.images import decode_image

    head, _, body = given.partition(",")
    if not head.endswith(";base64"):
        raise ValueError(f"a picture in the request must begin with data:image/...;base64, got {head[:40]!r}")
    try:
        return decode_image(base64.b64decode(body, validate=True), "in the request")
    except binascii.Error as error:
        raise ValueError(f"a picture in the request is no base64: {error}") from error


mlflow.models.set_model(EngineModel())
