"""Batches for training, the same whatever the number of worker processes, and for evaluation."""

from __future__ import annotations

import ctypes
import logging
import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from model import processes
from model.data.augmentation import AugmentationConfig, Sample, augment
from model.data.image_set import ImageSet, OpenImage
from model.data.pictures import OpenReduced, ReducedPictures
from model.data.sampling import (
    EpochImages,
    batch_input_size,
    epoch_images,
    images_per_epoch,
    input_sizes,
    repeat_factors,
)
from model.loss import Targets
from model.preprocessing import Letterbox, Preprocessing

logger = logging.getLogger(__name__)

PARTNERS_AMONG = 128  # images
_PR_SET_PDEATHSIG = 1  # of prctl: the signal that a process gets when its parent dies
AUGMENTATION_STREAM = 1  # first word of each seed, beside those in sampling.py: no two generators share one


@dataclass(frozen=True)
class Batch:
    """B training samples; ``targets`` are in input pixels, padded to the largest number of boxes (at least
    1).
    """

    images: Tensor  # uint8 (B, 3, S, S) RGB
    targets: Targets
    image_ids: NDArray[np.int64]  # (B,) the main image of each sample

    def __len__(self) -> int:
        return len(self.image_ids)


class TrainingLoader:
    """Shuffled, augmented batches; epoch e and batch b determine every bit of a batch.

    Each draw comes from (seed, epoch, position of the image in the epoch's list), so batches are equal for any
    number of workers and after a resume in mid-epoch. The last incomplete batch of an epoch is left out, unless
    the whole set is smaller than a batch. Crowd regions are no targets.

    ``class_balance`` lets images of rare classes come more often (see ``sampling.repeat_factors``; 0 is off), as
    partners in mosaics too. ``multi_scale`` gives each batch a random size S within the input size * (1 ± it)
    (0 is off), made by the one warp that every image goes through anyway; without mosaic S is the input size.

    Partners in mosaics and mixups come from the last 128 images of the epoch's order (from the batch where it is
    larger), which are kept: every picture is so decoded once an epoch, not once for each of a mosaic's parts.

    Workers are forked once and kept. ``cache_megabytes`` holds pictures in memory, decoded and shrunk to the
    input size, shared by all workers: on a machine with few cores decoding takes longer than augmenting.
    ``open_reduced`` opens pictures that are far larger than the input at a fraction of their size, which takes less
    time and gives slightly other pixels.
    """

    def __init__(
        self,
        image_set: ImageSet,
        open_image: OpenImage,
        preprocessing: Preprocessing,
        batch_size: int,
        augmentation: AugmentationConfig,
        seed: int,
        workers: int = 0,
        cache_megabytes: int = 0,
        class_balance: float = 0.0,
        multi_scale: float = 0.0,
        open_reduced: OpenReduced | None = None,
    ) -> None:
        for name, value, least in (
            ("batch_size", batch_size, 1),
            ("seed", seed, 0),
            ("workers", workers, 0),
            ("cache_megabytes", cache_megabytes, 0),
        ):
            if value < least:
                raise ValueError(f"loader.{name} must be at least {least}, got {value}")
        if min(batch_size, len(image_set)) < processes.count():
            raise ValueError(
                f"batch_size {batch_size} and a training set of {len(image_set)} images leave nothing for some of "
                f"{processes.count()} training processes; start fewer, or check the split's name"
            )
        sizes = input_sizes(preprocessing.input_size, multi_scale)
        largest = replace(preprocessing, input_size=sizes[-1])
        joins_images = augmentation.mosaic_probability or augmentation.mixup_probability
        kept = PARTNERS_AMONG + batch_size if joins_images else 0
        pictures = ReducedPictures(image_set, open_image, largest, cache_megabytes, kept, open_reduced)
        factors = repeat_factors(image_set, class_balance) if class_balance else np.ones(len(image_set))
        if processes.rank() == 0:
            _tell_of_sampling(sizes, factors)
        self._batches = _Batches(pictures, batch_size, augmentation, seed, preprocessing, sizes, factors)
        self._keys = _BatchKeys()
        self._workers = _start_workers(self._batches, self._keys, workers) if workers else None

    @property
    def batches_per_epoch(self) -> int:
        return self._batches.count

    @property
    def batch_size(self) -> int:
        """Images of a batch, over all processes: fewer than asked for where an epoch has fewer."""
        return self._batches.batch_size

    def epoch(self, epoch: int, start_batch: int = 0, mosaic_enabled: bool = True) -> Iterator[Batch]:
        """The batches of one epoch from ``start_batch`` on; ``mosaic_enabled=False`` switches off mosaic, mixup and
        random input sizes.

        Whatever ``open_image`` raises comes out unchanged; ``ValueError`` for an image of another size than recorded.
        """
        keys = [(epoch, batch, mosaic_enabled) for batch in range(start_batch, self.batches_per_epoch)]
        if self._workers is None:
            yield from (_to_batch(self._batches.make(key)) for key in keys)
            return
        self._keys.keys = keys
        error: Exception | None = None
        for item in self._workers:
            if isinstance(item, Exception):
                error = item
                break
            yield _to_batch(item)
        if error is not None:
            # letting go of the workers ends them here and now; held by the traceback they would end seconds later
            self._workers = _start_workers(self._batches, self._keys, self._workers.num_workers)
            raise error


def _tell_of_sampling(sizes: tuple[int, ...], factors: NDArray[np.float64]) -> None:
    count = images_per_epoch(factors)
    if count > len(factors):
        text = "class_balance: an epoch has %d images instead of %d; an image comes up to %.1f times on average"
        logger.info(text, count, len(factors), factors.max() * count / factors.sum())
    if len(sizes) > 1:
        logger.info("multi_scale: input sizes %s pixels", ", ".join(map(str, sizes)))


@dataclass(frozen=True)
class _Arrays:
    """A batch as a worker sends it: numpy through a pipe needs no room in /dev/shm, which containers keep
    small.
    """

    images: NDArray[np.uint8]
    boxes_xyxy: NDArray[np.float32]
    labels: NDArray[np.int64]
    weights: NDArray[np.float32]
    mask: NDArray[np.bool_]
    image_ids: NDArray[np.int64]


Key = tuple[int, int, bool]  # epoch, batch, mosaic enabled


class _BatchKeys(Sampler[Key]):
    """What the kept workers are to make next; set before each epoch."""

    def __init__(self) -> None:
        self.keys: list[Key] = []

    def __iter__(self) -> Iterator[Key]:
        return iter(self.keys)


class _Batches(Dataset["_Arrays | Exception"]):
    """Makes the batch for a key.  Training processes share each batch: process r of P makes every P-th image."""

    def __init__(
        self,
        pictures: ReducedPictures,
        batch_size: int,
        augmentation: AugmentationConfig,
        seed: int,
        preprocessing: Preprocessing,
        sizes: tuple[int, ...],
        factors: NDArray[np.float64],
    ) -> None:
        self._pictures = pictures
        self._process, self._processes = processes.rank(), processes.count()
        self._image_count = images_per_epoch(factors)
        self.batch_size = min(batch_size, self._image_count)
        self._augmentation = augmentation
        self._closing = replace(augmentation, mosaic_probability=0.0, mixup_probability=0.0)
        self._seed = seed
        self._preprocessing, self._sizes, self._factors = preprocessing, sizes, factors
        self._epoch: tuple[int, EpochImages] | None = None

    @property
    def count(self) -> int:
        return self._image_count // self.batch_size

    def __getitem__(self, key: Key) -> _Arrays | Exception:
        """In a worker: an error is returned, to be raised unchanged where the user sees it."""
        try:
            return self.make(key)
        except Exception as error:
            return error

    def make(self, key: Key) -> _Arrays:
        epoch, batch, mosaic_enabled = key
        images, first = self._images(epoch), batch * self.batch_size
        own = range(first + self._process, min(first + self.batch_size, len(images.order)), self._processes)
        preprocessing = self._preprocessing
        if mosaic_enabled:
            size = batch_input_size(self._sizes, self._seed, epoch, batch)
            preprocessing = replace(preprocessing, input_size=size)
        config = self._augmentation if mosaic_enabled else self._closing
        around = self._partners(images, first)
        samples = [self._sample(position, around, images, epoch, preprocessing, config) for position in own]
        listed = images.listed[images.order[own.start : own.stop : own.step]]
        return _collate(samples, self._pictures.image_set.image_ids[listed])

    def _partners(self, images: EpochImages, first: int) -> range:
        """Positions in the epoch's order, the batch that starts at ``first`` among them, to draw partners from."""
        width = min(max(PARTNERS_AMONG, self.batch_size), len(images.order))
        stop = max(first + self.batch_size, width)
        return range(stop - width, stop)

    def _images(self, epoch: int) -> EpochImages:
        if self._epoch is None or self._epoch[0] != epoch:
            self._epoch = (epoch, epoch_images(self._factors, self._seed, epoch))
        return self._epoch[1]

    def _sample(
        self,
        position: int,
        around: range,
        images: EpochImages,
        epoch: int,
        preprocessing: Preprocessing,
        config: AugmentationConfig,
    ) -> Sample:
        """The image at a position of the epoch's order, with partners ``around`` it."""
        places, own = images.order[around.start : around.stop], position - around.start
        return augment(
            own,
            len(around),
            lambda other: self._pictures.load(int(images.listed[places[other]]), renew=other == own),
            preprocessing,
            config,
            np.random.default_rng([AUGMENTATION_STREAM, self._seed, epoch, int(places[own])]),
        )


def _collate(samples: list[Sample], image_ids: NDArray[np.int64]) -> _Arrays:
    counts = np.array([len(sample.labels) for sample in samples])
    shape = (len(samples), max(1, int(counts.max())))
    mask = np.arange(shape[1]) < counts[:, None]
    boxes_xyxy, labels = np.zeros((*shape, 4), np.float32), np.zeros(shape, np.int64)
    weights = np.zeros(shape, np.float32)
    boxes_xyxy[mask] = np.concatenate([sample.boxes_xyxy for sample in samples])
    labels[mask] = np.concatenate([sample.labels for sample in samples])
    weights[mask] = np.concatenate([sample.weights for sample in samples])
    return _Arrays(_planes([sample.image for sample in samples]), boxes_xyxy, labels, weights, mask, image_ids)


def _planes(images: list[NDArray[np.uint8]]) -> NDArray[np.uint8]:
    """Pictures (S, S, 3) as (B, 3, S, S); OpenCV sorts bytes twenty times as fast as numpy."""
    height, width, channels = images[0].shape
    planes = np.empty((len(images), channels, height, width), np.uint8)
    for image, own in zip(images, planes, strict=True):
        cv2.split(image, list(own))
    return planes


def _to_batch(arrays: _Arrays) -> Batch:
    targets = Targets(
        boxes_xyxy=torch.from_numpy(arrays.boxes_xyxy),
        labels=torch.from_numpy(arrays.labels),
        weights=torch.from_numpy(arrays.weights),
        mask=torch.from_numpy(arrays.mask),
    )
    return Batch(torch.from_numpy(arrays.images), targets, arrays.image_ids)


def _start_workers(batches: _Batches, keys: _BatchKeys, workers: int) -> DataLoader[_Arrays | Exception]:
    """They are forked when first asked for a batch."""
    return DataLoader(
        batches,
        batch_size=None,
        sampler=keys,
        num_workers=workers,
        collate_fn=_unchanged,
        worker_init_fn=_begin_worker,
        multiprocessing_context="fork",
        generator=torch.Generator(),  # its own, so that workers do not move the training's random state
        persistent_workers=True,
    )


def _unchanged(item: Any) -> Any:
    return item


def _begin_worker(_: int) -> None:
    """One thread, and the end with the training: a worker whose training was killed while it sent a batch waited for a
    reader for ever, as it holds the reading end too, and kept the locks that it had inherited.
    """
    cv2.setNumThreads(0)
    training = multiprocessing.parent_process()
    if training is not None and sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != training.pid:  # it died before that
            os._exit(1)


def evaluation_batches(
    image_set: ImageSet,
    open_image: OpenImage,
    preprocessing: Preprocessing,
    batch_size: int,
    threads: int = 1,
) -> Iterator[tuple[NDArray[np.uint8], list[Letterbox], NDArray[np.int64]]]:
    """Every image once, in order: pictures (B, 3, S, S), where each lies in the input, positions in the set
    (B,).

    The next batch is read by ``threads`` threads while the caller works on this one.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")

    def read(index: int) -> tuple[NDArray[np.uint8], Letterbox]:
        return preprocessing.apply(open_image(image_set.path(index)))

    groups = [range(start, min(start + batch_size, len(image_set))) for start in range(0, len(image_set), batch_size)]
    with ThreadPoolExecutor(threads) as pool:
        ahead = [pool.submit(read, index) for group in groups[:1] for index in group]
        for position, group in enumerate(groups):
            pending = ahead
            ahead = [pool.submit(read, index) for later in groups[position + 1 : position + 2] for index in later]
            read_images = [task.result() for task in pending]
            images = np.stack([image for image, _ in read_images])
            yield images, [letterbox for _, letterbox in read_images], np.array(group, np.int64)
