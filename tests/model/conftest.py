"""Golden vectors of the reference implementation, and networks filled with the weights they were made with."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from exported_detector import ExportedDetector, export_detector
from torch import Tensor, nn

import model


class Golden:
    """Reader of the folder with golden vectors; its README says how they were made and what tolerances they allow."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.fill_module: ModuleType = _import_file(folder / "fill.py")

    def arrays(self, name: str) -> dict[str, np.ndarray]:
        with np.load(self.folder / f"{name}.npz") as stored:
            return {key: stored[key] for key in stored.files}

    def tensors(self, name: str) -> dict[str, Tensor]:
        return {key: torch.from_numpy(np.asarray(value)) for key, value in self.arrays(name).items()}

    def json(self, name: str) -> Any:
        return json.loads((self.folder / f"{name}.json").read_text(encoding="utf-8"))

    def fill(self, network: nn.Module, prefix: str = "") -> nn.Module:
        """Set every tensor of the state dict to its golden value; the keys are ``prefix`` + state-dict key."""
        shapes = {prefix + key: tuple(value.shape) for key, value in network.state_dict().items()}
        filled = self.fill_module.fill(shapes)
        network.load_state_dict({key[len(prefix) :]: torch.from_numpy(np.array(a)) for key, a in filled.items()})
        return network


def _import_file(path: Path) -> ModuleType:
    specification = importlib.util.spec_from_file_location("golden_fill", path)
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def golden(shared: Path) -> Golden:
    return Golden(shared / "golden")


@pytest.fixture(scope="session")
def small_network(golden: Golden) -> nn.Module:
    """YOLO-NAS S with 80 classes and golden weights, evaluation mode; tests must not change it."""
    return golden.fill(model.build("s", 80)).eval()


@pytest.fixture(scope="session")
def detector(golden: Golden, shared: Path) -> ExportedDetector:
    """A small quantized detector and its exported files; tests must not change it."""
    return export_detector(golden, shared)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Tests share few cores; one torch thread each, and the same random start whatever ran before."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
