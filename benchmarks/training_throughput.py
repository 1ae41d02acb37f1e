"""How fast training goes: this repository's loop and loader beside Ultralytics' with YOLOv8n.

    python benchmarks/training_throughput.py run --peer FOLDER [--only steps|loaders] [--again]
    python benchmarks/training_throughput.py table

FOLDER holds the peer (see against_yolov8n.py). Every contestant is a process of its own with one thread, and they take
turns for several rounds. A training loop is started anew for each turn, and does a few steps that are not counted and
then a few that are; one that stood still between its turns was slower afterwards than trainings are (docs/LOG.md).
Loaders are started once. What counts is the median processor time of a step, and for the ratios the median of the
rounds' ratios; the ratio of the shortest steps stands beside it, for a busy machine can only lengthen them. The
machine's load stands in every row. Rows are kept in results/training_throughput.json.

*Steps*: batch 16, 320 px, real pictures and boxes, the same for all. ``GFLOP/s`` are 6 floating-point operations for
each multiply-add of a convolution (2 forward, 4 for the two gradients) by the processor time of the whole step: forward
pass, loss and assignment, gradients, clipping, optimiser, average, book-keeping. Both loops run with their defaults,
but the peer makes an optimiser step for every batch, as ours does. Wide convolutions flatter this figure; hence a row
with a network of ours that needs as many multiply-adds as YOLOv8n, 5 % up or down, and its images per second.

*The same architecture in both loops*, which is what a loop can be praised for: YOLOv8n in the peer's trainer and in
``model.training.train``, each time with the peer's own loss; and YOLO-NAS-T in both, each time with our loss. So in a
pair network, loss, pictures and float32 are the same, and nothing but the loop differs. A third pair has the plain
form of YOLO-NAS-T in the peer's loop: without the quick paths of model/layout.py, which else go with the network.

*Loaders*: images per second of one core, the same augmentations, each loader as it comes ("defaults": ours keeps
pictures decoded in memory, the peer keeps those of its last batches), both without such memory, and both with it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import photo_sets
from benchmarks.peer_yolov8n import convert
from benchmarks.rows import Rows
from model.data.augmentation import AugmentationConfig
from model.data.loader import TrainingLoader
from model.preprocessing import Preprocessing

HERE = Path(__file__).resolve().parent
ROWS = Rows("training_throughput")
FOLDER = photo_sets.CACHE / "training_throughput"
IMAGE_SIZE, BATCH, BATCHES = 320, 16, 4
STEP_ROUNDS, STEPS_A_TURN = 3, 5
LOADER_ROUNDS, BATCHES_A_TURN = 10, 4
OPERATIONS = 6  # for each multiply-add: 2 forward, 2 for each of the two gradients

# network, loop, precision
PEER = ("yolov8n", "ultralytics", "float32")
CONTESTANTS = (
    ("t", "nasline", "float32"),
    PEER,
    ("t", "nasline", "bfloat16"),
    ("t-narrower", "nasline", "float32"),
    ("yolov8n", "nasline", "float32"),
    ("t", "ultralytics", "float32"),
    ("t-plain", "ultralytics", "float32"),
)
# what differs: the network in our loop, and what it is called in the peer's
SAME_ARCHITECTURE = {"yolov8n": "yolov8n", "t": "t", "t, written plainly there": "t-plain"}
STEPS = {"measure": "steps", "image_size": IMAGE_SIZE, "batch": BATCH, "dataset": "bccd"}
SETS = ("bccd", "playing_cards", "aquarium")
LOADERS = ("nasline", "nasline reduced", "ultralytics")


def loader_rows() -> list[dict[str, Any]]:
    """The loaders' rows, the most telling first."""
    choices = [(name, 1.0, pictures) for pictures in ("defaults", "decoded") for name in SETS]
    choices += [("bccd", 1.0, "in memory")]
    return [
        {"measure": "loaders", "dataset": name, "mosaic": mosaic, "pictures": pictures}
        for name, mosaic, pictures in choices
    ]


@dataclass
class Contestant:
    """A process that waits for its turn."""

    process: subprocess.Popen[str]
    facts: dict[str, Any]
    times: list[list[dict[str, float]]]

    @classmethod
    def start(cls, words: list[str], environment: dict[str, str], log: Path) -> Contestant:
        """Start it, and wait until it has warmed up."""
        with log.open("w", encoding="utf-8") as file:
            process = subprocess.Popen(
                [sys.executable, *words], env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=file, text=True,
            )  # fmt: skip
        contestant = cls(process, {}, [])
        contestant.facts = contestant._answer(log)
        contestant.facts["warm_up"] = contestant._answer(log)
        return contestant

    def turn(self, steps: int) -> None:
        """Let it do so many steps; the first, for which it had to wake up, is not counted."""
        assert self.process.stdin is not None
        print(steps, file=self.process.stdin, flush=True)
        self.times.append(self._answer(None)[1:])

    def _answer(self, log: Path | None) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"a contestant ended early; see {log or FOLDER}")
        return json.loads(line)

    def end(self) -> None:
        """Close its input, which ends it."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(60)

    def median(self, what: str) -> float:
        """Over all steps."""
        return statistics.median(step[what] for turn in self.times for step in turn)

    def shortest(self) -> float:
        """Processor seconds of the quickest step."""
        return min(step["cpu_seconds"] for turn in self.times for step in turn)

    def of_rounds(self) -> np.ndarray[Any, Any]:
        """Processor seconds of a step in each round."""
        return np.array([np.mean([step["cpu_seconds"] for step in turn]) for turn in self.times])


def interleave(contestants: list[Contestant], rounds: int, steps: int) -> tuple[float, float]:
    """Let them take turns; gives the machine's load before and after."""
    before = os.getloadavg()[0]
    for _ in range(rounds):
        for contestant in contestants:
            contestant.turn(steps)
    after = os.getloadavg()[0]
    for contestant in contestants:
        contestant.end()
    return round(before, 1), round(after, 1)


def ratio(faster: Contestant, slower: Contestant, factor: float = 1.0) -> dict[str, float]:
    """How many times as fast: median of the rounds, the extremes, and by the shortest steps."""
    low, middle, high = np.percentile(factor * slower.of_rounds() / faster.of_rounds(), [0, 50, 100])
    values = {
        "median": middle,
        "lowest": low,
        "highest": high,
        "shortest": factor * slower.shortest() / faster.shortest(),
    }
    return {name: round(float(value), 3) for name, value in values.items()}


def measure_steps(peer: Path) -> dict[str, Any]:
    """All networks and loops in one interleaved run."""
    batches, data = prepared_batches(), peer_data("bccd")
    started: dict[tuple[str, str, str], Contestant] = {}
    before = os.getloadavg()[0]
    for _ in range(STEP_ROUNDS):
        for words in CONTESTANTS:
            one = one_turn(words, batches, data, peer)
            one.times = [*(started[words].times if words in started else []), *one.times]
            started[words] = one
    load = (round(before, 1), round(os.getloadavg()[0], 1))
    work = {words: one.facts["multiply_adds"] for words, one in started.items()}
    figures: dict[str, Any] = {"load_before_and_after": load, "rounds": STEP_ROUNDS, "steps_a_turn": STEPS_A_TURN}
    figures["contestants"] = [
        {
            "network": words[0], "loop": words[1], "precision": words[2],
            "multiply_adds": work[words], "parameters": one.facts["parameters"],
            "cpu_seconds": round(one.median("cpu_seconds"), 4), "shortest_cpu_seconds": round(one.shortest(), 4),
            "wall_seconds": round(one.median("wall_seconds"), 4),
            "gflops_per_core": round(OPERATIONS * work[words] * BATCH / one.median("cpu_seconds") / 1e9, 1),
            "images_per_cpu_second": round(BATCH / one.median("cpu_seconds"), 2),
            "gflops_ratio": ratio(one, started[PEER], work[words] / work[PEER]),
            "images_ratio": ratio(one, started[PEER]),
        }
        for words, one in started.items()
    ]  # fmt: skip
    figures["same_architecture"] = {
        name: ratio(started[name.split(",")[0], "nasline", "float32"], started[there, "ultralytics", "float32"])
        for name, there in SAME_ARCHITECTURE.items()
    }
    return figures


def one_turn(words: tuple[str, str, str], batches: Path, data: Path, peer: Path) -> Contestant:
    """A training loop from its start to the end of its turn."""
    folder = FOLDER / "-".join(words)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    script = [str(HERE / "throughput_contestants.py"), *words, str(batches), str(folder), "--peer-data", str(data)]
    contestant = Contestant.start(script, peer_environment(peer), folder / "log.txt")
    contestant.turn(STEPS_A_TURN)
    contestant.end()
    return contestant


def prepared_batches() -> Path:
    """Real batches with mosaic, padded to one number of boxes, in a file."""
    photos, path = photo_sets.load("bccd"), FOLDER / "batches.npz"
    augmentation = AugmentationConfig(mosaic_probability=1.0)
    loader = TrainingLoader(photos.train, photos.open_image, Preprocessing(IMAGE_SIZE), BATCH, augmentation, seed=0)
    batches = [batch for batch, _ in zip(loader.epoch(0), range(BATCHES), strict=False)]
    widest = max(batch.targets.mask.shape[1] for batch in batches)
    columns = {}
    for name in ("boxes_xyxy", "labels", "weights", "mask"):
        arrays = [getattr(batch.targets, name).numpy() for batch in batches]
        paddings = [[(0, 0), (0, widest - one.shape[1])] + [(0, 0)] * (one.ndim - 2) for one in arrays]
        columns[name] = np.stack([np.pad(one, pad) for one, pad in zip(arrays, paddings, strict=True)])
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, images=np.stack([batch.images.numpy() for batch in batches]), **columns)
    return path


def measure_loaders(configuration: dict[str, Any], peer: Path) -> dict[str, Any]:
    """The loaders on one set, taking turns."""
    name, mosaic, pictures = configuration["dataset"], configuration["mosaic"], configuration["pictures"]
    data, environment = peer_data(name), peer_environment(peer)
    started = {}
    for loader in LOADERS:
        words = [str(HERE / "throughput_loaders.py"), loader, name, str(mosaic), pictures, str(data)]
        started[loader] = Contestant.start(words, environment, FOLDER / f"loader-{loader.replace(' ', '-')}.txt")
    load = interleave(list(started.values()), LOADER_ROUNDS, BATCHES_A_TURN)
    figures: dict[str, Any] = {"load_before_and_after": load, "rounds": LOADER_ROUNDS, "batches_a_turn": BATCHES_A_TURN}
    for loader, one in started.items():
        first = sum(step["cpu_seconds"] for step in one.facts["warm_up"])
        figures[loader] = {
            "images_per_cpu_second": round(BATCH / one.median("cpu_seconds"), 1),
            "images_per_cpu_second_in_first_epoch": round(BATCH * len(one.facts["warm_up"]) / first, 1),
            "ratio": ratio(one, started["ultralytics"]),
        }
    return figures


def peer_data(name: str) -> Path:
    """The peer's description of a set, made once."""
    return convert(photo_sets.shared_data() / name, FOLDER / "peer" / name)


def peer_environment(peer: Path) -> dict[str, str]:
    """What the peer's packages need to be found and to stay silent."""
    paths = os.pathsep.join([str(HERE / "peer_standin"), str(peer.resolve())])
    return {"PYTHONPATH": paths, "YOLO_CONFIG_DIR": str(FOLDER), "YOLO_OFFLINE": "true"}


def run(peer: Path, only: str | None, again: bool) -> None:
    """Measure the rows that are missing, or all."""
    wanted = [row for row in [STEPS, *loader_rows()] if only in (None, row["measure"])]
    for configuration in wanted if again else ROWS.missing(wanted):
        measured_steps = configuration["measure"] == "steps"
        figures = measure_steps(peer) if measured_steps else measure_loaders(configuration, peer)
        ROWS.add(configuration, figures)
        print(json.dumps(configuration), json.dumps(figures), flush=True)


def table() -> str:
    """The rows as Markdown."""
    steps = ROWS.find(STEPS)
    loaders = [row for row in map(ROWS.find, loader_rows()) if row is not None]
    parts = [_steps_table(steps["figures"])] if steps else []
    return "\n\n".join([*parts, _loaders_table(loaders)])


def _steps_table(figures: dict[str, Any]) -> str:
    lines = [
        "| network | loop | precision | training GMACs an image | GFLOP/s a core | against YOLOv8n in its loop | "
        "images per CPU second | against YOLOv8n in its loop |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for one in figures["contestants"]:
        lines.append(
            f"| {one['network']} | {one['loop']} | {one['precision']} | {one['multiply_adds'] / 1e9:.3f} "
            f"| {one['gflops_per_core']:.1f} | {_times(one['gflops_ratio'])} "
            f"| {one['images_per_cpu_second']:.1f} | {_times(one['images_ratio'])} |"
        )
    pairs = [f"| {name} | {_times(value)} |" for name, value in figures["same_architecture"].items()]
    heading = ["", "| the same network, loss and precision in both loops | ours is faster by |", "|---|---|"]
    return "\n".join([*lines, *heading, *pairs])


def _loaders_table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| set | mosaic | pictures | ours | ours, reduced decoding | Ultralytics | ours is faster by | "
        "with reduced decoding |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        chosen, figures = row["configuration"], row["figures"]
        speeds = " | ".join(f"{figures[name]['images_per_cpu_second']:.0f}" for name in LOADERS)
        ratios = " | ".join(_times(figures[name]["ratio"]) for name in LOADERS[:2])
        lines.append(f"| {chosen['dataset']} | {chosen['mosaic']:g} | {chosen['pictures']} | {speeds} | {ratios} |")
    return "\n".join(lines)


def _times(value: dict[str, float]) -> str:
    return f"{value['median']:.2f} ({value['lowest']:.2f} to {value['highest']:.2f}; {value['shortest']:.2f})"


def main() -> None:
    """Run what is missing, or print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    running = commands.add_parser("run", help="measure the missing rows")
    running.add_argument("--peer", type=Path, required=True, help="folder with the installed peer")
    running.add_argument("--only", choices=["steps", "loaders"])
    running.add_argument("--again", action="store_true", help="measure all rows anew")
    commands.add_parser("table", help="print the table")
    arguments = parser.parse_args()
    if arguments.command == "run":
        run(arguments.peer, arguments.only, arguments.again)
    else:
        print(table())


if __name__ == "__main__":
    main()
