"""`nasline export`: the device-free engine, compared with the torch networks before it is published."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline_tasks.engine_agreement import require_agreement
from pipeline_tasks.errors import DataError
from pipeline_tasks.execution import StepContext
from pipeline_tasks.training_task import open_images, prepare_torch
from pipeline_tasks.workspace import write_json

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from model.checkpoint import CheckpointMetadata
    from model.yolo_nas import YoloNAS
    from pipeline_tasks.export_parameters import ExportParameters

log = logging.getLogger(__name__)

INT8_FILE, FLOAT_FILE, ENGINE_FILE = "model.onnx", "model.float.onnx", "engine.json"
HALF_FILES = {INT8_FILE: "model.half.onnx", FLOAT_FILE: "model.float.half.onnx"}
SUPPRESSION_FILE = "model_with_nms.onnx"
FLOAT_SCORE_ERROR = 1e-3
"""Twenty times what float32 sums in another order were seen to change a score (golden vectors: 5e-5)."""
SCORE_THRESHOLD, IOU_THRESHOLD = 0.25, 0.7
"""Defaults of `predict`, as the reference's COCO checkpoints use them."""


def export(context: StepContext) -> dict[str, Any]:
    """Write model.onnx (INT8), model.float.onnx and engine.json; on request also float16 forms and one with NMS.

    Raises:
        DataError: an exported file does not compute what its network computes; nothing is published.
    """
    from model.checkpoint import load_checkpoint
    from model.export import export_onnx
    from model.onnx_structure import check_structure
    from model.quantization.quantize import quantized_layers
    from model.quantization.storage import load_quantized

    prepare_torch(context.parameters.start)
    student, metadata = load_checkpoint(context.inputs["student"])
    quantized, _ = load_quantized(context.inputs["quantized"])
    folder = context.output / "engine"
    folder.mkdir()
    networks = {INT8_FILE: quantized.eval(), FLOAT_FILE: student.eval().fused_copy()}
    for name, network in networks.items():
        export_onnx(
            network,
            folder / name,
            preprocessing=metadata.preprocessing,
            class_names=metadata.class_names,
            batch=context.parameters.export.batch,
        )
    report = check_structure(folder / INT8_FILE, _quantized_names(quantized_layers(quantized)))
    images = _comparison_images(context, metadata)
    agreement = _compare(context, folder, networks, images)
    agreement.update(require_agreement(context, folder / INT8_FILE, quantized, metadata, images))
    if context.parameters.export.half:
        agreement.update(_write_half(context.parameters.export, folder, images))
    if context.parameters.export.nms != "outside":
        agreement.update(_write_suppression(context.parameters.export, folder, images))
    write_json(folder / ENGINE_FILE, _engine_metadata(context, quantized, metadata))
    megabytes = (folder / INT8_FILE).stat().st_size / 1e6
    log.info("engine of %.2f MB: %d convolutions in INT8", megabytes, len(report.quantized))
    return {**agreement, "megabytes": megabytes, "quantized_convolutions": len(report.quantized)}


def _quantized_names(layers: Any) -> set[str]:
    return {name for name, layer in layers.items() if layer.quantizing}


def _compare(
    context: StepContext, folder: Path, networks: dict[str, YoloNAS], images: NDArray[np.uint8]
) -> dict[str, Any]:
    """Both files against their networks on validation images, by ONNX Runtime without graph optimisation."""
    from model.engines.agreement import compare_outputs
    from model.engines.onnxruntime_engine import OnnxRuntimeEngine
    from model.engines.torch_engine import TorchEngine

    limit = context.parameters.export.maximum_box_error_pixels
    errors = {}
    for name, network in networks.items():
        engine = OnnxRuntimeEngine(folder / name, optimise=False)
        agreement = compare_outputs(TorchEngine(network), engine, images)
        label = "int8" if name == INT8_FILE else "float"
        errors[f"{label}_box_error_mean_px"] = agreement.box_error_mean_px
        errors[f"{label}_score_error_mean"] = agreement.score_error_mean
        errors[f"{label}_confident_anchors"] = agreement.confident_anchors
        if agreement.confident_anchors == 0:
            log.warning("%s: no confident anchor on %d images, boxes could not be compared", name, len(images))
        if network is networks[FLOAT_FILE] and agreement.score_error_all_max > FLOAT_SCORE_ERROR:
            raise DataError(
                f"{name} differs from its torch network by a score of {agreement.score_error_all_max:.2g}, more than "
                f"rounding explains ({FLOAT_SCORE_ERROR}); nothing was published"
            )
        if agreement.box_error_mean_px > limit:
            raise DataError(
                f"{name} differs from its torch network by {agreement.box_error_mean_px:.3f} pixels on confident "
                f"anchors, more than export.maximum_box_error_pixels {limit}; nothing was published"
            )
    return errors


def _write_half(given: ExportParameters, folder: Path, images: NDArray[np.uint8]) -> dict[str, Any]:
    """The float16 form of both files, each against its float32 form, operator by operator."""
    from model.engines.agreement import compare_outputs
    from model.engines.onnxruntime_engine import OnnxRuntimeEngine
    from model.onnx_half import export_half

    errors = {}
    for source, target in HALF_FILES.items():
        report = export_half(folder / source, folder / target)
        for layer, reason in report.float_layers.items():
            log.warning("%s: %s stays float32: %s", target, layer, reason)
        reference, candidate = (OnnxRuntimeEngine(folder / name, optimise=False) for name in (source, target))
        agreement = compare_outputs(reference, candidate, images)
        label = "int8_half" if source == INT8_FILE else "float_half"
        errors[f"{label}_box_error_mean_px"] = agreement.box_error_mean_px
        errors[f"{label}_score_error_mean"] = agreement.score_error_mean
        if agreement.box_error_mean_px > given.maximum_box_error_pixels:
            raise DataError(
                f"{target} differs from {source} by {agreement.box_error_mean_px:.3f} pixels on confident anchors, "
                f"more than export.maximum_box_error_pixels {given.maximum_box_error_pixels}; nothing was published"
            )
    return errors


def _write_suppression(given: ExportParameters, folder: Path, images: NDArray[np.uint8]) -> dict[str, Any]:
    """model_with_nms.onnx, whose detections must be those of the suppression outside on every comparison image."""
    from model.onnx_file import load_onnx, write_onnx
    from model.onnx_suppression import add_suppression, check_suppression
    from model.suppression import SuppressionConfig

    assert given.nms != "outside"
    config = SuppressionConfig(
        score_threshold=given.nms_score_threshold,
        iou_threshold=given.nms_iou_threshold,
        multi_label=given.nms_multi_label,
        candidates=given.nms_candidates,
        max_detections=given.nms_detections,
        sweeps=given.nms_sweeps,
    )
    proto = load_onnx(folder / INT8_FILE)
    write_onnx(add_suppression(proto, given.nms, config), folder / SUPPRESSION_FILE)
    checked = add_suppression(proto, given.nms, config, keep_raw_outputs=True)
    report = check_suppression(checked, given.nms, config, images)
    if report.differing:
        raise DataError(
            f"{SUPPRESSION_FILE} finds other detections than the suppression outside on {len(report.differing)} of "
            f"{len(images)} images; raise export.nms_sweeps (now {given.nms_sweeps}); nothing was published"
        )
    return {"nms_detections": report.detections}


def _comparison_images(context: StepContext, metadata: CheckpointMetadata) -> NDArray[np.uint8]:
    import numpy as np

    from model.data.loader import evaluation_batches
    from model.data.tables import read_dataset

    images = read_dataset(context.inputs["target"]).split("val")
    chosen = images.subset(np.arange(min(len(images), context.parameters.export.comparison_images)))
    batches = evaluation_batches(chosen, open_images(context), metadata.preprocessing, len(chosen))
    return np.concatenate([batch for batch, _, _ in batches])


def _engine_metadata(context: StepContext, quantized: YoloNAS, metadata: CheckpointMetadata) -> dict[str, Any]:
    from model.quantization.quantize import calibration_digest, precision_per_layer
    from model.quantization.storage import read_report

    return {
        "schema_version": 1,
        "variant": metadata.variant,
        "class_names": list(metadata.class_names),
        "preprocessing": metadata.preprocessing.to_json(),
        "score_threshold": SCORE_THRESHOLD,
        "iou_threshold": IOU_THRESHOLD,
        "precision": precision_per_layer(quantized),
        "calibration_digest": calibration_digest(quantized),
        "quantization": read_report(context.inputs["quantized"]),
        "lineage": metadata.lineage,
        "parents": dict(context.input_digests),
    }
