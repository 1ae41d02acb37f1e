"""The chain on real photographs, through Airflow and MLflow: blood cells (bccd), 250 training images.

    python benchmarks/real_photographs.py [--seed N]

Needs NASLINE_SHARED (default ../shared). One row per run is added to results/real_photographs.json. One seed is one
observation: a claim about quality needs several.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parent
RESULTS = HERE / "results" / "real_photographs.json"
WORKSPACE = REPOSITORY / ".demo" / "workspace"


def main() -> None:
    """Run the chain and store its row."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    seed = parser.parse_args().seed
    data = Path(os.environ.get("NASLINE_SHARED", REPOSITORY.parent / "shared")) / "data"
    began = time.monotonic()
    run = run_chain(data, seed)
    row = {"seed": seed, "minutes": round((time.monotonic() - began) / 60, 1), **read_row(run)}
    rows = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps([*rows, row], indent=1) + "\n")
    print(json.dumps(row, indent=1))


def run_chain(data: Path, seed: int) -> str:
    """`make demo` on the real sets; the id of its run."""
    with tempfile.TemporaryDirectory() as folder:
        parameters = yaml.safe_load((HERE / "params.bccd.yaml").read_text())
        parameters["start"]["seed"] = seed
        path = Path(folder) / "params.yaml"
        path.write_text(yaml.safe_dump(parameters))
        sets = {"--dataset": "bccd", "--pretrain": "pretrain_general", "--unlabeled": "unlabeled_general"}
        options = [word for option, name in sets.items() for word in (option, str(data / name))]
        subprocess.run(
            [sys.executable, str(REPOSITORY / "demo" / "run.py"), *options, "--params", str(path)], check=True
        )
    return max((WORKSPACE / "runs").glob("*/run.json"), key=lambda path: path.stat().st_mtime).parent.name


def read_row(run: str) -> dict[str, Any]:
    """Accuracy, latency and where they were measured."""
    steps = json.loads((WORKSPACE / "runs" / run / "run.json").read_text())["steps"]
    summaries = {name: _manifest(name, key)["summary"] for name, key in steps.items()}
    gate, quantize = summaries["gate"], summaries["quantize"]
    folder = WORKSPACE / "steps" / "gate" / steps["gate"]
    latency = json.loads((folder / "latency.json").read_text())["int8"]
    return {
        "dataset": "bccd test split, 47 images",
        "variant": "pico, 320 px",
        "device": latency["device"]["device"],
        "cores": latency["device"]["cores"],
        "runtime": f"{latency['runtime']} {latency['runtime_version']}",
        "threads": latency["threads"],
        "batch": 1,
        "float_map50_95": gate["float_map50_95"],
        "int8_map50_95": gate["int8_map50_95"],
        "int8_map50": gate["int8_map50"],
        "float_latency_p50_ms": gate["float_latency_p50_ms"],
        "int8_latency_p50_ms": gate["int8_latency_p50_ms"],
        "speedup_of_minima": gate["speedup"],
        "latency_is_noisy": latency["noisy"],
        "validation": {name: value for name, value in quantize.items() if name.endswith("map50_95")},
        "published": quantize["published"],
        "pseudo_boxes": summaries["pseudo_label"]["boxes"],
        "passed": gate["passed"],
    }


def _manifest(step: str, key: str) -> dict[str, Any]:
    path = WORKSPACE / "steps" / step.split("/")[0] / key / "manifest.json"
    content: dict[str, Any] = json.loads(path.read_text())
    return content


if __name__ == "__main__":
    main()
