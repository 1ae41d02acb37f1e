"""Two processes that calibrate, judge and train together hold one quantized network, that of a process alone.

Run as a program this file is both of them: ``test_several_processes.py FOLDER`` forks them, so that torch is imported
once.
"""

from __future__ import annotations

import json
import multiprocessing
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

COUNT = 2
SIZE = 64
BATCHES = 3  # shares of two and one


def batches(rank: int, count: int) -> list[torch.Tensor]:
    random = np.random.default_rng(5)
    made = [torch.from_numpy(random.uniform(size=(2, 3, SIZE, SIZE)).astype(np.float32)) for _ in range(BATCHES)]
    return made[rank::count]


class Training:
    """Two batches of four pictures; a process gets every ``count``-th picture."""

    batches_per_epoch = 2

    def __init__(self, rank: int, count: int) -> None:
        self.rank, self.count = rank, count

    def epoch(self, epoch: int, start_batch: int = 0, mosaic_enabled: bool = True) -> Iterator[Any]:
        from model.data.loader import Batch
        from model.loss import Targets

        for batch in range(start_batch, self.batches_per_epoch):
            images = torch.from_numpy(np.random.default_rng(batch).integers(0, 256, (4, 3, SIZE, SIZE), np.uint8))
            boxes = torch.tensor([[8.0, 8, 40, 48]]).repeat(4, 1, 1)
            labels, whole = torch.tensor([[0], [1], [0], [1]]), torch.ones(4, 1)
            mine = slice(self.rank, None, self.count)
            targets = Targets(boxes[mine], labels[mine], whole[mine], whole[mine].bool())
            yield Batch(images[mine], targets, np.arange(4)[mine])


def quantized_and_trained(folder: Path, rank: int, count: int) -> dict[str, Any]:
    import model
    from model import processes
    from model.quantization.bias_correction import correct_biases
    from model.quantization.quantize import QuantizationConfig, calibration_digest, float_layers, quantize
    from model.quantization.sensitivity import layer_sensitivity
    from model.training import TrainingConfig, train
    from pipeline_tasks.training_task import detection_loss

    torch.manual_seed(1)
    network = model.build("pico", 2).eval().fuse()
    quantized = quantize(network, batches(rank, count), QuantizationConfig(observer="mse"))
    correct_biases(quantized, batches(rank, count))
    sensitivities = [layer.error for layer in layer_sensitivity(quantized, batches(rank, count))]
    before = calibration_digest(quantized)
    config = TrainingConfig(epochs=1, batch_size=4, learning_rate=1e-3, warmup_steps=0, ema_decay=0.5)
    result = train(quantized, Training(rank, count), detection_loss(2), config, folder)
    quantized.load_state_dict(result.best_model_state)
    processes.wait_for_all()
    return {
        "ranges": before,
        "ranges_after": calibration_digest(quantized),
        "float_layers": sorted(float_layers(quantized)),
        "sensitivities": sensitivities,
        "weight": quantized.heads.head1.cls_pred.weight.flatten().tolist(),
    }


def one_of_them(folder: Path, rank: int, port: int) -> None:
    from model import processes

    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(COUNT), "RANK": str(rank)}
    processes.join(torch.device("cpu"))
    answer = quantized_and_trained(folder / "state", rank, COUNT)
    (folder / f"{rank}.json").write_text(json.dumps(answer))
    processes.part()


@pytest.mark.slow
def test_two_processes_hold_what_one_alone_holds(repository: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(repository), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, __file__, str(tmp_path)], env=environment, check=True, timeout=300)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(COUNT))
    assert first == second
    alone = quantized_and_trained(tmp_path / "alone", 0, 1)
    assert first["ranges"] == alone["ranges"] == first["ranges_after"], "equal to the bit, and held while training"
    assert first["sensitivities"] == alone["sensitivities"]
    assert first["float_layers"] == alone["float_layers"]
    assert first["weight"] == pytest.approx(alone["weight"], abs=2e-4)  # two steps of 1e-3; float32 sums of shares


if __name__ == "__main__":
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    workers = [
        multiprocessing.get_context("fork").Process(target=one_of_them, args=(Path(sys.argv[1]), rank, port))
        for rank in range(COUNT)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    sys.exit(max(abs(worker.exitcode or 0) for worker in workers))
