"""Does the exported INT8 file, as a CPU's engine runs it, find what its torch network finds?"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline_tasks.errors import DataError
from pipeline_tasks.execution import StepContext
from pipeline_tasks.training_task import open_images

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from model.checkpoint import CheckpointMetadata
    from model.engines.openvino_engine import OpenVINOEngine
    from model.yolo_nas import YoloNAS

log = logging.getLogger(__name__)


def require_agreement(
    context: StepContext,
    onnx_file: Path,
    network: YoloNAS,
    metadata: CheckpointMetadata,
    images: NDArray[np.uint8],
) -> dict[str, Any]:
    """Compare the file, run by OpenVINO, with the fake-quantized network: boxes on `images`, mAP on validation images.

    images: (B, 3, S, S) RGB. Returns the measured differences for the step's summary; nothing where OpenVINO cannot
    run the file, which only the target `cpu` needs.

    Raises:
        DataError: boxes differ by more than `export.maximum_box_error_pixels`, or mAP by more than
            `export.maximum_map_difference`.
    """
    from model.engines.agreement import compare_outputs
    from model.engines.openvino_engine import OpenVINOEngine
    from model.engines.torch_engine import TorchEngine

    try:
        engine = OpenVINOEngine.from_file(onnx_file, context.parameters.start.threads)
    except ValueError as error:
        log.warning("%s was not compared as OpenVINO runs it: %s", onnx_file.name, error)
        return {}
    found = compare_outputs(TorchEngine(network), engine, images)
    limit = context.parameters.export.maximum_box_error_pixels
    if found.box_error_mean_px > limit:
        raise DataError(
            f"{onnx_file.name}, run by OpenVINO, differs from its torch network by {found.box_error_mean_px:.3f} "
            f"pixels on confident anchors, more than export.maximum_box_error_pixels {limit}; nothing was published"
        )
    boxes = {"openvino_box_error_mean_px": found.box_error_mean_px}
    return {**boxes, **_require_equal_map(context, onnx_file.name, engine, network, metadata)}


def _require_equal_map(
    context: StepContext, name: str, engine: OpenVINOEngine, network: YoloNAS, metadata: CheckpointMetadata
) -> dict[str, float]:
    """mAP50-95 of both on the same validation images; a few images more or less found by chance are no difference."""
    import numpy as np

    from model.bootstrap import paired_difference
    from model.data.tables import read_dataset
    from model.evaluation import detect, torch_predictor

    given = context.parameters.export
    if not given.map_images:
        return {}
    validation = read_dataset(context.inputs["target"]).split("val")
    images = validation.subset(np.arange(min(len(validation), given.map_images)))
    open_image, preprocessing = open_images(context), metadata.preprocessing
    ours = detect(engine.run, images, open_image, preprocessing, batch_size=1)
    theirs = detect(torch_predictor(network), images, open_image, preprocessing)
    compared = paired_difference(ours, theirs, images, images.class_names)
    points = 100 * (compared.first - compared.second)
    low, high = (100 * bound for bound in compared.interval())
    log.info("mAP50-95 of %s on %d validation images: %+.2f points against torch", name, len(images), points)
    if abs(points) > given.maximum_map_difference and not low <= 0 <= high:
        raise DataError(
            f"{name}, run by OpenVINO, has {points:+.2f} points of mAP50-95 against its torch network on {len(images)} "
            f"validation images ({low:+.2f} to {high:+.2f}), more than export.maximum_map_difference "
            f"{given.maximum_map_difference}; nothing was published"
        )
    return {"openvino_map_difference_points": points}
