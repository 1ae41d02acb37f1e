"""Exports YOLOv8n with random weights to ONNX and prints its multiply-adds, by Ultralytics' own exporter and count.

A process of its own: it runs with the peer's packages on PYTHONPATH (see inference_cost.py).
"""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path


def main() -> None:
    """Arguments: folder to write to, number of classes, image size. The last line printed is JSON."""
    folder, classes, size = Path(sys.argv[1]).resolve(), int(sys.argv[2]), int(sys.argv[3])
    os.environ["YOLO_CONFIG_DIR"] = str(folder)
    os.environ["YOLO_OFFLINE"] = "true"
    os.chdir(folder)
    import ultralytics
    from ultralytics import YOLO
    from ultralytics.utils.torch_utils import get_flops

    shipped = Path(ultralytics.__file__).parent / "cfg" / "models" / "v8" / "yolov8.yaml"
    description = folder / "yolov8n.yaml"  # the letter in its name is the scale
    description.write_text(re.sub(r"(?m)^nc: \d+", f"nc: {classes}", shipped.read_text()))
    network = YOLO(str(description))
    giga_multiply_adds = get_flops(network.model, size) / 2
    path = network.export(format="onnx", imgsz=size, simplify=False, opset=17, device="cpu")
    print(json.dumps({"onnx": str(folder / path), "giga_multiply_adds": round(giga_multiply_adds, 3)}))


if __name__ == "__main__":
    main()
