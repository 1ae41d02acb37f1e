"""One contestant of training_throughput.py: a network in a training loop, which does steps when it is told to.

    python benchmarks/throughput_contestants.py NETWORK LOOP PRECISION BATCHES FOLDER

A process of its own, one thread. It writes a JSON line about the network, then for each line ``N`` on its input does N
steps of the loop and answers with what each took. Both loops are run as their users run them (``model.training.train``
and the peer's ``DetectionTrainer.train``); nothing of them is rewritten here. A step's time begins when the loop has
its batch and ends when it is about to ask for the next: forward pass, loss with assignment, gradients, clipping,
optimiser, average, and the loop's own book-keeping. Both loops get the same pictures and boxes, from BATCHES.

A network keeps its own loss in either loop, so what differs between the loops is the loop.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

sys.path.append(str(Path(__file__).resolve().parent.parent))

import model
from model.backbone import Stage
from model.data.loader import Batch
from model.loss import DetectionLoss, Targets
from model.training import Stopped, TrainingConfig, train
from model.yolo_nas import VARIANTS, YoloNAS

WARMUP_STEPS = 3
ENDLESS = 10_000  # batches of an epoch; no contestant gets there
PEER_NETWORK = "yolov8n"
EQUAL = "t-narrower"
EQUAL_STAGES = (Stage(48, 1, 24), Stage(96, 2, 32), Stage(192, 3, 48), Stage(320, 2, 96))
"""Backbone of a variant t that trains with as many multiply-adds as YOLOv8n, 5 % up or down."""
PLAIN = "t-plain"
"""Variant t without the quick paths of model/layout.py: the architecture as one would write it for the peer's loop."""


class Referee:
    """Does the talking with the parent process and holds the watch."""

    def __init__(self) -> None:
        self._answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # whatever else is printed goes to the log
        self._wanted, self._times = WARMUP_STEPS, list[dict[str, float]]()
        self._began = (0.0, 0.0)

    def say(self, what: Any) -> None:
        """One line of JSON to the parent."""
        print(json.dumps(what), file=self._answers, flush=True)

    def expect(self, steps: int) -> None:
        """How many steps are done before the first order."""
        self._wanted = steps

    def step_begins(self) -> None:
        """The loop has its batch."""
        self._began = (time.process_time(), time.perf_counter())

    def step_ends(self) -> bool:
        """The loop is through with it; waits for the next order and says whether there is none."""
        cpu, wall = time.process_time() - self._began[0], time.perf_counter() - self._began[1]
        self._times.append({"cpu_seconds": cpu, "wall_seconds": wall})
        if len(self._times) < self._wanted:
            return False
        self.say(self._times)
        order = sys.stdin.readline()
        self._times, self._wanted = [], int(order or 0)
        return not order


def main() -> None:
    """Train until the input ends."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("network", help=f"variant of this repository, {EQUAL}, {PLAIN} or {PEER_NETWORK}")
    parser.add_argument("loop", choices=["nasline", "ultralytics"])
    parser.add_argument("precision", choices=["float32", "bfloat16"])
    parser.add_argument("batches", type=Path, help="npz file of the batches")
    parser.add_argument("folder", type=Path, help="for what the loops write")
    parser.add_argument("--peer-data", type=Path, help="the peer's description of a data set")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    referee = Referee()
    batches, classes = read_batches(arguments.batches)
    side = batches[0].images.shape[2]
    if arguments.loop == "nasline":
        network, compute_loss = contestant(arguments.network, classes)
        referee.say(describe(network, side))
        run_ours(network, compute_loss, batches, arguments, referee)
    else:
        run_peers(batches, classes, arguments, referee)


def read_batches(path: Path) -> tuple[list[Batch], int]:
    """The prepared batches, and how many classes their labels have."""
    with np.load(path) as columns:
        tensors = {name: torch.from_numpy(columns[name]) for name in columns.files}
    rows = zip(*(tensors[name] for name in ("boxes_xyxy", "labels", "weights", "mask")), strict=True)
    ids = np.arange(tensors["images"].shape[1])
    batches = [Batch(images, Targets(*row), ids) for images, row in zip(tensors["images"], rows, strict=True)]
    return batches, int(tensors["labels"].max()) + 1


def contestant(name: str, classes: int) -> tuple[nn.Module, Any]:
    """A network and its loss, as this repository's loop takes them."""
    if name == PEER_NETWORK:
        from ultralytics.cfg import get_cfg
        from ultralytics.nn.tasks import DetectionModel

        network = DetectionModel(f"{name}.yaml", nc=classes, verbose=False)
        network.args = get_cfg()
        for part in network.model[-1].dfl.parameters():  # as the peer's trainer does: bin numbers are no weights
            part.requires_grad_(False)
        return network, peer_loss
    if name == EQUAL:
        return YoloNAS(replace(VARIANTS["t"], backbone_stages=EQUAL_STAGES), classes), own_loss(classes)
    if name == PLAIN:
        _leave_out_quick_paths()
    return model.build("t" if name == PLAIN else name, classes), own_loss(classes)


def _leave_out_quick_paths() -> None:
    """Have this process's blocks and neck join maps, and begin, with torch's own operations."""
    from model import blocks, neck

    def join(maps: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(maps), dim=1)

    vars(neck).update(join=join)
    vars(blocks).update(join=join, suits_halving=lambda images: False)


def own_loss(classes: int) -> Any:
    """This repository's loss of one batch."""
    criterion = DetectionLoss(classes)

    def compute(network: nn.Module, images: Tensor, targets: Targets, _: float) -> tuple[Tensor, dict[str, Tensor]]:
        (boxes_xyxy, scores), raw = network(images)
        parts = criterion(raw, boxes_xyxy, scores, targets)
        return parts.total, {"classification": parts.classification, "iou": parts.iou, "dfl": parts.distribution}

    return compute


def peer_loss(network: nn.Module, images: Tensor, targets: Targets, _: float) -> tuple[Tensor, dict[str, Tensor]]:
    """The peer's own loss of its network, on this repository's batches."""
    total, parts = network({"img": images, **peer_targets(targets, images.shape[2])})
    return total.sum(), parts


def peer_targets(targets: Targets, side: int) -> dict[str, Tensor]:
    """Boxes of a batch in the peer's form: one row a box, its image, class and relative centre and size."""
    image, _ = targets.mask.nonzero(as_tuple=True)
    left_top, right_bottom = targets.boxes_xyxy[targets.mask].chunk(2, dim=1)
    boxes = torch.cat([(left_top + right_bottom) / 2, right_bottom - left_top], dim=1) / side
    return {"batch_idx": image.float(), "cls": targets.labels[targets.mask].float()[:, None], "bboxes": boxes}


def describe(network: nn.Module, side: int) -> dict[str, Any]:
    """Trainable parameters, and multiply-adds of its convolutions for one picture, in the form that is trained."""
    multiply_adds = 0

    def count(layer: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal multiply_adds
        placed = inputs[0] if isinstance(layer, nn.ConvTranspose2d) else output
        if layer.weight.requires_grad:
            multiply_adds += layer.weight.numel() * placed[0, 0].numel()

    layers = [one for one in network.modules() if isinstance(one, nn.Conv2d | nn.ConvTranspose2d)]
    hooks = [layer.register_forward_hook(count) for layer in layers]
    with torch.no_grad():  # evaluation mode leaves the norms' statistics alone; the convolutions are the same
        network.eval()(torch.zeros(1, 3, side, side))
    for hook in hooks:
        hook.remove()
    parameters = sum(one.numel() for one in network.parameters() if one.requires_grad)
    return {"multiply_adds": multiply_adds, "parameters": parameters}


class _Told:
    """Batches again and again; the watch starts as the loop takes one."""

    batches_per_epoch = ENDLESS

    def __init__(self, batches: list[Batch], begins: Callable[[], None]) -> None:
        self._batches, self._begins = batches, begins

    def epoch(self, epoch: int, start_batch: int = 0, mosaic_enabled: bool = True) -> Iterator[Batch]:
        for position in range(start_batch, ENDLESS):
            self._begins()
            yield self._batches[position % len(self._batches)]


def run_ours(
    network: nn.Module, compute_loss: Any, batches: list[Batch], arguments: argparse.Namespace, referee: Referee
) -> None:
    """This repository's loop with the settings that its parameter file has by default."""
    config = TrainingConfig(
        epochs=10,
        batch_size=len(batches[0]),
        learning_rate=3e-3,
        weight_decay=1e-3,
        ema_decay=0.998,
        gradient_clip_norm=10.0,
        precision=arguments.precision,
    )
    with contextlib.suppress(Stopped):
        source = _Told(batches, referee.step_begins)
        train(network, source, compute_loss, config, arguments.folder / "state", should_stop=referee.step_ends)


def run_peers(batches: list[Batch], classes: int, arguments: argparse.Namespace, referee: Referee) -> None:
    """The peer's loop with its defaults, but an optimiser step for every batch (``nbs``), as the other loop does."""
    from benchmarks.peer_trainer import make_trainer

    def build() -> nn.Module:
        network, compute_loss = contestant(arguments.network, classes)
        referee.say(describe(network, batches[0].images.shape[2]))
        return network if arguments.network == PEER_NETWORK else AsPeersModel(network, compute_loss)

    converted = [
        {"img": batch.images, "targets": batch.targets, **peer_targets(batch.targets, batch.images.shape[2])}
        for batch in batches
    ]
    trainer = make_trainer(build, converted, arguments.peer_data, arguments.folder)
    trainer.add_callback("on_train_batch_start", lambda _: referee.step_begins())
    trainer.add_callback("on_train_batch_end", lambda _: _end_process() if referee.step_ends() else None)
    trainer.train()


class AsPeersModel(nn.Module):
    """A network of this repository with the face that the peer's trainer wants: a batch in, losses out."""

    def __init__(self, network: nn.Module, compute_loss: Any) -> None:
        super().__init__()
        self.network, self._compute_loss = network, compute_loss
        self.stride, self.yaml, self.criterion = torch.tensor([8.0, 16.0, 32.0]), dict[str, Any](), None

    def forward(self, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        total, parts = self._compute_loss(self.network, batch["img"], batch["targets"], 0.0)
        return total, {name: part.detach() for name, part in parts.items()}

    def set_head_attr(self, **_: Any) -> None:
        """The peer sets limits of its own head here."""


def _end_process() -> None:
    """The peer's loop would go on to its last validation; there is nothing left to measure."""
    os._exit(0)


if __name__ == "__main__":
    main()
