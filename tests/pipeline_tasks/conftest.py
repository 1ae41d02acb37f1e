"""A small labelled dataset whose files a test may damage."""

from __future__ import annotations

import json
import logging
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from pipeline_tasks.__main__ import main

WIDTH, HEIGHT = 48, 32


@dataclass(frozen=True)
class CocoFolder:
    """A COCO folder on disk: pictures of noise, two boxes each, categories with the ids 3 and 7."""

    path: Path

    def annotation_file(self, split: str) -> Path:
        return self.path / f"annotations/instances_{split}.json"

    def image(self, split: str, index: int = 0) -> Path:
        return self.path / f"images/{split}_{index}.jpg"

    @contextmanager
    def edit(self, split: str) -> Iterator[Any]:
        """The decoded annotation file; what the block changes is written back."""
        file = self.annotation_file(split)
        content = json.loads(file.read_text())
        yield content
        file.write_text(json.dumps(content))


def write_picture(path: Path, seed: int, width: int = WIDTH, height: int = HEIGHT) -> None:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), pixels)


def _annotation_content(split: str, images: int, first_id: int) -> dict[str, Any]:
    ids = range(first_id, first_id + images)
    return {
        "info": {"description": "noise", "version": "1", "url": "http://example.org"},
        "licenses": [{"id": 1, "name": "CC BY 4.0", "url": ""}, {"id": 2, "name": "MIT", "url": ""}],
        "categories": [{"id": 7, "name": "square"}, {"id": 3, "name": "circle"}],
        "images": [
            {
                "id": i,
                "file_name": f"{split}_{i - first_id}.jpg",
                "width": WIDTH,
                "height": HEIGHT,
                "license": 1 + i % 2,
            }
            for i in ids
        ],
        "annotations": [
            {"id": 2 * i + k, "image_id": i, "category_id": (3, 7)[k], "bbox": [4 + k, 5, 10.5, 8], "area": 60.0 + k}
            for i in ids
            for k in (0, 1)
        ],
    }


CocoMaker = Callable[..., CocoFolder]


@pytest.fixture
def make_coco_folder(tmp_path: Path) -> CocoMaker:
    """Call it with a name, a seed for the pictures and the number of images per split."""

    def make(name: str = "target", seed: int = 0, train: int = 6, val: int = 3, test: int = 3) -> CocoFolder:
        folder = CocoFolder(tmp_path / name)
        folder.annotation_file("train").parent.mkdir(parents=True)
        first_id = 1
        for split, images in (("train", train), ("val", val), ("test", test)):
            for index in range(images):
                write_picture(folder.image(split, index), seed=1000 * seed + first_id + index)
            content = _annotation_content(split, images, first_id)
            folder.annotation_file(split).write_text(json.dumps(content))
            first_id += images
        return folder

    return make


@pytest.fixture
def coco_folder(make_coco_folder: CocoMaker) -> CocoFolder:
    """A clean set with 6 training, 3 validation and 3 test images."""
    return make_coco_folder()


@pytest.fixture(scope="session")
def tracking_store(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One local MLflow store for all tests: creating its tables takes seconds."""
    return f"sqlite:///{tmp_path_factory.mktemp('tracking')}/mlflow.db"


@pytest.fixture
def nasline(
    tmp_path: Path, tracking_store: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Callable[..., str]]:
    """The command line in this process, in a workspace of its own: `nasline("start", ..., code=0)`.

    Fails on another exit code, and unless an error is told in exactly one line; returns that line, else the output.
    """
    monkeypatch.setenv("NASLINE_WORKSPACE", str(tmp_path / "workspace"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracking_store)
    monkeypatch.chdir(tmp_path)
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]

    def run(*arguments: object, code: int) -> str:
        try:
            found = main([str(argument) for argument in arguments])
        except SystemExit as stopped:  # argparse's way to end
            found = int(stopped.code or 0)
        streams = capsys.readouterr()
        output = streams.out + streams.err
        assert found == code, output
        errors = [line for line in output.splitlines() if " ERROR " in line or "error: " in line]
        assert len(errors) == (1 if code else 0), output
        return errors[0] if errors else output

    yield run
    signal.signal(signal.SIGTERM, handlers[0])
    signal.signal(signal.SIGINT, handlers[1])


@pytest.fixture(autouse=True)
def same_logging() -> Iterator[None]:
    """The command line sets logging up for a process; a test's captured stream is closed when it ends."""
    handlers, level = list(logging.getLogger().handlers), logging.getLogger().level
    yield
    logging.getLogger().handlers[:] = handlers
    logging.getLogger().setLevel(level)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests leave nothing in the user's cache folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def git_identity(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name and an address for the commits of a test, whatever the machine's Git knows."""
    for name in ("GIT_AUTHOR", "GIT_COMMITTER"):
        monkeypatch.setenv(f"{name}_NAME", "test")
        monkeypatch.setenv(f"{name}_EMAIL", "test@example.org")
