"""Killed or stopped anywhere, a resumed training equals the unbroken one bit for bit.

Run as a program this file is the training that the tests kill:
``test_training_resume.py STATE_DIRECTORY (kill|stop|go) STEP``.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

STOPPED = 75
STEPS = 12  # of 3 epochs


class Pictures:
    """Eight pictures with a bright square each, four batches of two an epoch, from (seed, epoch, batch) alone."""

    batches_per_epoch = 4

    def epoch(self, epoch: int, start_batch: int = 0, mosaic_enabled: bool = True) -> Any:
        from model.data.loader import Batch
        from model.loss import Targets

        for batch in range(start_batch, self.batches_per_epoch):
            random = np.random.default_rng([7, epoch, batch])
            images = random.integers(0, 100, (2, 3, 64, 64), dtype=np.uint8)
            left_top = random.integers(0, 40, (2, 1, 2))
            for image, (x, y) in zip(images, left_top[:, 0], strict=True):
                image[:, y : y + 20, x : x + 20] = 255
            boxes = torch.from_numpy(np.concatenate([left_top, left_top + 20], axis=2)).float()
            labels = torch.from_numpy(random.integers(0, 2, (2, 1)))
            targets = Targets(boxes, labels, torch.ones(2, 1), torch.ones(2, 1, dtype=torch.bool))
            yield Batch(torch.from_numpy(images), targets, np.arange(2))


def main(state_directory: str, ending: str, step: str) -> None:
    """Train pico with noise on its input, so that torch's random state matters; end at ``step`` as told."""
    import model
    from model.loss import DetectionLoss
    from model.training import Stopped, TrainingConfig, train

    detection_loss, steps = DetectionLoss(2), iter(range(1, 1000))

    def compute_loss(
        network: nn.Module, images: Tensor, targets: Any, progress: float
    ) -> tuple[Tensor, dict[str, Tensor]]:
        (boxes_xyxy, scores), raw = network(images + 0.1 * torch.randn_like(images))
        parts = detection_loss(raw, boxes_xyxy, scores, targets)
        return parts.total, {"classification": parts.classification, "iou": parts.iou}

    def should_stop() -> bool:
        reached = next(steps) == int(step)
        if reached and ending == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        return reached and ending == "stop"

    def evaluate(network: nn.Module) -> dict[str, float]:
        (boxes_xyxy, scores), _ = network(torch.full((1, 3, 64, 64), 0.5))
        return {"map50_95": float(scores.mean()), "size": float(boxes_xyxy.std())}

    torch.manual_seed(0)
    config = TrainingConfig(
        epochs=3, batch_size=2, learning_rate=1e-3, warmup_steps=2, ema_decay=0.9, checkpoint_every_steps=3, seed=1
    )
    try:
        train(
            *(model.build("pico", 2), Pictures(), compute_loss, config, Path(state_directory)),
            evaluate=evaluate,
            should_stop=should_stop,
        )
    except Stopped:
        sys.exit(STOPPED)


def start(repository: Path, directory: Path, ending: str = "go", step: int = 0) -> int:
    """Exit status of the training in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(repository), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, str(directory), ending, str(step)]
    return subprocess.run(command, env=environment, check=False, timeout=120).returncode


def content(directory: Path) -> tuple[dict[str, Tensor], dict[str, Tensor], str]:
    (state,) = directory.glob("state-*.safetensors")
    (best,) = directory.glob("best-*.safetensors")
    assert state.name == f"state-{STEPS:08d}.safetensors"
    return load_file(state), load_file(best), (directory / "metrics.jsonl").read_text()


def require_equal(directory: Path, unbroken: Path) -> None:
    state, best, metrics = content(directory)
    expected_state, expected_best, expected_metrics = content(unbroken)
    assert state.keys() == expected_state.keys() and best.keys() == expected_best.keys()
    assert any(name.startswith("optimizer.exp_avg_sq.") for name in state)
    different = [name for name in state if not torch.equal(state[name], expected_state[name])]
    different += [name for name in best if not torch.equal(best[name], expected_best[name])]
    assert different == []
    assert metrics == expected_metrics


@pytest.fixture(scope="module")
def unbroken(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("unbroken")
    assert start(repository, directory) == 0
    return directory


@pytest.mark.slow
def test_killed_twice_and_resumed_equals_unbroken(repository: Path, tmp_path: Path, unbroken: Path) -> None:
    # saves come after steps 3, 4 (end of an epoch), 6, 8 (end of an epoch), 9: the first kill is one step into
    # the second epoch, the next call goes on from step 4 and dies after step 10, one step after a save
    assert start(repository, tmp_path, "kill", 5) == -signal.SIGKILL
    assert start(repository, tmp_path, "kill", 6) == -signal.SIGKILL
    assert start(repository, tmp_path) == 0
    require_equal(tmp_path, unbroken)


@pytest.mark.slow
def test_stopped_and_resumed_equals_unbroken(repository: Path, tmp_path: Path, unbroken: Path) -> None:
    assert start(repository, tmp_path, "stop", 6) == STOPPED
    assert start(repository, tmp_path) == 0
    require_equal(tmp_path, unbroken)


@pytest.mark.slow
def test_a_half_written_save_is_ignored(repository: Path, tmp_path: Path, unbroken: Path) -> None:
    assert start(repository, tmp_path, "kill", 7) == -signal.SIGKILL
    (tmp_path / "state-00000009.safetensors.partial").write_bytes(b"torn")
    (tmp_path / "best-00000008.safetensors").write_bytes(b"a best that no state.json names")
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"epoch": 2, "torn')
    assert start(repository, tmp_path) == 0
    require_equal(tmp_path, unbroken)


if __name__ == "__main__":
    main(*sys.argv[1:])
