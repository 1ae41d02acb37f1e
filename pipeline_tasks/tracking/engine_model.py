"""The registered model as MLflow loads it: `mlflow.pyfunc.load_model("models:/NAME@champion").predict(images)`.

MLflow copies this file into the model (models from code, no pickle); it needs the package nasline where it is loaded.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlflow


class EngineModel(mlflow.pyfunc.PythonModel):  # type: ignore[misc, name-defined]
    """Runs the registered engine on images."""

    def load_context(self, context: Any) -> None:
        """Open the engine that lies in the model's artifacts."""
        import nasline

        self._detector = nasline.load(Path(context.artifacts["bundle"]) / "engine")

    def predict(self, context: Any, model_input: Any, params: dict[str, Any] | None = None) -> list[dict[str, Any]]:
        """Detections per image.

        Args:
            model_input: A list of file names or RGB uint8 arrays (H, W, 3), or a data frame with a column `path`.
            params: `score_threshold` in [0, 1].
        """
        images = list(model_input["path"]) if hasattr(model_input, "columns") else list(model_input)
        return [result.to_json() for result in self._detector.stream(images, **(params or {}))]


mlflow.models.set_model(EngineModel())
