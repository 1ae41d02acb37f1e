"""How much faster INT8 is on this CPU: OpenVINO engines of one network against each other.

    python benchmarks/engine_speed.py run [--variant V] [--size S] [--threads N] [--rounds N] [--again]
    python benchmarks/engine_speed.py table

Batch 1, inference alone. All forms of a network take turns in random order in one process; what counts is the shortest
wall and processor time of a call. Weights are random, since they do not matter to speed. Rows, in
results/engine_speed.json, are measured with the instructions this CPU has and, in a process of its own, with AVX2
alone (oneDNN's ONEDNN_MAX_CPU_ISA), as on processors without VNNI.

Forms: float, as `export` writes it; float merged, the same with merged upsampling (model/quantization); int8, what
`quantize` makes by default; all int8, the predictions too; before merging, INT8 with transposed convolutions and two
convolutions behind them in float; selected, the layers in float that the accuracy budget asked for on bccd
(quantization_accuracy.py, variant s, where that row is there).
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
import onnx
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import model
from benchmarks.rows import Rows
from model.export import export_onnx
from model.onnx_float_layers import leave_in_float
from model.onnx_structure import check_graph, convolutions
from model.preprocessing import Preprocessing
from model.quantization.quantize import CPU_FLOAT_LAYERS, PREDICTION_LAYERS, QuantizationConfig, match_layers, quantize

ROWS = Rows("engine_speed")
CLASSES = 80
INSTRUCTIONS = {"all of this CPU": {}, "AVX2 alone": {"ONEDNN_MAX_CPU_ISA": "AVX2"}}
CALIBRATION_SIZE = 160
FLOAT = "float"


def run(variant: str, sizes: list[int], threads: int, rounds: int, again: bool) -> None:
    """Measure what is missing, or all of it again."""
    for size in sizes:
        wanted = [
            {"variant": variant, "image_size": size, "threads": threads, "instructions": name} for name in INSTRUCTIONS
        ]
        missing = wanted if again else ROWS.missing(wanted)
        if not missing:
            continue
        with tempfile.TemporaryDirectory() as folder:
            write_forms(variant, size, Path(folder))
            for configuration in missing:
                print("running", json.dumps(configuration), flush=True)
                environment = {**os.environ, **INSTRUCTIONS[configuration["instructions"]]}
                command = [
                    sys.executable,
                    __file__,
                    "measure",
                    folder,
                    "--threads",
                    str(threads),
                    "--rounds",
                    str(rounds),
                ]
                done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
                ROWS.add(configuration, json.loads(done.stdout.splitlines()[-1]))


def write_forms(variant: str, size: int, folder: Path) -> None:
    """The network's two exported files, and which layers each form leaves in float."""
    torch.manual_seed(0)
    network = with_statistics(model.build(variant, CLASSES)).eval().fuse()
    images = torch.rand(1, 3, CALIBRATION_SIZE, CALIBRATION_SIZE)
    names = [f"class {index}" for index in range(CLASSES)]
    merged = quantize(network, [images], QuantizationConfig("max", float_layers=(), merge_upsampling=True))
    plain = quantize(network, [images], QuantizationConfig("max", float_layers=tuple(CPU_FLOAT_LAYERS)))
    for name, quantized in (("merged", merged), ("plain", plain)):
        export_onnx(quantized, folder / f"{name}.onnx", preprocessing=Preprocessing(size), class_names=names)
    predictions = [layer for pattern in PREDICTION_LAYERS for layer in match_layers(merged, pattern)]
    forms = {"int8": predictions, "all int8": []}
    selected = selected_layers(variant)
    if selected is not None:
        forms["selected"] = [*predictions, *selected]
    (folder / "forms.json").write_text(json.dumps(forms))


def with_statistics(network: torch.nn.Module) -> torch.nn.Module:
    """Norms that have seen pictures, so that activations stay in an ordinary range."""
    network.train()
    with torch.no_grad():
        for _ in range(2):
            network(torch.rand(2, 3, CALIBRATION_SIZE, CALIBRATION_SIZE))
    return network


def selected_layers(variant: str) -> list[str] | None:
    """What the accuracy budget left in float on bccd; None while that was not measured."""
    for row in Rows("quantization_accuracy").all():
        found = row["configuration"]
        if (found["dataset"], found["variant"], found["method"]) == ("bccd", variant, "selective"):
            layers: list[str] = row["figures"]["quantization"]["layers_in_float"]
            return layers
    return None


def measure(folder: Path, threads: int, rounds: int) -> dict[str, Any]:
    """Figures of every form, in this process."""
    from model.engines.latency import device_facts
    from model.engines.layer_profile import time_forms

    plain, merged = (onnx.load(folder / f"{name}.onnx") for name in ("plain", "merged"))
    forms = {
        FLOAT: leave_in_float(plain, convolutions(plain)),
        "float merged": leave_in_float(merged, convolutions(merged)),
        "before merging": plain,
    }
    chosen = json.loads((folder / "forms.json").read_text())
    forms |= {name: leave_in_float(merged, layers) for name, layers in chosen.items()}
    facts = device_facts()
    size = plain.graph.input[0].type.tensor_type.shape.dim[2].dim_value
    image = np.random.default_rng(0).integers(0, 256, (1, 3, size, size), dtype=np.uint8)
    timings = time_forms(forms, image, threads=threads, rounds=rounds, warmup_seconds=1.0)
    return {
        "device": facts.device,
        "load": round(facts.load, 2),
        "rounds": rounds,
        "forms": {
            name: {
                "wall_min_ms": round(float(found.wall_ms.min()), 2),
                "wall_p50_ms": round(float(np.median(found.wall_ms)), 2),
                "cpu_min_ms": round(float(found.cpu_ms.min()), 2),
                "float_layers": len(check_graph(forms[name]).floating),
            }
            for name, found in timings.items()
        },
    }


def table() -> str:
    """Rows as Markdown: milliseconds, and how many times as fast as the float engine."""
    lines = ["| network | instructions | form | layers in float | wall, min | CPU, min | faster by wall | by CPU |"]
    lines += ["|---" * 8 + "|"]
    for row in ROWS.all():
        given, forms = row["configuration"], row["figures"]["forms"]
        name = f"{given['variant']}, {given['image_size']} px, {given['threads']} threads"
        for form, found in forms.items():
            ratios = [f"{forms[FLOAT][key] / found[key]:.2f}" for key in ("wall_min_ms", "cpu_min_ms")]
            times = [f"{found[key]:.1f} ms" for key in ("wall_min_ms", "cpu_min_ms")]
            cells = [name, given["instructions"], form, str(found["float_layers"]), *times, *ratios]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Run, print, or measure in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=("run", "table", "measure"))
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--variant", default="s")
    parser.add_argument("--size", type=int, action="append")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--again", action="store_true", help="measure what is there already too")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.command == "measure":
        print(json.dumps(measure(arguments.folder, arguments.threads, arguments.rounds)))
        return
    if arguments.command == "run":
        run(arguments.variant, arguments.size or [640, 320], arguments.threads, arguments.rounds, arguments.again)
    print(table())


if __name__ == "__main__":
    main()
