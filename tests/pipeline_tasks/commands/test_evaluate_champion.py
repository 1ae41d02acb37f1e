"""The champion on today's data: the outcome in a sentence, and measured once per version and data."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from pipeline_tasks.commands import evaluate, evaluate_champion
from pipeline_tasks.commands.evaluate_champion import Evaluation
from pipeline_tasks.errors import DataError, UsageError
from pipeline_tasks.params import resolve
from pipeline_tasks.tracking import registry
from pipeline_tasks.workspace import Workspace

if TYPE_CHECKING:
    from tests.pipeline_tasks.conftest import CocoFolder


def evaluation(before: float, today: float, limit: float | None) -> Evaluation:
    return Evaluation("cells", "3", "cells abcdef", before, today, limit, Path(), False)


def test_a_drop_is_more_than_the_limit() -> None:
    assert not evaluation(0.412, 0.392, 2.0001).dropped
    assert evaluation(0.412, 0.391, 2.0).dropped
    assert not evaluation(0.412, 0.0, None).dropped and not evaluation(0.3, 0.4, 0.0).dropped
    assert evaluation(0.412, 0.382, 2.0).sentence() == (
        "champion cells v3 DROPPED: mAP50-95 0.3820 on today's test images, 3.00 points less than at the gate "
        "(0.4120; the limit is 2, register.maximum_champion_drop)"
    )
    assert "holds: mAP50-95 0.4000 on today's test images, 10.00 points more" in evaluation(0.3, 0.4, 2.0).sentence()
    assert "as much as at the gate (0.3000; no limit is set" in evaluation(0.3, 0.3, None).sentence()


@pytest.fixture
def champion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The fetched bundle of a champion, which the gate measured at 0.5."""
    bundle = tmp_path / "workspace" / "champions" / "cells-v3"
    (bundle / "gate").mkdir(parents=True)
    (bundle / "gate" / "accuracy.json").write_text(json.dumps({"int8": {"map50_95": 0.5}}))
    found = {"name": "cells", "version": "3", "digest": "0" * 64, "directory": "champions/cells-v3"}
    monkeypatch.setattr(registry, "fetch_champion", lambda *_: found)
    return bundle


def test_the_same_champion_on_the_same_data_is_measured_once(
    coco_folder: CocoFolder, champion: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[str] = []

    def fake_evaluate(place: str, dataset: Path, split: str, out: Path, **_: Any) -> None:
        measured.append(place)
        out.mkdir(parents=True)
        (out / "metrics.json").write_text(json.dumps({"map50_95": 0.45}))

    monkeypatch.setattr(evaluate, "evaluate", fake_evaluate)
    workspace, parameters = Workspace(tmp_path / "workspace"), resolve(None, {"start.dataset": str(coco_folder.path)})
    first, again = (evaluate_champion.evaluate_champion(workspace, parameters) for _ in range(2))
    assert measured == [str(champion / "engine")]
    assert (first.reused, again.reused) == (False, True)
    assert again.drop_points == pytest.approx(5.0) and again.dropped
    with coco_folder.edit("test") as content:
        content["annotations"][0]["bbox"][0] += 1
    assert not evaluate_champion.evaluate_champion(workspace, parameters).reused
    (champion / "gate" / "accuracy.json").unlink()
    with pytest.raises(DataError, match="cells v3 has no accuracy of the gate to compare with"):
        evaluate_champion.evaluate_champion(workspace, parameters)


@pytest.mark.parametrize("options", ["[1]", "null", "{"])
def test_options_that_are_no_object_are_refused(nasline: Callable[..., str], options: str) -> None:
    assert "--options-json " in nasline("evaluate-champion", "--options-json", options, code=2)


def test_without_a_champion_there_is_nothing_to_measure(
    coco_folder: CocoFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "fetch_champion", lambda *_: None)
    with pytest.raises(UsageError, match="model 'yolo_nas' has no champion"):
        evaluate_champion.evaluate_champion(
            Workspace(tmp_path), resolve(None, {"start.dataset": str(coco_folder.path)})
        )
