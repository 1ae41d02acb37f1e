"""The parameters of the step `export`."""

from __future__ import annotations

from typing import Literal

from pipeline_tasks.schema import Section, parameter


class ExportParameters(Section):
    """ONNX export and its comparison with the torch network."""

    comparison_images: int = parameter(16, "Validation images both are compared on", unit="images", ge=1)
    maximum_box_error_pixels: float = parameter(
        0.3, "Mean box difference to the torch network allowed on confident anchors", unit="pixels", gt=0
    )
    map_images: int = parameter(
        100, "Validation images on which the mAP of both is compared, the engine run by OpenVINO; 0: none",
        unit="images", ge=0,
    )  # fmt: skip
    maximum_map_difference: float = parameter(
        0.5, "mAP50-95 by which the engine may differ there, beyond chance", unit="points", ge=0, le=100
    )
    batch: int | None = parameter(
        None, "Batch size that the files are fixed to; empty: they take any", unit="images", ge=1, le=1024
    )
    half: bool = parameter(
        False, "Also write model.half.onnx and model.float.half.onnx, the float16 forms that TensorRT is built from"
    )
    nms: Literal["outside", "static", "onnx"] = parameter(
        "outside",
        "Non-maximum suppression: outside the graph, or also write model_with_nms.onnx with plain operators of fixed "
        "shapes (static) or the operator NonMaxSuppression (onnx)",
    )
    nms_score_threshold: float = parameter(0.25, "Lowest score that model_with_nms.onnx keeps", ge=0, le=1)
    nms_iou_threshold: float = parameter(0.7, "Overlap above which the lower of two boxes falls there", ge=0, le=1)
    nms_multi_label: bool = parameter(True, "A box may carry several classes there; else only its best one")
    nms_candidates: int = parameter(
        1000, "Best scores of an image that enter suppression (static); its cost grows with the square", ge=1, le=3840
    )
    nms_detections: int = parameter(
        300, "Most detections of an image (static), or of each of its classes (onnx)", ge=1, le=3840
    )
    nms_sweeps: int = parameter(
        12, "Rounds of suppression (static), at least as many as one box's fall depends on others'", ge=1, le=100
    )
