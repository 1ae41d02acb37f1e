"""What each stage of the pipeline brings: pretraining, pseudo-labels, distillation, alone and together.

    python benchmarks/stages.py run [--scenario full|half] [--only ROW] [--seed N] [--dataset SET]
    python benchmarks/stages.py table

Every row is a run of the pipeline's own steps (start to distill) with one parameter changed; steps that rows share
are done once. Finished rows are kept in results/stages.json. Two questions, two halves of the table:

- full: all labels of the training split. Does a teacher help a student that learns the same images for as many
  epochs, and does it still help when the student alone gets the teacher's training time as well? The teacher learned
  with the same seed as its student.
- half: every second training image keeps its labels, the others count as unlabelled. What do pretraining,
  pseudo-labels in their two orders, distillation, and all of it bring? An epoch with pseudo-labels has twice as many
  images; so labels alone also stand there with twice the epochs.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import photo_sets
from benchmarks.own_training import find
from benchmarks.rows import Rows
from model.checkpoint import load_checkpoint
from pipeline_tasks.__main__ import main as nasline
from pipeline_tasks.digests import of_json

ROWS = Rows("stages")
SETS = ("bccd", "aquarium")
SEEDS = (0, 1, 2)
IMAGE_SIZE = 224
EPOCHS = {"bccd": 16, "aquarium": 24}
TEACHER_EPOCHS = {"bccd": 40, "aquarium": 40}
PRETRAIN_EPOCHS = 16
WORKSPACE = photo_sets.CACHE / "stages" / "workspace"
COMMON: dict[str, Any] = {"batch_size": 8, "learning_rate": 0.003, "weight_decay": 0.001, "ema_decay": 0.998}
WITHOUT_TEACHER = {"class_logits_weight": 0.0, "box_distribution_weight": 0.0}

# name: (half or full, what differs from labels alone)
FULL: dict[str, dict[str, Any]] = {
    "labels": WITHOUT_TEACHER,
    "labels + teacher": {},
    "labels + teacher, features too (PKD)": {"feature_weight": 1.0, "feature_kind": "pkd"},
    "labels + teacher, features too (CWD)": {"feature_weight": 1.0, "feature_kind": "cwd"},
    "labels, for the teacher's time too": {**WITHOUT_TEACHER, "longer": True},
}
HALF: dict[str, dict[str, Any]] = {
    "labels": WITHOUT_TEACHER,
    "labels, twice the epochs": {**WITHOUT_TEACHER, "twice": True},  # as many steps as with pseudo-labels
    "+ pretraining": {**WITHOUT_TEACHER, "pretraining": True},
    "+ pseudo-labels, mixed": {**WITHOUT_TEACHER, "pseudo_labels": True},
    "+ pseudo-labels, first": {**WITHOUT_TEACHER, "pseudo_labels": True, "pseudo_order": "first"},
    "+ teacher": {},
    "all": {"pretraining": True, "pseudo_labels": True},
}
SCENARIOS = {"full": FULL, "half": HALF}
FIRST = ("labels", "labels + teacher")


def configurations() -> list[dict[str, Any]]:
    """Every row, the most telling first: does a teacher help, over all seeds; then each other row, seed by seed."""
    rows = [("full", row, seed) for seed in SEEDS for row in FIRST]
    rows += [(scenario, row, seed) for seed in SEEDS for scenario, names in SCENARIOS.items() for row in names]
    return [
        {"scenario": scenario, "row": row, "dataset": name, "seed": seed}
        for scenario, row, seed in dict.fromkeys(rows)
        for name in SETS
    ]


def run(chosen: dict[str, Any]) -> None:
    """Make the missing rows; `chosen`: of a configuration what must be so, None where anything may."""
    torch.set_num_threads(1)
    for configuration in ROWS.missing(configurations()):
        if all(value in (None, configuration[name]) for name, value in chosen.items()):
            print("running", json.dumps(configuration), flush=True)
            figures = run_row(configuration)
            ROWS.add(configuration, figures)
            print(json.dumps({name: figures[name] for name in ("map50_95", "cpu_minutes")}), flush=True)


def run_row(configuration: dict[str, Any]) -> dict[str, Any]:
    """One run of the pipeline up to its student, and the student's figures on the test split."""
    parameters = _parameters(configuration)
    run_name = of_json(configuration)[:12]
    seconds = _run_steps(parameters, run_name)
    steps = json.loads((WORKSPACE / "runs" / run_name / "run.json").read_text())["steps"]
    student, _ = load_checkpoint(WORKSPACE / "steps" / "distill" / steps["distill"] / "checkpoint")
    photos, size = photo_sets.load(configuration["dataset"]), parameters["start"]["image_size"]
    test = photo_sets.figures(find(student, photos.test, photos.open_image, size), photos.test)
    validation = photo_sets.figures(find(student, photos.validation, photos.open_image, size), photos.validation)
    manifests = {name: _manifest(name, key) for name, key in steps.items() if name in ("teach", "pseudo_label")}
    return {
        "validation_map50_95": validation["map50_95"],
        **test,
        "cpu_minutes": {name: round(value / 60, 2) for name, value in seconds.items()},
        "teacher_validation_map50_95": manifests["teach"].get("map50_95"),
        "pseudo_labels": manifests.get("pseudo_label", {}),
    }


def _manifest(step: str, key: str) -> dict[str, Any]:
    path = WORKSPACE / "steps" / step / key / "manifest.json"
    summary: dict[str, Any] = json.loads(path.read_text())["summary"]
    return summary


def _parameters(configuration: dict[str, Any]) -> dict[str, Any]:
    scenario, name = configuration["scenario"], configuration["dataset"]
    changes = dict(SCENARIOS[scenario][configuration["row"]])
    pretraining, pseudo_labels = changes.pop("pretraining", False), changes.pop("pseudo_labels", False)
    epochs = EPOCHS[name] * (_longer(configuration) if changes.pop("longer", False) else 1)
    epochs *= 2 if changes.pop("twice", False) else 1
    labelled, unlabelled = _folders(name, scenario)
    start = {
        "dataset": str(labelled), "student_variant": "pico", "teacher_variant": "t", "image_size": IMAGE_SIZE,
        "precision": "bfloat16", "threads": 1, "seed": configuration["seed"], "experiment": "stages",
    }  # fmt: skip
    if pretraining:
        start["pretrain_dataset"] = str(photo_sets.shared_data() / "pretrain_general")
    if pseudo_labels:
        start["unlabeled_dataset"] = str(unlabelled)
    return {
        "start": start,
        "validate_data": {"allow_links": scenario == "half"},  # its folders share the pictures
        "pretrain": {**COMMON, "epochs": PRETRAIN_EPOCHS, "evaluate_every_epochs": PRETRAIN_EPOCHS},
        "teach": {**COMMON, "epochs": TEACHER_EPOCHS[name], "evaluate_every_epochs": 5},
        "distill": {**COMMON, "epochs": round(epochs), "evaluate_every_epochs": 4, **changes},
    }


def _longer(configuration: dict[str, Any]) -> float:
    """How many times the epochs of "labels" fill the time of "labels + teacher" and of the teacher's own training."""
    row = ROWS.find({**configuration, "row": "labels + teacher"})
    base = ROWS.find({**configuration, "row": "labels"})
    if row is None or base is None:
        raise SystemExit("the rows 'labels' and 'labels + teacher' of this seed must be there first")
    whole = row["figures"]["cpu_minutes"]
    return float((whole["distill"] + whole["teach"]) / base["figures"]["cpu_minutes"]["distill"])


def _folders(name: str, scenario: str) -> tuple[Path, Path]:
    """The labelled folder of a scenario, and the training images that it leaves unlabelled."""
    source, folder = photo_sets.shared_data() / name, photo_sets.CACHE / "stages" / "half" / name
    if scenario == "full":
        return source, folder / "unlabelled"
    if not (folder / "unlabelled" / "images.json").exists():
        _halve(source, folder)
    return folder / "labelled", folder / "unlabelled"


def _halve(source: Path, folder: Path) -> None:
    """Every second training image, in order of the file names, keeps its labels."""
    for kind in ("labelled", "unlabelled"):
        (folder / kind / "annotations").mkdir(parents=True, exist_ok=True)
        (folder / kind / "images").unlink(missing_ok=True)
        (folder / kind / "images").symlink_to(source / "images")
    for split in ("val", "test"):
        annotations = source / "annotations" / f"instances_{split}.json"
        (folder / "labelled" / "annotations" / annotations.name).write_bytes(annotations.read_bytes())
    train = json.loads((source / "annotations" / "instances_train.json").read_text())
    images = sorted(train["images"], key=lambda image: str(image["file_name"]))
    kept = {image["id"] for image in images[::2]}
    labelled = {**train, "images": [image for image in images if image["id"] in kept]}
    labelled["annotations"] = [box for box in train["annotations"] if box["image_id"] in kept]
    (folder / "labelled" / "annotations" / "instances_train.json").write_text(json.dumps(labelled))
    rest = {**train, "images": [image for image in images if image["id"] not in kept], "annotations": []}
    (folder / "unlabelled" / "images.json").write_text(json.dumps(rest))


def _run_steps(parameters: dict[str, Any], run_name: str) -> dict[str, float]:
    """The pipeline's steps, typed; CPU seconds of each training, also where an earlier row did it."""
    WORKSPACE.mkdir(parents=True, exist_ok=True)
    os.environ["NASLINE_WORKSPACE"] = str(WORKSPACE)
    path = WORKSPACE.parent / f"{run_name}.yaml"
    path.write_text(yaml.safe_dump(parameters))
    if not (WORKSPACE / "runs" / run_name).exists():
        _nasline("start", "--run", run_name, "--params", str(path))
    commands: list[list[str]] = [["validate_data"], *(["pretrain", "--role", role] for role in ("student", "teacher"))]
    commands += [["teach"], ["pseudo_label", "--shard", "all"], ["pseudo_label", "--merge"], ["distill"]]
    seconds = {}
    for command in commands:
        began = time.process_time()
        _nasline(*command, "--run", run_name)
        seconds[" ".join(command)] = time.process_time() - began
    return _remembered(run_name, {name: seconds[name] for name in ("teach", "distill")} | {
        "pretrain": seconds["pretrain --role student"]
    })  # fmt: skip


def _remembered(run_name: str, seconds: dict[str, float]) -> dict[str, float]:
    """The longest time each step took under its key: later rows only look at what is finished."""
    folder = WORKSPACE.parent / "seconds"
    folder.mkdir(exist_ok=True)
    steps = json.loads((WORKSPACE / "runs" / run_name / "run.json").read_text())["steps"]
    for name, value in seconds.items():
        path = folder / (steps.get(name) or steps[f"{name}/student"])
        seconds[name] = max(float(path.read_text()) if path.exists() else 0.0, value)
        path.write_text(str(seconds[name]))
    return seconds


def _nasline(*words: str) -> None:
    code = nasline(list(words))
    if code:
        raise SystemExit(f"nasline {' '.join(words)} ended with exit code {code}")


def table() -> str:
    """Rows as Markdown; each against "labels" of its half, paired over seeds and resampled images."""
    lines = ["| half | row | " + " | ".join(f"{name}: mAP50-95 | gain, points (95 %)" for name in SETS) + " | both |"]
    lines += ["|---|---|" + "---|---|" * len(SETS) + "---|"]
    for scenario, rows in SCENARIOS.items():
        for row in rows:
            cells = [_cells(scenario, row, name) for name in SETS]
            lines.append(f"| {scenario} | {row} | " + " | ".join(cells) + f" | {_both(scenario, row)} |")
    return "\n".join(lines)


def _figures(scenario: str, row: str, name: str, seed: int) -> dict[str, Any] | None:
    found = ROWS.find({"scenario": scenario, "row": row, "dataset": name, "seed": seed})
    return found["figures"] if found else None


def _pairs(scenario: str, row: str, name: str) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    pairs = [(_figures(scenario, row, name, seed), _figures(scenario, "labels", name, seed)) for seed in SEEDS]
    return [(ours, base) for ours, base in pairs if ours is not None and base is not None]


def _cells(scenario: str, row: str, name: str) -> str:
    pairs = _pairs(scenario, row, name)
    if not pairs:
        return "not run | "
    values = [ours["map50_95"] for ours, _ in pairs]
    spread = f" ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else ""
    mean = f"{np.mean(values):.3f}{spread} ({len(values)} seeds)"
    return f"{mean} | {'' if row == 'labels' else _gain([pairs])}"


def _both(scenario: str, row: str) -> str:
    groups = [_pairs(scenario, row, name) for name in SETS]
    return "" if row == "labels" or not all(groups) else _gain(groups)


def _gain(groups: list[list[tuple[dict[str, Any], dict[str, Any]]]]) -> str:
    """Mean gain over sets and seeds; the interval resamples seeds and images together."""
    random = np.random.default_rng(0)
    mean = 100 * np.mean([np.mean([ours["map50_95"] - base["map50_95"] for ours, base in pairs]) for pairs in groups])
    draws = []
    for resample in range(photo_sets.RESAMPLES):
        sets = []
        for pairs in groups:
            chosen = [pairs[i] for i in random.integers(0, len(pairs), len(pairs))]
            gains = [
                ours["resampled_map50_95"][resample] - base["resampled_map50_95"][resample] for ours, base in chosen
            ]
            sets.append(np.mean(gains))
        draws.append(100 * np.mean(sets))
    low, high = np.percentile(draws, [2.5, 97.5])
    return f"{mean:+.1f} ({low:+.1f} to {high:+.1f})"


def main() -> None:
    """Make missing rows, or print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    running = commands.add_parser("run", help="make the missing rows")
    running.add_argument("--scenario", choices=SCENARIOS, help="one half of the table")
    running.add_argument("--only", dest="row", help="name of one row")
    running.add_argument("--seed", type=int)
    running.add_argument("--dataset", choices=SETS, help="one set: two processes may each make the rows of one")
    commands.add_parser("table", help="print the table")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if arguments.command == "run":
        run({name: getattr(arguments, name) for name in ("scenario", "row", "seed", "dataset")})
    else:
        print(table())


if __name__ == "__main__":
    main()
