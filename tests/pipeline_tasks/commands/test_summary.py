"""`nasline summary`: the printed table."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import model
from model.checkpoint import CheckpointMetadata, save_checkpoint
from model.preprocessing import Preprocessing

Nasline = Callable[..., str]


def test_the_table_of_a_variant(nasline: Nasline) -> None:
    lines = nasline("summary", "--variant", "s", "--size", 320, code=0).splitlines()
    assert lines[0] == "YOLO-NAS s, 80 classes, 320x320"
    (stem,) = (line.split() for line in lines if line.startswith("backbone.stem.conv "))
    assert stem == ["backbone.stem.conv", "QARepVGG", "3x3/2", "48x160x160", "1,680", "36.86", "1,344", "33.18"]
    (total,) = (line.split() for line in lines if line.startswith("total "))
    assert total[1:] == ["100", "convolutions", "12,878,304", "4,234.75", "12,167,580", "3,974.66"]
    assert lines[-1].startswith("training form 4.235 GMACs, deploy form 3.975 GMACs; 20 shortcut scalars")


def test_a_checkpoint_tells_variant_classes_and_size(nasline: Nasline, tmp_path: Path) -> None:
    metadata = CheckpointMetadata("pico", ("cat", "dog"), Preprocessing(96), 0)
    save_checkpoint(tmp_path / "checkpoint", model.build("pico", 2), metadata)
    assert nasline("summary", "--checkpoint", "checkpoint", code=0).startswith("YOLO-NAS pico, 2 classes, 96x96")
    sentence = nasline("summary", "--checkpoint", "checkpoint", "--variant", "s", code=65)
    assert "--variant s: checkpoint has pico; leave the option out" in sentence


def test_without_a_network_there_is_nothing_to_sum_up(nasline: Nasline) -> None:
    assert "give --variant, or --checkpoint" in nasline("summary", code=2)
