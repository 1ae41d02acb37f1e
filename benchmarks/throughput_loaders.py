"""One loader of training_throughput.py, which gives batches when it is told to.

    python benchmarks/throughput_loaders.py LOADER SET MOSAIC PICTURES DATA

A process of its own, one thread, no loader processes: an image's processor time is all that it costs. The protocol is
that of throughput_contestants.py; the first answer is the first epoch. Both loaders make batches of 16 at 320 px with
the same augmentations at the peer's default strengths: mosaic, shift, zoom, flip, hue, saturation and value.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import torch

sys.path.append(str(Path(__file__).resolve().parent.parent))

from benchmarks import photo_sets
from benchmarks.throughput_contestants import Referee

IMAGE_SIZE, BATCH = 320, 16
# how pictures are kept between epochs -> our cache in MB, the peer's `cache`
PICTURES: dict[str, tuple[int, Any]] = {"defaults": (1024, False), "decoded": (0, False), "in memory": (1024, "ram")}


def main() -> None:
    """Make batches until the input ends."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("loader", choices=["nasline", "nasline reduced", "ultralytics"])
    parser.add_argument("dataset", help="name of the set")
    parser.add_argument("mosaic", type=float, help="its probability")
    parser.add_argument("pictures", choices=[*PICTURES])
    parser.add_argument("data", type=Path, help="the peer's description of the set")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    referee = Referee()
    loader, images = peers(arguments) if arguments.loader == "ultralytics" else ours(arguments)
    referee.say({"images": images})
    referee.expect(images // BATCH)
    batches = itertools.chain.from_iterable(loader for _ in itertools.count())
    while True:
        referee.step_begins()
        batch = next(batches)
        is_full = len(batch["img"] if isinstance(batch, dict) else batch) == BATCH  # the peer ends epochs with the rest
        if is_full and referee.step_ends():
            return


class _Epochs:
    """Our loader as something that is iterated once an epoch."""

    def __init__(self, loader: Any) -> None:
        self._loader, self._epoch = loader, -1

    def __iter__(self) -> Iterator[Any]:
        self._epoch += 1
        return iter(self._loader.epoch(self._epoch))


def ours(arguments: argparse.Namespace) -> tuple[Any, int]:
    """This repository's loader, and how many images it has."""
    from model.data.augmentation import AugmentationConfig
    from model.data.loader import TrainingLoader
    from model.preprocessing import Preprocessing

    photos = photo_sets.load(arguments.dataset)
    augmentation = AugmentationConfig(
        mosaic_probability=arguments.mosaic,
        hsv_probability=1.0,
        hue_degrees=0.015 * 360,
        saturation=0.7,
        value=0.4,
    )
    opener: Any = photos.open_image
    loader = TrainingLoader(
        photos.train,
        opener,
        Preprocessing(IMAGE_SIZE),
        BATCH,
        augmentation,
        seed=0,
        cache_megabytes=PICTURES[arguments.pictures][0],
        open_reduced=opener.reduced if arguments.loader == "nasline reduced" else None,
    )
    return _Epochs(loader), len(photos.train)


def peers(arguments: argparse.Namespace) -> tuple[Any, int]:
    """The peer's loader, as its trainer builds it, and how many images it has."""
    from ultralytics.cfg import get_cfg
    from ultralytics.data import build_dataloader, build_yolo_dataset
    from ultralytics.data.utils import check_det_dataset

    options = {"imgsz": IMAGE_SIZE, "mosaic": arguments.mosaic, "cache": PICTURES[arguments.pictures][1]}
    settings, data = get_cfg(overrides=options), check_det_dataset(str(arguments.data))
    images = build_yolo_dataset(settings, data["train"], BATCH, data, mode="train", rect=False, stride=32)
    return build_dataloader(images, BATCH, workers=0, shuffle=True, device="cpu"), len(images)


if __name__ == "__main__":
    main()
