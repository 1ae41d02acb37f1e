"""What a call costs: YOLO-NAS-T of this repository and YOLOv8n as OpenVINO FP32 engines, and their multiply-adds.

    python benchmarks/inference_cost.py run --peer FOLDER [--again]
    python benchmarks/inference_cost.py table

FOLDER holds the peer (see against_yolov8n.py). Batch 1, random weights, each side exported by its own exporter with
everything up to decoded boxes and scores inside, suppression outside. The engines take turns in random order in one
process; what counts is the shortest time of a call. Rows are kept in results/inference_cost.json.
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
import openvino
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import model
from benchmarks.rows import Rows
from model.engines.latency import Timings, measure_interleaved
from model.export import export_onnx
from model.preprocessing import Preprocessing
from model.summary import summarize

HERE = Path(__file__).resolve().parent
ROWS = Rows("inference_cost")
VARIANT, CLASSES = "t", 3
SIZES, THREADS = (320, 640), (1, 2)
ROUNDS, WARMUP_SECONDS = 300, 1.0


def configurations() -> list[dict[str, Any]]:
    """Every row of the table."""
    return [{"image_size": size, "threads": threads} for size in SIZES for threads in THREADS]


def run(peer: Path, again: bool) -> None:
    """Measure the missing rows, or all again."""
    for configuration in configurations() if again else ROWS.missing(configurations()):
        with tempfile.TemporaryDirectory() as folder:
            figures = measure(configuration["image_size"], configuration["threads"], peer, Path(folder))
        ROWS.add(configuration, figures)
        print(json.dumps(configuration), json.dumps(figures), flush=True)


def measure(size: int, threads: int, peer: Path, folder: Path) -> dict[str, Any]:
    """Both sides' cost at one input size."""
    ours, theirs = export_own(size, folder), export_peer(size, peer, folder)
    files = {"nasline t": ours["onnx"], "yolov8n": theirs["onnx"]}
    calls = {name: compiled(path, size, threads) for name, path in files.items()}
    times = measure_interleaved(calls, warmup_seconds=WARMUP_SECONDS, repeats=ROUNDS)
    return {
        name: {"giga_multiply_adds": side["giga_multiply_adds"], **_shortest(times[name])}
        for name, side in {"nasline t": ours, "yolov8n": theirs}.items()
    }


def _shortest(times: Timings) -> dict[str, float]:
    return {
        "wall_ms": round(float(times.wall_ms.min()), 3),
        "wall_p50_ms": round(float(np.median(times.wall_ms)), 3),
        "cpu_ms": round(float(times.cpu_ms.min()), 3),
    }


def export_own(size: int, folder: Path) -> dict[str, Any]:
    """Our float engine file, folded."""
    torch.manual_seed(0)
    network = model.build(VARIANT, CLASSES).eval()
    path = folder / "nasline.onnx"
    multiply_adds = summarize(VARIANT, CLASSES, size, size).total()[1].multiply_adds
    export_onnx(
        network.fused_copy(),
        path,
        preprocessing=Preprocessing(size),
        class_names=[f"class {i}" for i in range(CLASSES)],
    )
    return {"onnx": str(path), "giga_multiply_adds": round(multiply_adds / 1e9, 3)}


def export_peer(size: int, peer: Path, folder: Path) -> dict[str, Any]:
    """The peer's, in a process with its packages."""
    paths = os.pathsep.join([str(HERE / "peer_standin"), str(peer.resolve())])
    words = [sys.executable, str(HERE / "peer_yolov8n_export.py"), str(folder), str(CLASSES), str(size)]
    done = subprocess.run(words, env={**os.environ, "PYTHONPATH": paths}, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def compiled(path: str, size: int, threads: int) -> Any:
    """One inference of a file on a picture of its own input type."""
    network = openvino.Core().read_model(path)
    network.reshape([1, 3, size, size])
    settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32"}
    request = openvino.Core().compile_model(network, "CPU", settings).create_infer_request()
    picture = np.random.default_rng(0).integers(0, 256, (1, 3, size, size), dtype=np.uint8)
    image = picture if network.input(0).element_type == openvino.Type.u8 else picture.astype(np.float32) / 255
    return lambda: request.infer({0: image}, share_inputs=True)


def table() -> str:
    """The rows as Markdown."""
    lines = ["| size | threads | network | multiply-adds | shortest call | its CPU time | median call |"]
    lines.append("|---|---|---|---|---|---|---|")
    for row in filter(None, map(ROWS.find, configurations())):
        what = row["configuration"]
        for name, side in row["figures"].items():
            cost = f"{side['giga_multiply_adds']:.2f} G | {side['wall_ms']:.1f} ms | {side['cpu_ms']:.1f} ms"
            lines.append(
                f"| {what['image_size']} | {what['threads']} | {name} | {cost} | {side['wall_p50_ms']:.1f} ms |"
            )
    return "\n".join(lines)


def main() -> None:
    """Measure what is missing, or print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    running = commands.add_parser("run", help="measure the missing rows")
    running.add_argument("--peer", type=Path, required=True, help="folder with the installed peer")
    running.add_argument("--again", action="store_true", help="measure finished rows again too")
    commands.add_parser("table", help="print the table")
    arguments = parser.parse_args()
    if arguments.command == "run":
        run(arguments.peer, arguments.again)
    else:
        print(table())


if __name__ == "__main__":
    main()
