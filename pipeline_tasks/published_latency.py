"""Latencies of other detectors as their publishers state them, to be shown beside what was measured here.

All on an NVIDIA T4 by TensorRT: 640 pixels, batch 1, the network alone as far as its source says; mAP50-95 on COCO
val2017. Sources differ in TensorRT version, clocks and what they time, so a tenth between two of them means little. Our
sources have no figure for YOLOv7.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

DEVICE = "NVIDIA T4"
YOLO_NAS = "Deci-AI/super-gradients, YOLONAS.md; TensorRT version not stated, without NMS"
CHART = "ultralytics, chart of the documentation; TensorRT 10, NMS not stated"
YOLO_V6 = "meituan/YOLOv6, README.md; TensorRT 8.4, without NMS, of 1000 / FPS"


@dataclass(frozen=True)
class PublishedLatency:
    """One published row. map50_95: from 0 to 1, on COCO val2017."""

    family: str
    variant: str
    precision: str
    latency_ms: float
    map50_95: float
    source: str

    @property
    def name(self) -> str:
        """As a picture labels it."""
        return f"{self.family}-{self.variant}" + (" INT8" if self.precision == "int8" else "")

    def to_json(self) -> dict[str, Any]:
        """The row, marked as what it is."""
        return {**asdict(self), "device": DEVICE, "measured": False}


PUBLISHED: tuple[PublishedLatency, ...] = (
    PublishedLatency("YOLOv5", "n", "fp16", 1.12, 0.280, CHART),
    PublishedLatency("YOLOv5", "s", "fp16", 1.92, 0.374, CHART),
    PublishedLatency("YOLOv5", "m", "fp16", 4.03, 0.454, CHART),
    PublishedLatency("YOLOv5", "l", "fp16", 6.61, 0.490, CHART),
    PublishedLatency("YOLOv5", "x", "fp16", 11.89, 0.507, CHART),
    PublishedLatency("YOLOv6-3.0", "n", "fp16", 1.17, 0.375, CHART),
    PublishedLatency("YOLOv6-3.0", "s", "fp16", 2.66, 0.450, CHART),
    PublishedLatency("YOLOv6-3.0", "l", "fp16", 8.95, 0.528, CHART),
    PublishedLatency("YOLOv6-2.0", "n", "int8", 0.90, 0.348, YOLO_V6),
    PublishedLatency("YOLOv6-2.0", "t", "int8", 1.35, 0.398, YOLO_V6),
    PublishedLatency("YOLOv6-2.0", "s", "int8", 1.62, 0.433, YOLO_V6),
    PublishedLatency("YOLOv8", "n", "fp16", 1.47, 0.373, CHART),
    PublishedLatency("YOLOv8", "s", "fp16", 2.66, 0.449, CHART),
    PublishedLatency("YOLOv8", "m", "fp16", 5.86, 0.502, CHART),
    PublishedLatency("YOLOv8", "x", "fp16", 14.37, 0.539, CHART),
    PublishedLatency("YOLO-NAS", "s", "fp16", 3.21, 0.475, YOLO_NAS),
    PublishedLatency("YOLO-NAS", "m", "fp16", 5.85, 0.5155, YOLO_NAS),
    PublishedLatency("YOLO-NAS", "l", "fp16", 7.87, 0.5222, YOLO_NAS),
    PublishedLatency("YOLO-NAS", "s", "int8", 2.36, 0.4703, YOLO_NAS),
    PublishedLatency("YOLO-NAS", "m", "int8", 3.78, 0.510, YOLO_NAS),
    PublishedLatency("YOLO-NAS", "l", "int8", 4.78, 0.521, YOLO_NAS),
)


def published_table(rows: Sequence[PublishedLatency] = PUBLISHED) -> list[str]:
    """The lines to print, under a heading that says they were not measured here."""
    heading = f"published for the {DEVICE}, not measured here (TensorRT, 640 pixels, batch 1, COCO val2017)"
    width = max(len(row.name) for row in rows)
    lines = [f"{row.name:<{width}}  {row.latency_ms:6.2f} ms  {row.map50_95:.4f}  {row.source}" for row in rows]
    return [heading, *lines]
