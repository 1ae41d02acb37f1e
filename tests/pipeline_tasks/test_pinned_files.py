"""Further teachers and true boxes: pinned by content, part of the keys they matter to, and the champion as teacher."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline_tasks import digests, pinned_files, start
from pipeline_tasks.errors import DataError, UsageError
from pipeline_tasks.keys import RunKeys, key_content
from pipeline_tasks.params import resolve
from pipeline_tasks.steps import definition
from pipeline_tasks.workspace import Workspace, write_json

CHAMPION = {"name": "m", "version": "3", "digest": "engine 3", "directory": "champions/m-v3"}


def _checkpoint(folder: Path, weights: str) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "checkpoint.json").write_text("{}")
    (folder / "model.safetensors").write_text(weights)
    return folder


def _frozen(champion: dict[str, str] | None = None, **options: Any) -> dict[str, Any]:
    parameters = resolve(None, {key.replace("__", "."): value for key, value in options.items()})
    return {
        "run": "r",
        "parameters": parameters.to_json(),
        "datasets": {"target": {"path": "/nowhere", "digest": "t1", "dvc_revision": None}},
        "champion": champion,
        "registry": "workspace",
        pinned_files.FIELD: pinned_files.pin(parameters),
        "steps": {},
    }


def _key(workspace: Workspace, frozen: dict[str, Any], step: str) -> str:
    """A step's key, behind steps that are published by hand with the same content for every key."""
    keys = RunKeys(workspace, frozen)
    published = {"pretrain/checkpoint/a": {"sha256": "0"}, "target/a": {"sha256": "1"}, "unlabeled/a": {"sha256": "2"}}
    for before, part in (("validate_data", ""), ("pretrain", "teacher"), ("teach", "")):
        if before == step:
            break
        directory = workspace.step_directory(before, keys.of(before, part).key)
        write_json(directory / "manifest.json", {"files": {**published, "checkpoint/a": {"sha256": before}}})
    return keys.of(step).key


def test_more_teachers_change_the_key_of_teach_by_content_not_by_place(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path / "workspace")
    plain = _frozen()
    without = _key(workspace, plain, "teach")
    assert _key(workspace, {k: v for k, v in plain.items() if k != pinned_files.FIELD}, "teach") == without
    first, second = (_checkpoint(tmp_path / name, name) for name in ("one", "two"))
    key = _key(workspace, _frozen(teach__extra_checkpoints=[str(first)]), "teach")
    assert key != without
    moved = first.rename(tmp_path / "moved")
    assert _key(workspace, _frozen(teach__extra_checkpoints=[str(moved)]), "teach") == key
    assert _key(workspace, _frozen(teach__extra_checkpoints=[str(second)]), "teach") not in (key, without)
    both = _frozen(teach__extra_checkpoints=[str(moved), str(second)])
    assert list(RunKeys(workspace, both).of("teach").inputs) == [
        "target", "weights", "extra_teachers_1", "extra_teachers_2",
    ]  # fmt: skip


def test_true_boxes_change_the_key_of_the_labels_alone(tmp_path: Path) -> None:
    workspace, truth = Workspace(tmp_path / "workspace"), tmp_path / "truth.json"
    truth.write_text("{}")
    measured = _frozen(pseudo_label__true_boxes=str(truth))
    assert _key(workspace, measured, "teach") == _key(workspace, _frozen(), "teach")
    assert _key(workspace, measured, "pseudo_label") != _key(workspace, _frozen(), "pseudo_label")


@pytest.mark.parametrize("field", ["teach.extra_checkpoints", "pseudo_label.true_boxes"])
def test_what_is_missing_is_told_when_the_run_starts(field: str, tmp_path: Path) -> None:
    place = str(tmp_path / "nothing")
    parameters = resolve(None, {field: [place] if field.endswith("checkpoints") else place})
    with pytest.raises(DataError, match=rf"{field}: {place}.* cannot be read \(No such file or directory\); give a"):
        pinned_files.pin(parameters)


def test_a_file_that_changed_since_the_start_is_refused(tmp_path: Path) -> None:
    folder = _checkpoint(tmp_path / "one", "one")
    (entry,) = pinned_files.pin(resolve(None, {"teach.extra_checkpoints": [str(folder)]}))["teach"].values()
    pinned_files.require_unchanged("teach.extra_checkpoints", folder, entry["digest"])
    _checkpoint(folder, "another")
    with pytest.raises(DataError, match="was changed since the run started; start the run anew"):
        pinned_files.require_unchanged("teach.extra_checkpoints", folder, entry["digest"])


@pytest.mark.parametrize(("source", "network"), [("champion", "student"), ("champion_teacher", "teacher")])
def test_champion_takes_the_place_of_the_pretrained_teacher(source: str, network: str, tmp_path: Path) -> None:
    """Its bundle is the input of teach, pinned by version; pretraining the teacher is not waited for."""
    workspace = Workspace(tmp_path / "workspace")
    (workspace.root / CHAMPION["directory"]).mkdir(parents=True)
    keys = RunKeys(workspace, _frozen(CHAMPION, teach__source=source))
    validated = workspace.step_directory("validate_data", keys.of("validate_data").key)
    write_json(validated / "manifest.json", {"files": {"target/a": {"sha256": "1"}}})
    weights = keys.of("teach").inputs["weights"]
    assert weights.folder == workspace.root / CHAMPION["directory"] / network
    assert weights.digest == digests.of_json(["engine 3", network])
    with pytest.raises(UsageError, match="`nasline pretrain --role student --run r` first"):
        keys.of("distill")  # the student still is pretrained


def test_a_champion_that_is_not_there_cannot_teach(tmp_path: Path) -> None:
    parameters = resolve(None, {"teach.source": "champion"})
    with pytest.raises(UsageError, match="model 'yolo_nas' has no champion to start from"):
        start._champion(Workspace(tmp_path), parameters)
    assert start._champion(Workspace(tmp_path), resolve(None, {})) is None


def test_a_teacher_that_is_not_needed_has_a_key_of_its_own() -> None:
    """What pretrain publishes in its place must never be taken for a pretrained teacher."""
    frozen = {"datasets": {}, "champion": None}
    contents = {
        (source, part): digests.of_json(
            key_content(definition("pretrain"), resolve(None, {"teach.source": source}), part, {}, frozen)
        )
        for source in ("train", "champion")
        for part in ("student", "teacher")
    }
    assert contents["train", "student"] == contents["champion", "student"]
    assert contents["train", "teacher"] != contents["champion", "teacher"]
