"""The gate's parameters: where it measures, and the limits of its rules (docs/gate.md)."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import field_validator, model_validator

from pipeline_tasks.schema import Section, parameter

Target = Literal["cpu", "gpu", "t4"]
P99_REPEATS = 100
"""Of fewer runs the 99th percentile is the slowest one."""


class GateParameters(Section):
    """The rules an engine must pass; an empty limit switches its rule off."""

    target: Target = parameter(
        "cpu", "Device the engine is built for and measured on; t4 is refused where the device is no T4", main=True
    )
    runtime: Literal["openvino"] = parameter("openvino", "Runtime on the target cpu; on gpu and t4 it is TensorRT")
    minimum_map: float | None = parameter(
        0.2, "Lowest mAP50-95 of the INT8 engine on the test split", main=True, ge=0, le=1
    )
    maximum_map_drop: float | None = parameter(
        1.0, "Most mAP50-95 the INT8 engine may lose against the float engine", unit="points", main=True, ge=0, le=100
    )
    maximum_class_map_drop: float | None = parameter(
        None, "Most AP50-95 that any class may lose by INT8, of those with minimum_class_boxes", unit="points",
        ge=0, le=100,
    )  # fmt: skip
    minimum_class_boxes: int = parameter(20, "Boxes in the test split from which a class's loss is judged", ge=1)
    maximum_latency_ms: float | None = parameter(
        None, "Budget for the INT8 engine's median latency on the target", unit="ms", main=True, gt=0
    )
    maximum_latency_p99_ms: float | None = parameter(
        None, "Budget for the INT8 engine's latency in 99 of 100 runs on the target", unit="ms", gt=0
    )
    minimum_speedup: float | None = parameter(
        None, "Least float over INT8 latency (minima on a CPU, which noise spares; medians on a GPU)", gt=0
    )
    champion_margin: float | None = parameter(
        0.5, "mAP50-95 by which the engine may be worse than the champion, and than the best of the champion's line, "
        "on today's clean test images",
        unit="points", ge=0, le=100,
    )  # fmt: skip
    allow_removed_classes: bool = parameter(False, "Accept an engine that lacks a class of the champion")
    minimum_added_class_map: float | None = parameter(
        0.1, "Lowest AP50-95 of each class that the champion lacks", ge=0, le=1
    )
    minimum_comparison_images: int = parameter(
        10, "Fewest clean test images, with a box of a shared class, that a champion comparison needs", ge=1
    )
    near_duplicate_bits: int = parameter(
        8, "Bits of 64 in which a test image's perceptual hash may differ from that of an image an engine has learned "
        "from and still count as seen by it",
        ge=0, le=16,
    )  # fmt: skip
    maximum_size_megabytes: float | None = parameter(None, "Largest INT8 ONNX file", unit="MB", gt=0)
    require_image_licence: list[str] | None = parameter(
        None, "Accepted licences of the images, by name as in the dataset; null accepts all"
    )
    require_annotation_licence: list[str] | None = parameter(
        None, "Accepted licences of the annotations; null accepts all"
    )
    require_weights_licence: list[str] | None = parameter(
        None, "Accepted origins of the weights, such as 'random initialisation'; null accepts all"
    )
    latency_threads: int = parameter(0, "Threads of the measured engines; 0 takes every core", ge=0, le=1024)
    latency_repeats: int = parameter(
        200, "Timed runs per engine, interleaved; on a GPU at least 1000", ge=10, le=100000
    )
    latency_warmup_seconds: float = parameter(
        1.0, "Untimed running of each engine before it is measured", unit="seconds", ge=0, le=600
    )
    latency_attempts: int = parameter(
        2, "How often a latency measurement that spreads too much is made before it is refused", ge=1, le=20
    )
    maximum_box_error_pixels: float | None = parameter(
        0.5, "Mean box difference of the built INT8 engine to the exported file run literally, on confident anchors",
        unit="pixels", gt=0,
    )  # fmt: skip
    maximum_spread: float = parameter(
        0.5, "Largest (p90 - min) / min of a latency measurement before it is repeated, then refused", gt=0
    )

    @property
    def engine_runtime(self) -> Literal["openvino", "tensorrt"]:
        """What runs the engine on the target."""
        return self.runtime if self.target == "cpu" else "tensorrt"

    @field_validator("runtime", mode="before")
    @classmethod
    def _runs_int8(cls, value: Any) -> Any:
        """Measured in docs/LOG.md, "This machine"; `nasline bench` still runs any file in ONNX Runtime."""
        if value == "onnxruntime":
            raise ValueError(
                "must be openvino: ONNX Runtime computes the INT8 engine's convolutions in float, slower than the "
                "float engine, so that no engine could pass"
            )
        return value

    @field_validator("require_image_licence", "require_annotation_licence", "require_weights_licence")
    @classmethod
    def _names_a_licence(cls, value: list[str] | None) -> list[str] | None:
        """Whether an empty list means all or none, its reader cannot know."""
        if value is not None and not (value and all(name.strip() for name in value)):
            raise ValueError(f"must name the accepted licences, got {value}; null accepts all")
        return value

    @model_validator(mode="after")
    def _enough_runs_for_the_slowest(self) -> GateParameters:
        if self.maximum_latency_p99_ms is not None and self.latency_repeats < P99_REPEATS:
            given = self.latency_repeats
            raise ValueError(f"latency_repeats must be at least {P99_REPEATS} with maximum_latency_p99_ms, got {given}")
        return self
