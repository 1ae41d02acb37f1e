"""YOLO-NAS-T of this repository against YOLOv8n, both from scratch, equal CPU time, on three real sets.

    python benchmarks/against_yolov8n.py run --peer FOLDER [--only yolov8n|nasline]
    python benchmarks/against_yolov8n.py table

FOLDER holds the peer (`pip install --no-deps --target FOLDER ultralytics ultralytics-thop polars polars-runtime-32`);
it is no dependency of the product. Every finished row is kept in results/against_yolov8n.json at once, only missing
rows are trained. Both sides train on one thread without loader processes (one thread is what the peer chooses itself
on two cores), 320 px; the CPU time of a run, validation passes included, stands in its row. Both are judged by the
same evaluation, equal to pycocotools, on the test split; neither chooses anything there.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import photo_sets
from benchmarks.own_training import read
from benchmarks.rows import Rows
from model.data.image_set import ImageSet
from model.detections import Detections

HERE = Path(__file__).resolve().parent
ROWS = Rows("against_yolov8n")
IMAGE_SIZE = 320
SETS = ("bccd", "playing_cards", "aquarium")
SEEDS = {"bccd": (0, 1, 2), "playing_cards": (0,), "aquarium": (0,)}
# epochs that fill about ten CPU minutes of the machine in the rows
PEER_EPOCHS = {"bccd": 30, "playing_cards": 29, "aquarium": 17}
OWN_EPOCHS = {"bccd": 30, "playing_cards": 29, "aquarium": 17}
# the peer tuned for short runs: every batch a step, a short warm-up, the learning rate chosen on validation images
PEER_TUNED: dict[str, Any] = {"nbs": 16, "warmup_epochs": 1, "optimizer": "AdamW", "weight_decay": 0.0005}
PEER_LEARNING_RATES = (0.001, 0.002, 0.004)
OWN_RECIPE: dict[str, Any] = {"evaluate_every_epochs": 4}


def configurations() -> list[dict[str, Any]]:
    """Every row of the table, the most telling first."""
    pairs = [(name, seed) for name in SETS for seed in SEEDS[name]]
    tried = [peer_tuned("bccd", 0, rate) for rate in PEER_LEARNING_RATES]
    defaults = [row for name, seed in pairs for row in (peer_defaults(name, seed), own(name, seed))]
    tuned = [peer_tuned(name, seed, rate) for name, seed in pairs for rate in chosen_rate()]
    longer = [own("bccd", 0, times=2), peer_defaults("bccd", 0, times=2)]
    longer += [peer_tuned("bccd", 0, rate, times=2) for rate in chosen_rate()]
    return defaults + tried + [row for row in tuned if row not in tried] + longer


def peer_defaults(name: str, seed: int, times: int = 1) -> dict[str, Any]:
    """The peer as it comes; `times` as long as the others."""
    epochs = times * PEER_EPOCHS[name]
    return {"system": "yolov8n", "recipe": "defaults", "dataset": name, "seed": seed, "epochs": epochs}


def peer_tuned(name: str, seed: int, rate: float, times: int = 1) -> dict[str, Any]:
    """The peer with a recipe for short runs."""
    return {**peer_defaults(name, seed, times), "recipe": "tuned", "learning_rate": rate}


def own(name: str, seed: int, times: int = 1) -> dict[str, Any]:
    """This repository's default recipe."""
    epochs = times * OWN_EPOCHS[name]
    return {"system": "nasline t", "recipe": "defaults", "dataset": name, "seed": seed, "epochs": epochs}


def chosen_rate() -> tuple[float, ...]:
    """The tuned peer's learning rate with the best validation mAP on bccd, none while rows are missing."""
    rows = [ROWS.find(peer_tuned("bccd", 0, rate)) for rate in PEER_LEARNING_RATES]
    found = [row for row in rows if row is not None]
    if len(found) < len(PEER_LEARNING_RATES):
        return ()
    best = max(found, key=lambda row: float(row["figures"]["validation_map50_95"]))
    return (best["configuration"]["learning_rate"],)


def run(peer: Path, only: str | None) -> None:
    """Train the missing rows, one after the other."""
    while wanted := [row for row in ROWS.missing(configurations()) if not only or row["system"].startswith(only)]:
        configuration = wanted[0]
        print("training", json.dumps(configuration), flush=True)
        train = train_peer if configuration["system"] == "yolov8n" else train_own
        figures = train(configuration, peer)
        ROWS.add(configuration, figures)
        print(json.dumps({name: figures[name] for name in ("cpu_minutes", "map50_95", "map50")}), flush=True)


def train_peer(configuration: dict[str, Any], peer: Path) -> dict[str, Any]:
    """One row of the peer, in a process of its own with the peer's packages."""
    photos, output = photo_sets.load(configuration["dataset"]), folder(configuration)
    options: dict[str, Any] = {}
    if configuration["recipe"] == "tuned":
        options = {**PEER_TUNED, "lr0": configuration["learning_rate"]}
    paths = os.pathsep.join([str(HERE / "peer_standin"), str(peer.resolve())])
    words = [str(photos.folder), str(output), "--epochs", configuration["epochs"], "--seed", configuration["seed"]]
    _python("peer_yolov8n.py", [*words, "--options", json.dumps(options)], output, {"PYTHONPATH": paths})
    tables = np.load(output / "detections.npz")
    splits = {"val": photos.validation, "test": photos.test}
    found = {split: _peer_detections(tables, split, images) for split, images in splits.items()}
    return _figures(output, found, splits)


def _peer_detections(tables: Any, split: str, images: ImageSet) -> Detections:
    names = [images.path(index).partition("/images/")[2] for index in range(len(images))]
    return Detections.from_rows([tables[f"{split}/{name}"] for name in names])


def train_own(configuration: dict[str, Any], _: Path) -> dict[str, Any]:
    """One row of this repository, in a process of its own."""
    photos, output = photo_sets.load(configuration["dataset"]), folder(configuration)
    recipe = {**OWN_RECIPE, "epochs": configuration["epochs"]}
    words = [configuration["dataset"], str(output), "--seed", configuration["seed"], "--recipe", json.dumps(recipe)]
    _python("own_training.py", words, output, {})
    splits = {"val": photos.validation, "test": photos.test}
    return _figures(output, {split: read(output / f"{split}.npz") for split in splits}, splits)


def _figures(output: Path, found: dict[str, Detections], splits: dict[str, ImageSet]) -> dict[str, Any]:
    seconds = json.loads((output / "run.json").read_text())["cpu_seconds"]
    validation = photo_sets.figures(found["val"], splits["val"])["map50_95"]
    test = photo_sets.figures(found["test"], splits["test"])
    return {"cpu_minutes": round(seconds / 60, 2), "validation_map50_95": validation, **test}


def folder(configuration: dict[str, Any]) -> Path:
    """Where a row is trained; what was finished there is not done again."""
    words = [str(configuration[name]) for name in sorted(configuration)]
    return photo_sets.CACHE / "against_yolov8n" / "-".join(words).replace(" ", "_")


def _python(script: str, words: list[Any], output: Path, environment: dict[str, str]) -> None:
    if (output / "run.json").exists():
        return
    output.mkdir(parents=True, exist_ok=True)
    with (output / "log.txt").open("a", encoding="utf-8") as log:
        subprocess.run(
            [sys.executable, str(HERE / script), *map(str, words)],
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment}, stdout=log, stderr=log, check=True,
        )  # fmt: skip


def table() -> str:
    """The rows as Markdown, with the paired bootstrap interval of ours against each recipe of the peer."""
    lines = [
        "| set | epochs | system | recipe | seeds | mAP50-95 (mean, range) | mAP50 | CPU min | ours minus it, points |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, times in [*((name, 1) for name in SETS), ("bccd", 2)]:
        own_rows = _finished([own(name, seed, times) for seed in SEEDS[name]])
        lines += [_line(rows, own_rows) for rows in _groups(name, times) if rows]
    return "\n".join([*lines, "", *_means()])


def _groups(name: str, times: int) -> list[list[dict[str, Any]]]:
    """The finished rows of each recipe on a set: ours, the peer's defaults, the peer tuned."""
    seeds = SEEDS[name]
    return [
        _finished([own(name, seed, times) for seed in seeds]),
        _finished([peer_defaults(name, seed, times) for seed in seeds]),
        _finished([peer_tuned(name, seed, rate, times) for seed in seeds for rate in chosen_rate()]),
    ]


def _finished(configurations: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row for row in map(ROWS.find, configurations) if row is not None]


def _means() -> list[str]:
    """Mean over the sets of the difference to each recipe of the peer, where every set has it."""
    lines = []
    for place, recipe in ((1, "defaults"), (2, "tuned")):
        pairs = [(_groups(name, 1)[0], _groups(name, 1)[place]) for name in SETS]
        if all(ours and theirs for ours, theirs in pairs):
            lines.append(f"Mean of the sets, ours minus YOLOv8n {recipe}: {_over_sets(pairs)} points.")
    return lines


def _line(rows: list[dict[str, Any]], ours: list[dict[str, Any]]) -> str:
    chosen, figures = rows[0]["configuration"], [row["figures"] for row in rows]
    values = [one["map50_95"] for one in figures]
    spread = f"{np.mean(values):.3f}" + (f" ({min(values):.3f} to {max(values):.3f})" if len(values) > 1 else "")
    rate = chosen.get("learning_rate")
    recipe = chosen["recipe"] + (f", lr {rate:g}" if rate else "")
    minutes, half = np.mean([one["cpu_minutes"] for one in figures]), np.mean([one["map50"] for one in figures])
    against = "" if rows == ours or not ours else _over_sets([(ours, rows)])
    what = f"{chosen['dataset']} | {chosen['epochs']} | {chosen['system']} | {recipe} | {len(rows)}"
    return f"| {what} | {spread} | {half:.3f} | {minutes:.1f} | {against} |"


def _over_sets(pairs: list[tuple[list[dict[str, Any]], list[dict[str, Any]]]]) -> str:
    """Mean over sets of the mean difference over the seeds both have, with its 95 % interval over resamples of images;
    empty where a set has no common seed.
    """
    means, resampled = [], []
    for ours, theirs in pairs:
        known = {row["configuration"]["seed"]: row["figures"] for row in theirs}
        both = [(row["figures"], known[seed]) for row in ours if (seed := row["configuration"]["seed"]) in known]
        if not both:
            return ""
        means.append(np.mean([mine["map50_95"] - other["map50_95"] for mine, other in both]))
        draws = [np.subtract(mine["resampled_map50_95"], other["resampled_map50_95"]) for mine, other in both]
        resampled.append(np.mean(draws, axis=0))
    low, high = 100 * np.percentile(np.mean(resampled, axis=0), [2.5, 97.5])
    return f"{100 * np.mean(means):+.1f} ({low:+.1f} to {high:+.1f})"


def main() -> None:
    """Run what is missing, or print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    running = commands.add_parser("run", help="train the missing rows")
    running.add_argument("--peer", type=Path, required=True, help="folder with the installed peer")
    running.add_argument("--only", choices=["yolov8n", "nasline"])
    commands.add_parser("table", help="print the table")
    arguments = parser.parse_args()
    if arguments.command == "run":
        run(arguments.peer, arguments.only)
    else:
        print(table())


if __name__ == "__main__":
    main()
