"""`start.reduced_decoding` reaches the loader, and opens JPEGs at a fraction of their size."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from model.data import loader
from model.preprocessing import Preprocessing
from pipeline_tasks import training_task
from pipeline_tasks.params import StartParameters
from pipeline_tasks.training_parameters import TrainingParameters


@pytest.mark.parametrize("wanted", [False, True])
def test_loader_is_given_reduced_pictures_where_wanted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wanted: bool
) -> None:
    Image.fromarray(np.full((96, 128, 3), 50, np.uint8)).save(tmp_path / "a.jpg")
    given: dict[str, Any] = {}
    monkeypatch.setattr(loader, "TrainingLoader", lambda *arguments, **options: given.update(options))
    start = StartParameters(reduced_decoding=wanted)
    context: Any = SimpleNamespace(parameters=SimpleNamespace(start=start), dataset_roots=lambda: {"target": tmp_path})
    task: Any = SimpleNamespace(training_set=None, preprocessing=Preprocessing(64), parameters=TrainingParameters())
    training_task._loader(context, task)
    assert (given["open_reduced"] is not None) == wanted
    if wanted:
        assert given["open_reduced"]("target/a.jpg", 2).shape == (48, 64, 3)
