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
# epochs that fill about ten CPU minutes of the machine in the rows, validation included: a step of ours takes less time
PEER_EPOCHS = {"bccd": 30, "playing_cards": 29, "aquarium": 17}
OWN_EPOCHS = {"bccd": 42, "playing_cards": 40, "aquarium": 24}
# the peer tuned for short runs: every batch a step, a short warm-up; its learning rate is chosen for each set
PEER_TUNED: dict[str, Any] = {"nbs": 16, "warmup_epochs": 1, "optimizer": "AdamW", "weight_decay": 0.0005}
# tried with the first seed of a set; what finds most on the validation images is taken for all its seeds
LEARNING_RATES = {"yolov8n": (0.001, 0.002, 0.004), "nasline t": (0.001, 0.002, 0.003)}
OWN_DEFAULT_RATE = 0.003
OWN_RECIPE: dict[str, Any] = {"evaluate_every_epochs": 4}


def configurations() -> list[dict[str, Any]]:
    """Every row of the table, the most telling first."""
    pairs = [(name, seed) for name in SETS for seed in SEEDS[name]]
    rows = [row for name, seed in pairs for row in (peer_defaults(name, seed), own(name, seed))]
    rows += [row for name in SETS for tried in (tried_by_peer, tried_by_us) for row in tried(name)]
    rows += [row for name, seed in pairs for choose in (chosen_of_peer, chosen_of_ours) for row in choose(name, seed)]
    rows += [own("bccd", 0, times=2), peer_defaults("bccd", 0, times=2)]
    rows += [row for choose in (chosen_of_peer, chosen_of_ours) for row in choose("bccd", 0, times=2)]
    rows += [own(name, seed, equal_epochs=True) for name, seed in pairs]
    rows += [own("bccd", 0, times=2, equal_epochs=True)]
    return [row for position, row in enumerate(rows) if row not in rows[:position]]


def peer_defaults(name: str, seed: int, times: int = 1) -> dict[str, Any]:
    """The peer as it comes; `times` as long as the others."""
    epochs = times * PEER_EPOCHS[name]
    return {"system": "yolov8n", "recipe": "defaults", "dataset": name, "seed": seed, "epochs": epochs}


def peer_tuned(name: str, seed: int, rate: float, times: int = 1) -> dict[str, Any]:
    """The peer with a recipe for short runs."""
    return {**peer_defaults(name, seed, times), "recipe": "tuned", "learning_rate": rate}


def own(name: str, seed: int, times: int = 1, equal_epochs: bool = False) -> dict[str, Any]:
    """This repository's default recipe, for as long as the peer takes or, with `equal_epochs`, for as many epochs."""
    epochs = times * (PEER_EPOCHS if equal_epochs else OWN_EPOCHS)[name]
    return {"system": "nasline t", "recipe": "defaults", "dataset": name, "seed": seed, "epochs": epochs}


def own_tuned(name: str, seed: int, rate: float, times: int = 1) -> dict[str, Any]:
    """This repository's recipe at a peak learning rate."""
    row = own(name, seed, times)
    return row if rate == OWN_DEFAULT_RATE else {**row, "recipe": "tuned", "learning_rate": rate}


def tried_by_peer(name: str) -> list[dict[str, Any]]:
    """The tries of which the peer's learning rate on a set is chosen."""
    return [peer_tuned(name, SEEDS[name][0], rate) for rate in LEARNING_RATES["yolov8n"]]


def tried_by_us(name: str) -> list[dict[str, Any]]:
    """As many tries of this repository's recipe."""
    return [own_tuned(name, SEEDS[name][0], rate) for rate in LEARNING_RATES["nasline t"]]


def chosen_of_peer(name: str, seed: int, times: int = 1) -> list[dict[str, Any]]:
    """The tuned peer at the rate chosen on a set; empty while a try is missing."""
    best = _best(tried_by_peer(name))
    return [peer_tuned(name, seed, best["learning_rate"], times)] if best else []


def chosen_of_ours(name: str, seed: int, times: int = 1) -> list[dict[str, Any]]:
    """The same of ours."""
    best = _best(tried_by_us(name))
    return [own_tuned(name, seed, best.get("learning_rate", OWN_DEFAULT_RATE), times)] if best else []


def _best(tried: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The try with the highest mAP50-95 on the validation images; None while one is missing."""
    rows = _finished(tried)
    if len(rows) < len(tried):
        return None
    best: dict[str, Any] = max(rows, key=lambda row: float(row["figures"]["validation_map50_95"]))["configuration"]
    return best


def run(peer: Path, only: str | None, dataset: str | None) -> None:
    """Train the missing rows, one after the other."""
    while wanted := _wanted(only, dataset):
        configuration = wanted[0]
        print("training", json.dumps(configuration), flush=True)
        train = train_peer if configuration["system"] == "yolov8n" else train_own
        figures = train(configuration, peer)
        ROWS.add(configuration, figures)
        print(json.dumps({name: figures[name] for name in ("cpu_minutes", "map50_95", "map50")}), flush=True)


def _wanted(only: str | None, dataset: str | None) -> list[dict[str, Any]]:
    rows = ROWS.missing(configurations())
    return [
        row for row in rows if row["system"].startswith(only or "") and dataset in (None, row["dataset"])
    ]  # fmt: skip


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
    recipe["learning_rate"] = configuration.get("learning_rate", OWN_DEFAULT_RATE)
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
    """The rows as Markdown, each of the peer's with what ours of the same kind has more (paired bootstrap interval)."""
    lines = [
        "| set | system | recipe | epochs | CPU min | seeds | mAP50-95 (mean, range) | mAP50 | ours minus it, points |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, times in [*((name, 1) for name in SETS), ("bccd", 2)]:
        found = _groups(name, times)
        if found["tuned"] == found["defaults"]:  # the default rate was the best of the three
            shown = {kind: rows for kind, rows in found.items() if kind != "tuned"}
        else:
            shown = found
        against = {"peer defaults": found["defaults"], "peer tuned": found["tuned"]}
        lines += [_line(rows, against.get(kind, [])) for kind, rows in shown.items() if rows]
    return "\n".join([*lines, "", *_means()])


def _groups(name: str, times: int) -> dict[str, list[dict[str, Any]]]:
    """The finished rows of each kind on a set."""
    seeds = SEEDS[name]
    kinds = {
        "defaults": [own(name, seed, times) for seed in seeds],
        "tuned": [row for seed in seeds for row in chosen_of_ours(name, seed, times)],
        "equal epochs": [own(name, seed, times, equal_epochs=True) for seed in seeds],
        "peer defaults": [peer_defaults(name, seed, times) for seed in seeds],
        "peer tuned": [row for seed in seeds for row in chosen_of_peer(name, seed, times)],
    }
    return {kind: _finished(rows) for kind, rows in kinds.items()}


def _finished(configurations: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row for row in map(ROWS.find, configurations) if row is not None]


def _means() -> list[str]:
    """Mean over the sets of the difference to each recipe of the peer, where every set has it."""
    lines = []
    for ours, theirs, what in (
        ("defaults", "peer defaults", "defaults on both sides, equal CPU time"),
        ("tuned", "peer tuned", "tuned on both sides, equal CPU time and as many tries"),
        ("defaults", "peer tuned", "our defaults against the tuned peer, equal CPU time"),
        ("equal epochs", "peer tuned", "our defaults against the tuned peer, equal epochs"),
    ):
        found = [_groups(name, 1) for name in SETS]
        pairs = [(groups[ours], groups[theirs]) for groups in found]
        if all(mine and other for mine, other in pairs):
            lines.append(f"- {what}: {_over_sets(pairs)} points")
    return ["Mean of the sets, ours minus YOLOv8n:", "", *lines] if lines else []


def _line(rows: list[dict[str, Any]], ours: list[dict[str, Any]]) -> str:
    chosen, figures = rows[0]["configuration"], [row["figures"] for row in rows]
    values = [one["map50_95"] for one in figures]
    spread = f"{np.mean(values):.3f}" + (f" ({min(values):.3f} to {max(values):.3f})" if len(values) > 1 else "")
    rate = chosen.get("learning_rate")
    recipe = chosen["recipe"] + (f", lr {rate:g}" if rate else "")
    minutes, half = np.mean([one["cpu_minutes"] for one in figures]), np.mean([one["map50"] for one in figures])
    what = f"{chosen['dataset']} | {chosen['system']} | {recipe} | {chosen['epochs']} | {minutes:.1f} | {len(rows)}"
    return f"| {what} | {spread} | {half:.3f} | {_over_sets([(ours, rows)]) if ours else ''} |"


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
    running.add_argument("--dataset", choices=SETS, help="one set: two processes may each train the rows of one")
    commands.add_parser("table", help="print the table")
    arguments = parser.parse_args()
    if arguments.command == "run":
        run(arguments.peer, arguments.only, arguments.dataset)
    else:
        print(table())


if __name__ == "__main__":
    main()
