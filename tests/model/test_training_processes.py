"""Two processes, each with half of every batch, train as one process with whole batches does.

Run as a program this file is one of the two: ``test_training_processes.py STATE_DIRECTORY``, with torchrun's
environment variables.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, distributed, nn

from model.training import TrainingConfig, train


class Shares:
    """Three batches of four pictures an epoch; a process gets every ``count``-th picture."""

    batches_per_epoch = 3

    def __init__(self, rank: int, count: int) -> None:
        self.rank, self.count = rank, count

    def epoch(self, epoch: int, start_batch: int = 0, mosaic_enabled: bool = True) -> Iterator[Any]:
        from model.data.loader import Batch
        from model.loss import Targets

        for batch in range(start_batch, self.batches_per_epoch):
            random = np.random.default_rng([epoch, batch])
            images = torch.from_numpy(random.integers(0, 256, (4, 3, 8, 8), dtype=np.uint8))
            mine = images[self.rank :: self.count]
            count = len(mine)
            mask = torch.ones(count, 1, dtype=torch.bool)
            targets = Targets(torch.zeros(count, 1, 4), torch.zeros(count, 1).long(), torch.ones(count, 1), mask)
            yield Batch(mine, targets, np.arange(count))


def run(directory: Path, rank: int, count: int) -> tuple[Any, list[dict[str, Any]]]:
    def compute_loss(
        network: nn.Module, images: Tensor, targets: Any, progress: float
    ) -> tuple[Tensor, dict[str, Tensor]]:
        return (network(images) - images.mean()).square().mean(), {}

    rows: list[dict[str, Any]] = []
    torch.manual_seed(rank)  # the processes start from different weights: the first one's count
    network = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 1, 1))
    if rank == 0:
        torch.manual_seed(0)
    config = TrainingConfig(epochs=2, batch_size=4, learning_rate=1e-2, warmup_steps=1, gradient_clip_norm=0.1)
    result = train(
        *(network, Shares(rank, count), compute_loss, config, directory),
        evaluate=lambda average: {"map50_95": float(average.state_dict()["0.weight"].std())},
        on_epoch_end=rows.append,
    )
    return result, rows


@pytest.mark.slow
def test_two_processes_equal_one(repository: Path, tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {**os.environ, "PYTHONPATH": str(repository), "OMP_NUM_THREADS": "1"}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    command = [sys.executable, __file__, str(tmp_path / "two")]
    both = [subprocess.Popen(command, env={**environment, "RANK": rank}, stdout=subprocess.PIPE) for rank in "01"]
    answers = [json.loads(process.communicate(timeout=120)[0]) for process in both]
    result, rows = run(tmp_path / "one", 0, 1)
    assert [answer["rows"] for answer in answers] == [len(rows), 0]  # the first one alone tells
    for answer in answers:
        assert answer["metric"] == pytest.approx(result.best_metric, rel=1e-5)  # order of float32 sums
        assert answer["weight"] == pytest.approx(result.best_model_state["2.weight"].flatten().tolist(), rel=1e-3)


if __name__ == "__main__":
    distributed.init_process_group("gloo")
    outcome, told = run(Path(sys.argv[1]), distributed.get_rank(), 2)
    weight = outcome.best_model_state["2.weight"].flatten().tolist()
    print(json.dumps({"rows": len(told), "metric": outcome.best_metric, "weight": weight}))
    distributed.destroy_process_group()
