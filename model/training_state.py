"""What a training run leaves on disk, and how it goes on from there exactly.

Files of a state directory:

| file | content |
|---|---|
| ``length.json`` | number of optimiser steps, decided once |
| ``state.json`` | position, random states, names of the tensor files; replacing it is the commit |
| ``state-<step>.safetensors`` | network, average (EMA), optimiser moments, torch random states |
| ``best-<step>.safetensors`` | averaged network that scored best so far |
| ``metrics.jsonl`` | one JSON object per finished epoch |

Every file is written beside its place, flushed to the disk and renamed; nothing is unpickled.

Where several processes train together the first one alone reads and writes; it keeps the random states of all, and
hands the others what it read. With another number of processes a run goes on from the same step with the same
batches, but those of its processes that have no random state here draw anew.
"""

from __future__ import annotations

import json
import os
import random
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from model import processes

SCHEMA_VERSION = 1
STATE_FILE = "state.json"
METRICS_FILE = "metrics.jsonl"


@dataclass(frozen=True)
class Best:
    """The best evaluation so far: its value, the epoch it closed and the file with the averaged network."""

    metric: float
    epoch: int
    file: str


@dataclass
class Position:
    """Where a run stands between two optimiser steps.

    ``step`` steps are done, ``batch`` of them in the running ``epoch`` (counted from 0); ``loss_sums`` are
    the sums of the loss parts over those batches, ``precision`` the arithmetic of the last step ("" before the first).
    """

    step: int = 0
    epoch: int = 0
    batch: int = 0
    loss_sums: dict[str, float] = field(default_factory=dict)
    best: Best | None = None
    precision: str = ""

    def advance(self, losses: Mapping[str, float]) -> None:
        """Count one optimiser step with the given loss parts."""
        self.step += 1
        self.batch += 1
        for name, value in losses.items():
            self.loss_sums[name] = self.loss_sums.get(name, 0.0) + value

    def mean_losses(self) -> dict[str, float]:
        """Mean of each loss part over the batches of the running epoch."""
        return {name: total / self.batch for name, total in self.loss_sums.items()}

    def next_epoch(self) -> None:
        """Close the running epoch."""
        self.epoch += 1
        self.batch = 0
        self.loss_sums = {}


@dataclass(frozen=True)
class TrainedParts:
    """Everything that changes while training; restored in place."""

    network: nn.Module
    average: nn.Module
    optimizer: torch.optim.Optimizer


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that it exists either whole or not at all, even after a power cut."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    _publish(partial, path)


def write_json(path: Path, value: object) -> None:
    """Write ``value`` as JSON, atomically. Floats keep every bit."""
    write_atomically(path, (json.dumps(value) + "\n").encode())


def read_json(path: Path) -> Any:
    """Read a JSON file of the state directory.

    Raises:
        ValueError: when the file is not JSON, naming it and the remedy.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); delete {path.parent} to train anew") from error


class StateDirectory:
    """Reads and writes the files of one run; the only code that knows their names."""

    def __init__(self, path: Path) -> None:
        self.path = path
        if processes.rank() == 0:
            path.mkdir(parents=True, exist_ok=True)

    def save(self, parts: TrainedParts, position: Position, settings: Mapping[str, object]) -> None:
        """Commit the run as it stands; ``settings`` are what a resumed run must agree with. All processes call it."""
        random_states = processes.gathered_by_first(_random_states())
        if processes.rank() > 0:
            return
        first, *others = random_states
        name = f"state-{position.step:08d}.safetensors"
        tensors = _tensors_of(parts)
        for process, states in enumerate(random_states):
            tensors |= {_random_name(device, process): state for device, state in states.torch.items()}
        _save_tensors(self.path / name, tensors)
        commit = {
            "schema_version": SCHEMA_VERSION,
            "tensors": name,
            "position": asdict(position),
            "metrics_bytes": self._metrics_bytes(),
            "random": first.plain,
            "random_of_others": [states.plain for states in others],
            "settings": dict(settings),
        }
        write_json(self.path / STATE_FILE, commit)
        self._remove_all_but({name, position.best.file if position.best else name})

    def load(self, parts: TrainedParts, settings: Mapping[str, object]) -> Position | None:
        """Restore the last commit into ``parts`` and the random generators; None when there is no commit.

        Metrics written after the commit are cut off: those epochs are run again. All processes call it.

        Raises:
            ValueError: when a file is damaged or belongs to a run with other settings.
        """
        commit, tensors = self._read_commit(settings) if processes.rank() == 0 else (None, {})
        commit = processes.from_first(commit)
        if commit is None:
            return None
        tensors = processes.tensors_from_first(tensors)
        _restore(parts, tensors, self.path)
        saved = commit["position"]
        position = Position(**{**saved, "best": Best(**saved["best"]) if saved["best"] else None})
        _set_random_states(tensors, [commit["random"], *commit.get("random_of_others", [])], position.step)
        return position

    def _read_commit(self, settings: Mapping[str, object]) -> tuple[dict[str, Any] | None, dict[str, Tensor]]:
        if not (self.path / STATE_FILE).exists():
            (self.path / METRICS_FILE).unlink(missing_ok=True)
            return None, {}
        commit = read_json(self.path / STATE_FILE)
        self._require_same(commit, settings)
        tensors = self._load_tensors(commit["tensors"])
        self._cut_metrics(commit["metrics_bytes"])
        return commit, tensors

    def save_best(self, average: nn.Module, metric: float, position: Position) -> Best:
        """Write the averaged network that scored best; it counts from the next ``save`` on."""
        name = f"best-{position.step:08d}.safetensors"
        _save_tensors(self.path / name, dict(average.state_dict()))
        return Best(metric=metric, epoch=position.epoch + 1, file=name)

    def load_best(self, best: Best) -> dict[str, Tensor]:
        """State dict of the averaged network that scored best. All processes call it."""
        return processes.tensors_from_first(self._load_tensors(best.file) if processes.rank() == 0 else {})

    def append_metrics(self, row: Mapping[str, object]) -> None:
        """Add one finished epoch."""
        with (self.path / METRICS_FILE).open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def history(self) -> list[dict[str, Any]]:
        """All finished epochs, oldest first. All processes call it."""
        return processes.made_by_first(self._read_history)

    def _read_history(self) -> list[dict[str, Any]]:
        if not (self.path / METRICS_FILE).exists():
            return []
        text = (self.path / METRICS_FILE).read_text(encoding="utf-8")
        return [json.loads(line) for line in text.splitlines()]

    def _metrics_bytes(self) -> int:
        path = self.path / METRICS_FILE
        return path.stat().st_size if path.exists() else 0

    def _cut_metrics(self, size: int) -> None:
        if self._metrics_bytes() < size:
            raise ValueError(
                f"{self.path / METRICS_FILE} has {self._metrics_bytes()} bytes, but had {size} when the "
                f"state was saved; delete {self.path} to train anew"
            )
        if self._metrics_bytes() > size:
            os.truncate(self.path / METRICS_FILE, size)

    def _require_same(self, commit: dict[str, Any], settings: Mapping[str, object]) -> None:
        if commit.get("schema_version") != SCHEMA_VERSION:
            raise ValueError(
                f"{self.path / STATE_FILE} has schema_version {commit.get('schema_version')}, this program "
                f"reads {SCHEMA_VERSION}; delete {self.path} to train anew"
            )
        if missing := sorted({"tensors", "position", "metrics_bytes", "random", "settings"} - commit.keys()):
            raise ValueError(
                f"{self.path / STATE_FILE} is damaged (it lacks {', '.join(missing)}); delete {self.path} to train anew"
            )
        saved = commit["settings"]
        expected = json.loads(json.dumps(dict(settings)))
        for name in sorted({*saved, *expected}):
            if saved.get(name) != expected.get(name):
                raise ValueError(
                    f"{self.path} holds a training with {name} = {saved.get(name)}, but {expected.get(name)} "
                    "is asked for; restore the setting, or delete the directory to train anew"
                )

    def _load_tensors(self, name: str) -> dict[str, Tensor]:
        try:
            return load_file(self.path / name)
        except (OSError, SafetensorError) as error:
            raise ValueError(
                f"{self.path / name} is missing or damaged ({error}); delete {self.path} to train anew"
            ) from error

    def _remove_all_but(self, keep: set[str]) -> None:
        for pattern in ("state-*.safetensors*", "best-*.safetensors*"):
            for path in self.path.glob(pattern):
                if path.name not in keep:
                    path.unlink()


def _publish(partial: Path, path: Path) -> None:
    os.replace(partial, path)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def _save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    partial = path.with_name(path.name + ".partial")
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, partial)
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    _publish(partial, path)


def _tensors_of(parts: TrainedParts) -> dict[str, Tensor]:
    return {
        **{f"network.{name}": tensor for name, tensor in parts.network.state_dict().items()},
        **{f"average.{name}": tensor for name, tensor in parts.average.state_dict().items()},
        **{f"optimizer.{name}": tensor for name, tensor in _optimizer_tensors(parts).items()},
    }


def _optimizer_tensors(parts: TrainedParts) -> dict[str, Tensor]:
    """Moments and step counters, named after their parameter; parameters without a gradient have none."""
    return {
        f"{key}.{name}": value
        for name, parameter in parts.network.named_parameters()
        for key, value in parts.optimizer.state.get(parameter, {}).items()
    }


def _restore(parts: TrainedParts, tensors: Mapping[str, Tensor], directory: Path) -> None:
    try:
        parts.network.load_state_dict(dict(_with_prefix(tensors, "network.")))
        parts.average.load_state_dict(dict(_with_prefix(tensors, "average.")))
    except RuntimeError as error:
        difference = textwrap.shorten(str(error), 300)
        raise ValueError(f"{directory} holds another network ({difference}); delete it to train anew") from error
    parameters = dict(parts.network.named_parameters())
    for full_name, value in _with_prefix(tensors, "optimizer."):
        key, name = full_name.split(".", 1)
        parts.optimizer.state[parameters[name]][key] = _like_parameter(value, parameters[name])


def _with_prefix(tensors: Mapping[str, Tensor], prefix: str) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in tensors.items():
        if name.startswith(prefix):
            yield name.removeprefix(prefix), tensor


def _like_parameter(value: Tensor, parameter: Tensor) -> Tensor:
    """Moments must lie in memory as their parameter does: the fused optimiser walks both linearly."""
    if value.ndim == 0:
        return value.to(parameter.device)
    return torch.empty_like(parameter, requires_grad=False).copy_(value)


@dataclass(frozen=True)
class _RandomStates:
    """The random states of one process: torch's by device, and Python's and numpy's as JSON values."""

    torch: dict[str, Tensor]
    plain: dict[str, Any]


def _random_states() -> _RandomStates:
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states |= {f"cuda{index}": state for index, state in enumerate(torch.cuda.get_rng_state_all())}
    return _RandomStates(states, {"python": random.getstate(), "numpy": _numpy_random_state()})


def _random_name(device: str, process: int) -> str:
    return f"random.{device}.process{process}" if process else f"random.{device}"


def _numpy_random_state() -> list[Any]:
    name, keys, *rest = np.random.get_state(legacy=True)
    return [name, np.asarray(keys).tolist(), *rest]


def _set_random_states(tensors: Mapping[str, Tensor], plain: list[dict[str, Any]], step: int) -> None:
    """Go on with this process's own states; one that has none here takes new ones that no other process has."""
    process = processes.rank()
    if process >= len(plain):
        torch.manual_seed(torch.initial_seed() + step * processes.count())
        return
    torch.set_rng_state(tensors[_random_name("cpu", process)])
    for index in range(torch.cuda.device_count()):
        name = _random_name(f"cuda{index}", process)
        if name in tensors:
            torch.cuda.set_rng_state(tensors[name], index)
    others = plain[process]
    version, words, gauss = others["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, *rest = others["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
