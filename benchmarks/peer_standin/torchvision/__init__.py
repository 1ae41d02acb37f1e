"""Stands in for torchvision, which has no CPU build for this torch, where a peer's training loop imports it."""

from . import ops

__version__ = "0.28.0"
__all__ = ["ops"]
