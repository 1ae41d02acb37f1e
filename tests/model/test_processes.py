"""Two gloo processes that share a batch compute what one process computes on the whole of it.

Run as a program this file is both: ``test_processes.py FOLDER`` forks them, so that torch is imported once.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

COUNT = 2
IMAGES = 5  # shares of 3 and 2
SIZE = 64


def batch() -> tuple[Tensor, Any]:
    """Float64 pictures and one to three objects each, from a seed."""
    from model.loss import Targets

    random = np.random.default_rng(3)
    objects = torch.arange(3) < torch.tensor([1, 3, 2, 2, 1])[:, None]
    corners = random.uniform(0, SIZE - 32, (IMAGES, 3, 2))
    boxes = torch.from_numpy(np.concatenate([corners, corners + random.uniform(8, 32, (IMAGES, 3, 2))], axis=2))
    labels = torch.from_numpy(random.integers(0, 2, (IMAGES, 3)))
    weights = torch.from_numpy(random.uniform(0.3, 1, (IMAGES, 3)))
    return torch.from_numpy(random.uniform(size=(IMAGES, 3, SIZE, SIZE))), Targets(boxes, labels, weights, objects)


def share_of(targets: Any, rank: int) -> Any:
    from model.loss import Targets

    fields = (targets.boxes_xyxy, targets.labels, targets.weights, targets.mask)
    return Targets(*(field[rank::COUNT] for field in fields))


def learn(images: Tensor, targets: Any) -> tuple[dict[str, Tensor], nn.Module]:
    """One pass forward and backward in training mode: loss, gradients and the norms' statistics by name."""
    import model
    from model import processes
    from model.loss import DetectionLoss

    torch.manual_seed(1)
    network = model.build("pico", 2).double().train()
    trained = processes.averaging_gradients(network, torch.device("cpu"))
    (boxes_xyxy, scores), raw = trained(images)
    parts = DetectionLoss(2)(raw, boxes_xyxy, scores, targets)
    parts.total.backward()
    values = torch.stack([parts.total, parts.classification, parts.iou, parts.distribution])
    found = {"loss": processes.mean_of_all(values)}
    found |= {f"gradient.{name}": p.grad.contiguous() for name, p in network.named_parameters() if p.grad is not None}
    return found | {f"buffer.{name}": buffer.clone() for name, buffer in network.named_buffers()}, network


def draws_after_resume(folder: Path) -> dict[str, Tensor]:
    """Random numbers of a process: drawn after a save, drawn again after going back to it, and of a new process."""
    from model import processes
    from model.training_state import Position, StateDirectory, TrainedParts

    network = nn.Linear(2, 1)
    parts = TrainedParts(network, nn.Linear(2, 1), torch.optim.AdamW(network.parameters()))
    state, position = StateDirectory(folder / "state"), Position(step=4, batch=4)
    torch.manual_seed(10 + processes.rank())
    np.random.seed(20 + processes.rank())
    state.save(parts, position, {})
    processes.wait_for_all()
    first = torch.rand(3), torch.from_numpy(np.random.uniform(size=3))
    assert state.load(parts, {}) == position
    again = torch.rand(3), torch.from_numpy(np.random.uniform(size=3))
    return dict(zip(("torch", "numpy", "torch_again", "numpy_again"), (*first, *again), strict=True))


def member(folder: Path, rank: int) -> None:
    from model import processes

    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(COUNT)}
    processes.join(torch.device("cpu"))
    images, targets = batch()
    found, network = learn(images[rank::COUNT], share_of(targets, rank))
    kinds = sorted({type(module).__name__ for module in network.modules() if "Norm2d" in type(module).__name__})
    processes.separate(network)
    kinds += sorted({type(module).__name__ for module in network.modules() if "Norm2d" in type(module).__name__})
    told = {
        "kinds": kinds,
        "first": processes.made_by_first(lambda: f"from {rank}"),
        "gathered": processes.gathered_by_first(rank),
        "any": [processes.any_says(rank == 1, torch.device("cpu")), processes.any_says(False, torch.device("cpu"))],
    }
    found |= draws_after_resume(folder)
    found |= processes.tensors_from_first({"received": torch.arange(3)} if rank == 0 else {})
    processes.part()
    told["alone"] = [processes.rank(), processes.count()]
    save_file(found, folder / f"{rank}.safetensors")
    (folder / f"{rank}.json").write_text(json.dumps(told))


@pytest.fixture(scope="module")
def together(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> list[tuple[dict[str, Tensor], Any]]:
    """What each of the two processes found."""
    folder = tmp_path_factory.mktemp("together")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    environment = {**os.environ, "PYTHONPATH": str(repository), "OMP_NUM_THREADS": "1"}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    subprocess.run([sys.executable, __file__, str(folder)], env=environment, check=True, timeout=120)
    return [
        (load_file(folder / f"{rank}.safetensors"), json.loads((folder / f"{rank}.json").read_text()))
        for rank in range(COUNT)
    ]


def test_loss_gradients_and_statistics_equal_those_of_one_process(
    together: list[tuple[dict[str, Tensor], Any]],
) -> None:
    expected, _ = learn(*batch())
    assert len(expected) > 100 and expected["loss"].min() > 0
    for found, _ in together:
        for name, value in expected.items():
            # float64, so only the order of sums differs; gradients that vanish exactly are compared by their size
            tolerances = {"rtol": 1e-9, "atol": 1e-12}
            torch.testing.assert_close(found[name], value, **tolerances, msg=lambda text, n=name: f"{n}: {text}")


def test_norms_are_synchronized_only_while_training_together(together: list[tuple[dict[str, Tensor], Any]]) -> None:
    for _, told in together:
        assert told["kinds"] == ["SynchronizedBatchNorm2d", "BatchNorm2d"]


def test_what_processes_tell_each_other(together: list[tuple[dict[str, Tensor], Any]]) -> None:
    assert [told["first"] for _, told in together] == ["from 0"] * COUNT
    assert [told["gathered"] for _, told in together] == [[0, 1], []]
    assert [told["any"] for _, told in together] == [[True, False]] * COUNT
    assert [found["received"].tolist() for found, _ in together] == [[0, 1, 2]] * COUNT
    assert [told["alone"] for _, told in together] == [[0, 1]] * COUNT


def test_every_process_goes_on_with_its_own_random_states(together: list[tuple[dict[str, Tensor], Any]]) -> None:
    for name in ("torch", "numpy"):
        drawn = [found[name] for found, _ in together]
        assert not torch.equal(*drawn)
        for found, _ in together:
            assert torch.equal(found[name], found[f"{name}_again"])


def test_alone_every_call_is_a_no_op() -> None:
    from model import processes

    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    assert processes.averaging_gradients(network, torch.device("cpu")) is network
    assert type(network[1]) is nn.BatchNorm2d
    assert processes.made_by_first(lambda: 7) == 7 and processes.gathered_by_first(8) == [8]
    processes.wait_for_all()
    processes.part()


def test_torchs_synchronized_norms_become_ordinary_ones_around_the_same_tensors() -> None:
    from model import processes

    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.SyncBatchNorm(4, eps=1e-3, momentum=0.03)).eval()
    before = network.state_dict(keep_vars=True)
    processes.separate(network)
    norm = network[1]
    assert type(norm) is nn.BatchNorm2d and (norm.eps, norm.momentum, norm.training) == (1e-3, 0.03, False)
    after = network.state_dict(keep_vars=True)
    assert before.keys() == after.keys() and all(before[name] is after[name] for name in before)


if __name__ == "__main__":
    import torch._dynamo  # DistributedDataParallel loads it, which takes longer than all the rest: once, before forking

    members = [
        multiprocessing.get_context("fork").Process(target=member, args=(Path(sys.argv[1]), rank))
        for rank in range(COUNT)
    ]
    for process in members:
        process.start()
    for process in members:
        process.join()
    sys.exit(max(abs(process.exitcode or 0) for process in members))
