"""Why the block matters: plain RepVGG against QARepVGG blocks, quantized in the same ways.

    python benchmarks/repvgg_table.py run [--blocks BLOCKS] [--seed N] [--trial]
    python benchmarks/repvgg_table.py table [--trial]

pico at 224 pixels on bccd, trained from recipe and seed (quantized_networks.py) with either block, and the second with
one bottleneck made hard to quantize (model/quantization/uneven_channels.py), then quantized by the pipeline's step and
run as an OpenVINO engine on the whole test split. Finished rows are kept in results/repvgg_table.json. ``--trial`` does
all of it in a few minutes on networks that have learned nothing, to see that it works; its rows go to the cache.

Columns: float; ptq with the largest magnitude as range, ptq with the default observer; selective, at most 0.3 points of
validation mAP lost where the search can; qat; all, what the step does by itself (training where selection cannot keep
the budget, and a second search where training cannot either).
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import photo_sets
from benchmarks.quantization_accuracy import METHODS, changed
from benchmarks.quantized_networks import (
    CACHE,
    HOSTILE,
    FloatNetwork,
    engine_figures,
    float_network,
    quantized,
    quiet_logs,
    trained,
)
from benchmarks.rows import Rows

NAME = "repvgg_table"
BLOCKS = ("repvgg", "qarepvgg", HOSTILE)
NETWORKS = [FloatNetwork("bccd", seed=seed, blocks=blocks) for seed in (0, 1) for blocks in BLOCKS]
TRIAL = [FloatNetwork("bccd", blocks=blocks, image_size=64, epochs=1) for blocks in BLOCKS]
COLUMNS: dict[str, dict[str, Any]] = {
    "ptq, largest magnitude": {**METHODS["ptq"], "observer": "max"},
    "ptq": METHODS["ptq"],
    "selective": METHODS["selective"],
    "qat": METHODS["qat"],
    "all": {"qat": "auto"},
}


def rows_of(trial: bool) -> Rows:
    """Where finished rows are kept."""
    return Rows(NAME, CACHE / "trial") if trial else Rows(NAME)


def configuration(network: FloatNetwork, column: str) -> dict[str, Any]:
    """What a row is found by."""
    return {"blocks": network.blocks, "seed": network.seed, "image_size": network.image_size, "method": column}


def run(networks: Sequence[FloatNetwork], trial: bool) -> None:
    """Make the missing rows, network by network."""
    rows = rows_of(trial)
    for network in networks:
        for missing in rows.missing([configuration(network, column) for column in ("float", *COLUMNS)]):
            print("running", missing, flush=True)
            figures = row_figures(network, missing["method"], trial)
            rows.add(missing, figures)
            print({name: value for name, value in figures.items() if name != "resampled_map50_95"}, flush=True)


def row_figures(network: FloatNetwork, column: str, trial: bool) -> dict[str, Any]:
    """One engine on the test split, and how it came about."""
    checkpoint, minutes = trained(network)
    photos = photo_sets.load(network.dataset)
    if column == "float":
        folded = float_network(checkpoint)
        figures = engine_figures(folded, photos, network.image_size)
        return {**figures, "recipe": network.recipe, "cpu_minutes": round(minutes, 2), **weight_spread(folded)}
    began = time.process_time()
    with quantized(network, checkpoint, changed(COLUMNS[column], trial)) as (found, report):
        minutes = (time.process_time() - began) / 60
        figures = engine_figures(found, photos, network.image_size)
    report["layers_in_float"] = [row["layer"] for row in report["layers_in_float"] if row["chosen_by"] == "search"]
    return {**figures, "quantization": report, "cpu_minutes": round(minutes, 2)}


def weight_spread(folded: torch.nn.Module) -> dict[str, float]:
    """How uneven the folded kernels are: the largest weight over the standard deviation, mean over the blocks."""
    kernels = [module.weight for name, module in folded.named_modules() if name.endswith("rbr_reparam")]
    ratios = [float(kernel.detach().abs().max() / kernel.detach().std()) for kernel in kernels]
    return {"largest_weight_over_deviation": round(sum(ratios) / len(ratios), 1)}


def table(networks: Sequence[FloatNetwork], trial: bool) -> str:
    """Rows as Markdown: mAP50-95 in float, and the points lost in each way, mean over seeds."""
    rows = rows_of(trial)
    lines = ["| blocks | seeds | float mAP50-95 | " + " | ".join(COLUMNS) + " |", "|---" * (3 + len(COLUMNS)) + "|"]
    for blocks in dict.fromkeys(network.blocks for network in networks):
        members = [network for network in networks if network.blocks == blocks]
        floats = {n.seed: row["figures"] for n in members if (row := rows.find(configuration(n, "float")))}
        cells = [_cell(rows, members, column) for column in COLUMNS]
        mean = f"{np.mean([figures['map50_95'] for figures in floats.values()]):.3f}" if floats else "not run"
        lines.append(f"| {blocks} | {len(floats)} | {mean} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(rows: Rows, networks: Sequence[FloatNetwork], column: str) -> str:
    lost, in_float = [], []
    for network in networks:
        plain, int8 = (rows.find(configuration(network, name)) for name in ("float", column))
        if plain and int8:
            lost.append(100 * (plain["figures"]["map50_95"] - int8["figures"]["map50_95"]))
            in_float.append(len(int8["figures"]["quantization"]["layers_in_float"]))
    if not lost:
        return "not run"
    added = f"; {'/'.join(map(str, in_float))} layers in float" if any(in_float) else ""
    return f"{np.mean(lost):+.2f} ({', '.join(f'{value:+.2f}' for value in lost)}){added}"


def main() -> None:
    """Run or print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=("run", "table"))
    parser.add_argument("--blocks", choices=BLOCKS)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--trial", action="store_true")
    arguments = parser.parse_args()
    quiet_logs()
    torch.set_num_threads(1)
    networks = TRIAL if arguments.trial else NETWORKS
    chosen = [
        network
        for network in networks
        if arguments.blocks in (None, network.blocks) and arguments.seed in (None, network.seed)
    ]
    if arguments.command == "run":
        run(chosen, arguments.trial)
    print(table(chosen, arguments.trial))


if __name__ == "__main__":
    main()
