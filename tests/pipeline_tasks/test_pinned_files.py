"""Further teachers and true boxes: pinned by content, part of the keys they matter to, and the champion as teacher."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import model
from model.checkpoint import CheckpointMetadata, save_checkpoint
from model.preprocessing import Preprocessing
from pipeline_tasks import digests, pinned_files, start
from pipeline_tasks.errors import DataError, ParameterError, UsageError
from pipeline_tasks.keys import RunKeys, key_content
from pipeline_tasks.params import resolve
from pipeline_tasks.steps import definition
from pipeline_tasks.tracking import registry
from pipeline_tasks.workspace import Workspace, write_json

CHAMPION = {"name": "m", "version": "3", "digest": "engine 3", "directory": "champions/m-v3"}


TEACHERS = {"fitting": ("star", "square", "circle"), "lacking": ("square",)}
TRUTH = {
    "images": [{"id": 1, "file_name": "a.jpg"}],
    "categories": [{"id": 3, "name": "cat"}],
    "annotations": [{"image_id": 1, "category_id": 3, "bbox": [0, 0, 10, 10]}],
}


def _checkpoint(folder: Path, seed: int, class_names: tuple[str, ...] = ("cat",)) -> Path:
    torch.manual_seed(seed)
    network = model.build("pico", len(class_names))
    save_checkpoint(folder, network, CheckpointMetadata("pico", class_names, Preprocessing(64), 0))
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
    first, second = (_checkpoint(tmp_path / name, seed) for seed, name in enumerate(("one", "two")))
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
    truth.write_text(json.dumps(TRUTH))
    measured = _frozen(pseudo_label__true_boxes=str(truth))
    assert _key(workspace, measured, "teach") == _key(workspace, _frozen(), "teach")
    assert _key(workspace, measured, "pseudo_label") != _key(workspace, _frozen(), "pseudo_label")


@pytest.mark.parametrize("field", ["teach.extra_checkpoints", "pseudo_label.true_boxes"])
def test_what_is_missing_is_told_when_the_run_starts(field: str, tmp_path: Path) -> None:
    place = str(tmp_path / "nothing")
    parameters = resolve(None, {field: [place] if field.endswith("checkpoints") else place})
    with pytest.raises(DataError, match=rf"{field}: {place}.* cannot be read \(No such file or directory\); give a"):
        pinned_files.pin(parameters)


@pytest.mark.parametrize(
    ("damaged", "content", "message"),
    [
        ("checkpoint.json", "x", r"checkpoint\.json is not valid checkpoint metadata .*; use another checkpoint"),
        ("model.safetensors", "y", r"model\.safetensors is missing or damaged .*; copy or train the checkpoint again"),
    ],
)
def test_a_teacher_that_cannot_be_read_is_told_when_the_run_starts(
    damaged: str, content: str, message: str, tmp_path: Path
) -> None:
    folder = _checkpoint(tmp_path / "one", 1)
    (folder / damaged).write_text(content)
    with pytest.raises(ParameterError, match=rf"^teach\.extra_checkpoints: {folder}/{message}$"):
        pinned_files.pin(resolve(None, {"teach.extra_checkpoints": [str(folder)]}))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("nope", "cannot be read .*; give a COCO annotation file"),
        ("[]", "is no COCO annotation file: it holds a list; give one"),
        ("{}", r"is no COCO annotation file: KeyError\('categories'\) in its records; give one"),
        (json.dumps({**TRUTH, "images": [{"id": 1}]}), r"KeyError\('file_name'\) in its records; give one"),
        (json.dumps({**TRUTH, "annotations": [{"image_id": 1, "category_id": 3, "bbox": [1]}]}), "in its records"),
        (json.dumps({**TRUTH, "images": []}), "lists no pictures; give the COCO annotation file of the pictures"),
    ],
)
def test_true_boxes_that_cannot_be_read_are_told_when_the_run_starts(
    content: str, message: str, tmp_path: Path
) -> None:
    truth = tmp_path / "truth.json"
    truth.write_text(content)
    with pytest.raises(ParameterError, match=rf"^pseudo_label\.true_boxes: {truth} .*{message}"):
        pinned_files.pin(resolve(None, {"pseudo_label.true_boxes": str(truth)}))


def test_a_teacher_that_lacks_a_class_is_told_before_the_pretraining(
    nasline: Callable[..., str], coco_folder: Any, tmp_path: Path
) -> None:
    """By the first step that knows the target's classes, also where another run has done it."""
    strangers = [_checkpoint(tmp_path / name, 1, names) for name, names in TEACHERS.items()]
    words = ("start", "--start.dataset", coco_folder.path, "--teach.extra_checkpoints")
    for run, folders in {"one": strangers, "two": strangers, "three": strangers[:1]}.items():
        nasline(*words, f"[{', '.join(map(str, folders))}]", "--run", run, code=0)
    for run in ("one", "two"):
        sentence = nasline("validate_data", "--run", run, code=65)
        assert f"teach.extra_checkpoints: the teacher {strangers[1]} does not know the target's classes" in sentence
        assert sentence.endswith("leave it out")
    assert '"reused": true' in nasline("validate_data", "--run", "three", code=0)


@pytest.mark.parametrize(("source", "member"), [("champion", "student"), ("champion_teacher", "teacher/members/1")])
def test_a_champion_that_is_to_teach_and_lacks_a_class_is_told_before_the_pretraining(
    nasline: Callable[..., str],
    coco_folder: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    source: str,
    member: str,
) -> None:
    bundle = tmp_path / "workspace" / CHAMPION["directory"]
    for folder in ("student", "teacher", "teacher/members/1"):
        _checkpoint(bundle / folder, 1, TEACHERS["lacking" if folder == member else "fitting"])
    found = {**CHAMPION, registry.PINNED: registry.bundle_digest(bundle)}
    monkeypatch.setattr(start.registry, "fetch_champion", lambda *_: found)
    start_run = ("start", "--start.dataset", coco_folder.path, "--run", "r", "--teach.source")
    nasline(*start_run, source, code=0)
    sentence = nasline("validate_data", "--run", "r", code=65)
    assert f"teach.source: the teacher {bundle / member} does not know the target's classes" in sentence
    assert sentence.endswith("set teach.source to train")


def test_a_run_of_an_older_release_goes_on(tmp_path: Path) -> None:
    """It has pinned no class names."""
    frozen = _frozen(teach__extra_checkpoints=[str(_checkpoint(tmp_path / "one", 1))])
    older = json.loads(json.dumps(frozen))
    assert older[pinned_files.FIELD]["teach"]["extra_teachers_1"].pop("class_names") == ["cat"]
    assert start._continue_existing(older, frozen) is older
    older[pinned_files.FIELD]["teach"]["extra_teachers_1"]["digest"] = "another"
    with pytest.raises(UsageError, match="exists with other pinned_files"):
        start._continue_existing(older, frozen)


def test_a_file_that_changed_since_the_start_is_refused(tmp_path: Path) -> None:
    folder = _checkpoint(tmp_path / "one", 1)
    (entry,) = pinned_files.pin(resolve(None, {"teach.extra_checkpoints": [str(folder)]}))["teach"].values()
    pinned_files.require_unchanged("teach.extra_checkpoints", folder, entry["digest"])
    _checkpoint(folder, 2)
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
