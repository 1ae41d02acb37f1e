"""YOLO-NAS detectors: network, losses, data loading, training, quantization and inference engines.

Legend of shapes used in the whole package: B batch, A anchors (all levels), C classes, N objects of an image (padded),
H and W pixels, S input size of a square image.  Importing this package imports nothing heavy.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from model.yolo_nas import YoloNAS

__all__ = ["build", "load"]


def build(variant: str, num_classes: int) -> YoloNAS:
    """Build a randomly initialised detector; ``variant`` is a key of ``model.yolo_nas.VARIANTS``.

    Raises ValueError for an unknown variant or a class count below 1.
    """
    from model.yolo_nas import VARIANTS, YoloNAS

    if variant not in VARIANTS:
        raise ValueError(f"unknown model variant {variant!r}; choose one of {', '.join(VARIANTS)}")
    return YoloNAS(VARIANTS[variant], num_classes)


def load(checkpoint_directory: str | Path) -> YoloNAS:
    """Load the network of a checkpoint directory, in evaluation mode on the CPU.

    ``model.checkpoint.load_checkpoint`` also returns class names, preprocessing and lineage.
    """
    from model.checkpoint import load_checkpoint

    network, _ = load_checkpoint(Path(checkpoint_directory))
    return network
