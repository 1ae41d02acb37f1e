"""What INT8 costs in accuracy: PTQ, selective quantization, quantization-aware training, against the float engine.

    python benchmarks/quantization_accuracy.py run [--only DATASET] [--variant V] [--seed N] [--trial]
    python benchmarks/quantization_accuracy.py table [--trial]

Float networks are trained from recipe and seed (quantized_networks.py): pico at 224 pixels on bccd (three seeds),
aquarium and playing_cards, and one n and one s on bccd. Each is quantized by the pipeline's step, with its choices on
training and validation images, and run as an OpenVINO engine on the whole test split. Finished rows are kept in
results/quantization_accuracy.json. ``--trial`` does all of it in a minute or two on a network that has learned nothing,
to see that it works; its rows go to the cache.

Rows of a network: float; ptq, all that may be in INT8 is; selective, PTQ or, where that loses more than 0.3 points on
validation images, with the layers in float that the search asks for; qat, the better of PTQ and quantization-aware
training from it, on validation images.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import photo_sets
from benchmarks.quantized_networks import (
    CACHE,
    QUANTIZE,
    TRAINING,
    FloatNetwork,
    engine_figures,
    float_network,
    quantized,
    quiet_logs,
    trained,
)
from benchmarks.rows import Rows

NAME = "quantization_accuracy"
NETWORKS = [
    *(FloatNetwork("bccd", seed=seed) for seed in (0, 1, 2)),
    *(FloatNetwork(name) for name in ("aquarium", "playing_cards")),
    *(FloatNetwork("bccd", variant) for variant in ("n", "s")),
]
TRIAL = [FloatNetwork("bccd", image_size=64, epochs=1)]
METHODS: dict[str, dict[str, Any]] = {
    "ptq": {"qat": "never", "selection_evaluations": 0},
    "selective": {"qat": "never"},
    "qat": {"qat": "always", "selection_evaluations": 0},
}
TRIAL_CHANGES: dict[str, Any] = {
    "calibration_images": 8, "sensitivity_images": 4, "selection_evaluations": 3, "profile_rounds": 2,
    "training": {"epochs": 1},
}  # fmt: skip


def rows_of(trial: bool) -> Rows:
    """Where finished rows are kept."""
    return Rows(NAME, CACHE / "trial") if trial else Rows(NAME)


def configuration(network: FloatNetwork, method: str) -> dict[str, Any]:
    """What a row is found by."""
    named = {name: value for name, value in asdict(network).items() if name not in ("blocks", "epochs")}
    return {**named, "method": method}


def run(networks: Sequence[FloatNetwork], trial: bool) -> None:
    """Make the missing rows, network by network."""
    rows = rows_of(trial)
    for network in networks:
        wanted = [configuration(network, method) for method in ("float", *METHODS)]
        for missing in rows.missing(wanted):
            print("running", missing, flush=True)
            figures = row_figures(network, missing["method"], trial)
            rows.add(missing, figures)
            print({name: value for name, value in figures.items() if name != "resampled_map50_95"}, flush=True)


def row_figures(network: FloatNetwork, method: str, trial: bool) -> dict[str, Any]:
    """One engine on the test split, and how it came about."""
    checkpoint, minutes = trained(network)
    photos = photo_sets.load(network.dataset)
    if method == "float":
        figures = engine_figures(float_network(checkpoint), photos, network.image_size)
        return {**figures, "recipe": network.recipe, "cpu_minutes": round(minutes, 2)}
    given = changed({**METHODS[method]}, trial)
    began = time.process_time()
    with quantized(network, checkpoint, given) as (found, report):
        minutes = (time.process_time() - began) / 60
        figures = engine_figures(found, photos, network.image_size)
    report["layers_in_float"] = [row["layer"] for row in report["layers_in_float"] if row["chosen_by"] == "search"]
    settings = {**QUANTIZE, **given, "training": TRAINING} if method == "qat" else {**QUANTIZE, **given}
    return {**figures, "quantization": report, "settings": settings, "cpu_minutes": round(minutes, 2)}


def changed(given: dict[str, Any], trial: bool) -> dict[str, Any]:
    """The parameters of a method; in a trial those that take long are made small."""
    if not trial:
        return given
    kept = {name: value for name, value in given.items() if name in TRIAL_CHANGES and not value}
    return {**given, **TRIAL_CHANGES, **kept}


def table(networks: Sequence[FloatNetwork], trial: bool) -> str:
    """Rows as Markdown: points lost against the float engine, with paired-bootstrap intervals."""
    rows = rows_of(trial)
    lines = [
        "| set | network | seeds | float mAP50-95 | " + " | ".join(METHODS) + " |",
        "|---" * (4 + len(METHODS)) + "|",
    ]
    groups = dict.fromkeys((network.dataset, network.variant, network.image_size) for network in networks)
    lost: dict[str, list[float]] = {method: [] for method in METHODS}
    for dataset, variant, size in groups:
        members = [n for n in networks if (n.dataset, n.variant, n.image_size) == (dataset, variant, size)]
        floats = [row["figures"]["map50_95"] for n in members if (row := rows.find(configuration(n, "float")))]
        cells = []
        for method in METHODS:
            pairs = _pairs(rows, members, method)
            cells.append(_cell(pairs))
            if pairs and variant == "pico":
                lost[method].append(float(np.mean([_lost(pair) for pair in pairs])))
        mean = f"{np.mean(floats):.3f}" if floats else "not run"
        lines.append(f"| {dataset} | {variant}, {size} px | {len(floats)} | {mean} | " + " | ".join(cells) + " |")
    means = [f"{np.mean(values):+.2f}" if values else "not run" for values in lost.values()]
    lines.append("| mean of the sets, pico | | | | " + " | ".join(means) + " |")
    credited = [f"{np.mean([max(0.0, v) for v in values]):.2f}" if values else "not run" for values in lost.values()]
    lines.append("| the same, gains counted as 0 | | | | " + " | ".join(credited) + " |")
    return "\n".join(lines)


Pair = tuple[dict[str, Any], dict[str, Any]]


def _pairs(rows: Rows, networks: Sequence[FloatNetwork], method: str) -> list[Pair]:
    """Figures of the float and the quantized engine of each network that has both."""
    found = [(rows.find(configuration(n, "float")), rows.find(configuration(n, method))) for n in networks]
    return [(first["figures"], second["figures"]) for first, second in found if first and second]


def _lost(pair: Pair) -> float:
    return 100 * float(pair[0]["map50_95"] - pair[1]["map50_95"])


def _cell(pairs: Sequence[Pair]) -> str:
    """Mean points lost over the seeds; the interval resamples seeds and images together."""
    if not pairs:
        return "not run"
    random = np.random.default_rng(0)
    draws = []
    for resample in range(photo_sets.RESAMPLES):
        chosen = [pairs[index] for index in random.integers(0, len(pairs), len(pairs))]
        draws.append(
            100 * np.mean([a["resampled_map50_95"][resample] - b["resampled_map50_95"][resample] for a, b in chosen])
        )
    low, high = np.percentile(draws, [2.5, 97.5])
    in_float = [len(b["quantization"]["layers_in_float"]) for _, b in pairs]
    added = f"; {'/'.join(map(str, in_float))} layers in float" if any(in_float) else ""
    return f"{np.mean([_lost(pair) for pair in pairs]):+.2f} [{low:+.2f}, {high:+.2f}]{added}"


def main() -> None:
    """Run or print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=("run", "table"))
    parser.add_argument("--only", help="one set")
    parser.add_argument("--variant")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--trial", action="store_true")
    arguments = parser.parse_args()
    quiet_logs()
    torch.set_num_threads(1)
    networks = TRIAL if arguments.trial else NETWORKS
    wanted = {"dataset": arguments.only, "variant": arguments.variant, "seed": arguments.seed}
    chosen = [n for n in networks if all(value in (None, getattr(n, name)) for name, value in wanted.items())]
    if arguments.command == "run":
        run(chosen, arguments.trial)
    print(table(chosen, arguments.trial))


if __name__ == "__main__":
    main()
