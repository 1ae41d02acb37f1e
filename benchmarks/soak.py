"""Kill a training over and over at random moments, for an hour, and compare its end with an unbroken one.

    python benchmarks/soak.py [--minutes 60] [--seed N]

A row with the number of kills goes to results/soak.json; a difference in one bit ends with an error.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parent
RESULTS = HERE / "results" / "soak.json"
STEP = ("pretrain", "--role", "student", "--run", "soak")


def main() -> None:
    """Prepare once, train unbroken, then kill and resume until the time is over."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    draw, deadline, kills, rounds = random.Random(options.seed), time.monotonic() + 60 * options.minutes, 0, 0
    with tempfile.TemporaryDirectory() as folder:
        data, reference = Path(folder) / "digits", Path(folder) / "reference"
        subprocess.run([sys.executable, str(REPOSITORY / "demo" / "digits.py"), str(data)], check=True)
        expected = train(reference, data, None)[0]
        while time.monotonic() < deadline:
            found, killed = train(Path(folder) / f"round-{rounds}", data, draw)
            assert found == expected, f"round {rounds} ended with other weights after {killed} kills"
            kills, rounds = kills + killed, rounds + 1
    row = {"minutes": options.minutes, "seed": options.seed, "rounds": rounds, "kills": kills, "equal": True}
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(row, indent=1) + "\n")
    print(json.dumps(row))


def train(workspace: Path, data: Path, draw: random.Random | None) -> tuple[bytes, int]:
    """Pretrain in a new workspace; with `draw` the process is killed after random times until it gets through."""
    options = ["--params", str(REPOSITORY / "params.demo.yaml"), "--pretrain.epochs", "3",
               "--pretrain.checkpoint_every_steps", "5", "--start.dataset", str(data / "target"),
               "--start.pretrain_dataset", str(data / "pretrain")]  # fmt: skip
    nasline(workspace, "start", "--run", "soak", *options).wait()
    nasline(workspace, "validate_data", "--run", "soak").wait()
    kills = 0
    while True:
        process = nasline(workspace, *STEP)
        try:
            process.wait(None if draw is None else draw.uniform(3, 20))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            kills += 1
            continue
        assert process.returncode == 0, f"exit code {process.returncode}"
        (weights,) = workspace.glob("steps/pretrain/*/checkpoint/model.safetensors")
        return weights.read_bytes(), kills


def nasline(workspace: Path, *arguments: str) -> subprocess.Popen[bytes]:
    """One command, its words thrown away."""
    command = [sys.executable, "-m", "pipeline_tasks", arguments[0], "--workspace", str(workspace), *arguments[1:]]
    return subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT)


if __name__ == "__main__":
    main()
