"""A training that is killed takes its loader processes along."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

TRAINING = """
import time
import numpy as np
from model.data.augmentation import AugmentationConfig
from model.data.image_set import ImageSet
from model.data.loader import TrainingLoader
from model.preprocessing import Preprocessing

paths, none = [f"{index}.jpg" for index in range(64)], np.zeros(0, np.int64)
images = ImageSet.from_arrays(("a",), paths, [(80, 80)] * 64, none, np.zeros((0, 4)), none)
black = lambda path: np.zeros((80, 80, 3), np.uint8)
loader = TrainingLoader(images, black, Preprocessing(64), 16, AugmentationConfig(), 0, workers=2)
next(loader.epoch(0))
time.sleep(1)  # until the workers stand at the next batches, each larger than a pipe
print("ready", flush=True)
time.sleep(600)
"""


def children(pid: int) -> list[int]:
    listed = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(child) for child in listed.read_text().split()]


def is_running(pid: int) -> bool:
    """A zombie is dead."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.slow
def test_no_loader_process_outlives_a_killed_training(repository: Path) -> None:
    """Left behind, they would wait for ever for somebody to read their batch, and hold the locks they inherited."""
    training = subprocess.Popen([sys.executable, "-c", TRAINING], cwd=repository, stdout=subprocess.PIPE, text=True)
    assert training.stdout is not None and training.stdout.readline() == "ready\n"
    workers = children(training.pid)
    assert len(workers) == 2
    training.kill()
    training.wait()
    training.stdout.close()
    deadline = time.monotonic() + 20
    while any(map(is_running, workers)):
        assert time.monotonic() < deadline, "a loader process lives on"
        time.sleep(0.05)
