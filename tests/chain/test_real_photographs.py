"""The chain on real photographs (blood cells), short: it must learn, and end in an engine that predicts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typed_chain import CHAIN, Terminal

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

SHORT = """
start: {student_variant: pico, teacher_variant: pico, image_size: 160, model_name: cells}
pretrain: &short {epochs: 1, batch_size: 8, learning_rate: 0.004, warmup_steps: 20, ema_decay: 0.98, mosaic: 0.0,
  evaluate_every_epochs: 5}
teach: {<<: *short, epochs: 14}
distill: {<<: *short, epochs: 10}
quantize: {calibration_images: 64, sensitivity_images: 16, qat: auto}
gate: {minimum_map: 0.1, maximum_map_drop: 3.0, latency_repeats: 50}
"""


def test_blood_cells_from_photographs_to_a_champion(shared: Path, tmp_path: Path) -> None:
    terminal = Terminal(tmp_path, shared / "data")
    (tmp_path / "params.yaml").write_text(SHORT)
    sets = {"dataset": "bccd", "pretrain_dataset": "pretrain_general", "unlabeled_dataset": "unlabeled_general"}
    options = [word for name, folder in sets.items() for word in (f"--start.{name}", str(shared / "data" / folder))]
    terminal.nasline("start", "--run", "cells", "--params", "params.yaml", *options)
    for command in CHAIN:
        terminal.nasline(*command, "--run", "cells")
    accuracy = json.loads((terminal.published("cells", "gate") / "accuracy.json").read_text())
    assert accuracy["int8"]["map50_95"] >= 0.1
    photo = next((shared / "data" / "bccd" / "images").iterdir())
    terminal.nasline("predict", "models:/cells@champion", str(photo), "--out", str(tmp_path / "out"))
    assert json.loads((tmp_path / "out" / "detections.json").read_text())[0]["image"] == str(photo)
