"""Do the runtimes compute the same? One INT8 file on 200 photographs, four runtimes.

    python benchmarks/runtime_agreement.py run
    python benchmarks/runtime_agreement.py table

The network is pico at 224 pixels, trained on bccd from recipe and seed (quantized_networks.py) and quantized by PTQ.
The reference is torch's fake quantization; ONNX Runtime literally (without graph optimisation), ONNX Runtime, and
OpenVINO, with the instructions this CPU has and, in a process of its own, with AVX2 alone, read the exported file.
Images: the test and validation splits and as many training images as make 200; mAP is of the test split. Limits of
the project: mean box error on confident anchors 0.3 pixels, mAP 0.5 points. Rows are kept in
results/runtime_agreement.json.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import own_training, photo_sets
from benchmarks.photo_sets import PhotoSet
from benchmarks.quantization_accuracy import METHODS
from benchmarks.quantized_networks import FloatNetwork, quantized, quiet_logs, trained
from benchmarks.rows import Rows
from model.checkpoint import CheckpointMetadata
from model.data.loader import evaluation_batches
from model.engines import Engine, load_engine
from model.engines.agreement import compare_outputs
from model.engines.onnxruntime_engine import OnnxRuntimeEngine
from model.evaluation import detect
from model.export import export_onnx
from model.preprocessing import Preprocessing
from model.quantization.storage import save_quantized

ROWS = Rows("runtime_agreement")
NETWORK = FloatNetwork("bccd")
IMAGES = 200
RUNTIMES = ("ONNX Runtime, literally", "ONNX Runtime", "OpenVINO", "OpenVINO, AVX2 alone")
AVX2 = {"ONEDNN_MAX_CPU_ISA": "AVX2"}


def configurations() -> list[dict[str, Any]]:
    """Every row of the table."""
    return [{"dataset": NETWORK.dataset, "seed": NETWORK.seed, "images": IMAGES, "runtime": name} for name in RUNTIMES]


def run() -> None:
    """Measure the missing rows."""
    missing = ROWS.missing(configurations())
    if not missing:
        return
    checkpoint, _ = trained(NETWORK)
    photos = photo_sets.load(NETWORK.dataset)
    names, preprocessing = photos.train.class_names, Preprocessing(NETWORK.image_size)
    with tempfile.TemporaryDirectory() as folder, quantized(NETWORK, checkpoint, METHODS["ptq"]) as (network, _):
        export_onnx(network, Path(folder) / "model.onnx", preprocessing=preprocessing, class_names=names)
        save_quantized(Path(folder) / "torch", network, CheckpointMetadata("pico", names, preprocessing, step=0))
        for configuration in missing:
            print("running", json.dumps(configuration), flush=True)
            environment = {**os.environ, **(AVX2 if "AVX2" in configuration["runtime"] else {})}
            words = [sys.executable, __file__, "measure", folder, "--runtime", configuration["runtime"]]
            done = subprocess.run(words, env=environment, check=True, stdout=subprocess.PIPE, text=True)
            ROWS.add(configuration, json.loads(done.stdout.splitlines()[-1]))


def measure(folder: Path, runtime: str) -> dict[str, Any]:
    """One runtime beside torch."""
    photos = photo_sets.load(NETWORK.dataset)
    reference, candidate = load_engine(folder / "torch", "torch", threads=1), _engine(folder / "model.onnx", runtime)
    report = compare_outputs(reference, candidate, _pictures(photos)).to_json()
    expected, found = (_map(engine, photos) for engine in (reference, candidate))
    return {**report, "torch_map50_95": expected, "map50_95": found, "difference_points": 100 * (found - expected)}


def _engine(path: Path, runtime: str) -> Engine:
    if runtime.startswith("ONNX"):
        return OnnxRuntimeEngine(path, optimise="literally" not in runtime, threads=1)
    return load_engine(path, "openvino", threads=1)


def _pictures(photos: PhotoSet) -> NDArray[np.uint8]:
    """The pictures as the network gets them, uint8 (IMAGES, 3, S, S)."""
    preprocessing, batches = Preprocessing(NETWORK.image_size), []
    for images in (photos.test, photos.validation, photos.train):
        batches += [batch for batch, _, _ in evaluation_batches(images, photos.open_image, preprocessing, 8)]
    return np.concatenate(batches)[:IMAGES]


def _map(engine: Engine, photos: PhotoSet) -> float:
    found = detect(
        engine.run,
        photos.test,
        photos.open_image,
        Preprocessing(NETWORK.image_size),
        batch_size=1,
        score_threshold=own_training.SCORE_THRESHOLD,
        iou_threshold=own_training.IOU_THRESHOLD,
        max_detections=own_training.MAX_DETECTIONS,
    )
    return float(photo_sets.figures(found, photos.test)["map50_95"])


def table() -> str:
    """The rows as Markdown."""
    lines = ["| runtime | confident anchors | mean box error | largest | mean score error | mAP50-95 | minus torch |"]
    lines.append("|---" * 7 + "|")
    for row in filter(None, map(ROWS.find, configurations())):
        figures = row["figures"]
        errors = f"{figures['box_error_mean_px']:.4f} px | {figures['box_error_max_px']:.3f} px"
        accuracy = f"{figures['map50_95']:.4f} | {figures['difference_points']:+.2f} points"
        lines.append(
            f"| {row['configuration']['runtime']} | {figures['confident_anchors']} | {errors} | "
            f"{figures['score_error_mean']:.5f} | {accuracy} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure what is missing, print the table, or measure one runtime in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=("run", "table", "measure"))
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--runtime", choices=RUNTIMES)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    quiet_logs()
    if arguments.command == "measure":
        print(json.dumps(measure(arguments.folder, arguments.runtime)))
    elif arguments.command == "run":
        run()
    else:
        print(table())


if __name__ == "__main__":
    main()
