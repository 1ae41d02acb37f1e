"""A run that begins from a checkpoint folder: pinned, part of the keys, its weights and lineage taken over."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest
import torch

import model
from model.checkpoint import CheckpointMetadata, load_checkpoint, save_checkpoint
from model.data.tables import BOXES_SCHEMA, IMAGES_SCHEMA, DatasetMetadata, write_dataset
from model.preprocessing import Preprocessing
from pipeline_tasks import initial_checkpoint, pretrain
from pipeline_tasks.errors import DataError, ParameterError
from pipeline_tasks.execution import StepContext
from pipeline_tasks.keys import RunKeys
from pipeline_tasks.params import resolve
from pipeline_tasks.workspace import Workspace, write_json

LINEAGE = {"weights": ["somebody's licence"], "annotations": ["unknown"], "images": {"a file": {"unknown": 0}}}
NETWORKS = {"start.student_variant": "pico", "start.teacher_variant": "t", "start.image_size": 64}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A pico that knows cats and dogs."""
    torch.manual_seed(5)
    metadata = CheckpointMetadata("pico", ("cat", "dog"), Preprocessing(640, margin=4), 9, lineage=LINEAGE)
    save_checkpoint(tmp_path / "checkpoint", model.build("pico", 2), metadata)
    return tmp_path / "checkpoint"


def frozen_run(folder: Path | None, **options: Any) -> dict[str, Any]:
    start = {"start.initial_checkpoint": str(folder)} if folder else {}
    parameters = resolve(None, {**NETWORKS, **start, **options})
    return {
        "run": "r",
        "parameters": parameters.to_json(),
        "datasets": {"target": {"path": "/nowhere", "digest": "t1", "dvc_revision": None}},
        "champion": None,
        "registry": "workspace",
        "initial_checkpoint": initial_checkpoint.pin(parameters),
        "steps": {},
    }


def pretrain_keys(workspace: Workspace, frozen: dict[str, Any]) -> dict[str, str]:
    """Keys of both parts, behind a validate_data that is published by hand."""
    keys = RunKeys(workspace, frozen)
    directory = workspace.step_directory("validate_data", keys.of("validate_data").key)
    write_json(directory / "manifest.json", {"files": {"pretrain/absent.json": {"sha256": "0"}}})
    return {part: keys.of("pretrain", part).key for part in ("student", "teacher")}


def context_of(folder: Path | None, tmp_path: Path, part: str = "student") -> StepContext:
    """What `pretrain` is given; without a pretraining set."""
    frozen = frozen_run(folder)
    pinned = initial_checkpoint.for_part(frozen, part)
    (tmp_path / "set").mkdir(exist_ok=True)
    (tmp_path / "set/absent.json").write_text("{}")
    (tmp_path / "output").mkdir()
    unused: Any = None
    return StepContext(
        parameters=resolve(None, {**NETWORKS, "start.threads": 1}),
        part=part,
        inputs={"pretrain": tmp_path / "set", **({"initial_checkpoint": Path(pinned["path"])} if pinned else {})},
        input_digests={"pretrain": "p", **({"initial_checkpoint": pinned["digest"]} if pinned else {})},
        output=tmp_path / "output",
        state=tmp_path,
        published=tmp_path,
        workspace=unused,
        run=frozen,
        champion=None,
        stopper=unused,
        tracker=unused,
        save_state=unused,
    )


def test_it_is_part_of_the_key_of_the_network_it_fits_and_of_no_other(folder: Path, tmp_path: Path) -> None:
    workspace = Workspace(tmp_path / "workspace")
    without = frozen_run(None)
    random = pretrain_keys(workspace, without)
    older = {name: value for name, value in without.items() if name != "initial_checkpoint"}
    assert pretrain_keys(workspace, older) == random
    begun = pretrain_keys(workspace, frozen_run(folder))
    assert begun["student"] != random["student"]
    assert begun["teacher"] == random["teacher"]
    moved = folder.rename(tmp_path / "moved")
    assert pretrain_keys(workspace, frozen_run(moved)) == begun, "content counts, not the place"
    save_checkpoint(moved, model.build("pico", 2), load_checkpoint(moved)[1])
    assert pretrain_keys(workspace, frozen_run(moved))["student"] not in (begun["student"], random["student"])


def test_without_a_pretraining_set_it_is_published_as_it_is(folder: Path, tmp_path: Path) -> None:
    assert pretrain.pretrain(context_of(folder, tmp_path)) == {"pretrained": 0}
    network, metadata = load_checkpoint(tmp_path / "output/checkpoint")
    given = model.load(folder).state_dict()
    assert all(torch.equal(value, given[key]) for key, value in network.state_dict().items())
    assert (metadata.class_names, metadata.step, metadata.lineage) == (("cat", "dog"), 9, LINEAGE)
    assert metadata.parents["initial_checkpoint"] == frozen_run(folder)["initial_checkpoint"]["digest"]


def test_the_other_network_starts_from_random_weights(folder: Path, tmp_path: Path) -> None:
    pretrain.pretrain(context_of(folder, tmp_path, "teacher"))
    metadata = load_checkpoint(tmp_path / "output/checkpoint")[1]
    assert (metadata.variant, metadata.lineage) == ("t", pretrain.RANDOM_WEIGHTS)


def test_pretraining_goes_on_from_it(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The network that is trained has its weights, and the rows of classes of the same name."""
    tasks: list[Any] = []

    def run_training(_: StepContext, task: Any) -> Any:
        tasks.append(task)
        return SimpleNamespace(total_steps=3)

    monkeypatch.setattr(pretrain, "run_training", run_training)
    monkeypatch.setattr(pretrain, "training_summary", lambda *_: {})
    context = context_of(folder, tmp_path)
    (tmp_path / "set/absent.json").unlink()
    licences = {"images": {"MIT": 1}, "annotations": "CC0-1.0"}
    metadata = DatasetMetadata("set", ("dog", "owl"), (1, 2), ("pretrain",), licences=licences)
    image = {"image_id": 0, "original_id": "0", "root": 0, "path": "a", "width": 9, "height": 9, "split": "train"}
    tables = pa.Table.from_pylist([image], schema=IMAGES_SCHEMA), pa.Table.from_pylist([], schema=BOXES_SCHEMA)
    write_dataset(tmp_path / "set", *tables, metadata)
    assert pretrain.pretrain(context) == {"pretrained": 1}
    network, given = tasks[0].model.state_dict(), model.load(folder).state_dict()
    assert all(torch.equal(value, given[key]) for key, value in network.items() if ".cls_pred." not in key)
    assert torch.equal(network["heads.head1.cls_pred.weight"][0], given["heads.head1.cls_pred.weight"][1])
    assert tasks[0].transfer.report.classes_kept == ["dog"]
    lineage = load_checkpoint(tmp_path / "output/checkpoint")[1].lineage
    assert lineage["weights"] == ["somebody's licence"]
    assert lineage["annotations"] == ["CC0-1.0", "unknown"] and len(lineage["images"]) == 2


def test_a_checkpoint_changed_after_the_start_is_refused(folder: Path, tmp_path: Path) -> None:
    context = context_of(folder, tmp_path)
    (folder / "checkpoint.json").write_text((folder / "checkpoint.json").read_text().replace("dog", "dig"))
    with pytest.raises(DataError, match="checkpoint was changed since the run started; start the run anew"):
        pretrain.pretrain(context)
    (folder / "model.safetensors").unlink()
    with pytest.raises(DataError, match=r"model.safetensors cannot be read \(No such file"):
        pretrain.pretrain(context)
    assert list((tmp_path / "output").iterdir()) == []


def test_what_no_run_can_begin_from(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"start.initial_checkpoint: folder \S+nowhere does not exist"):
        frozen_run(tmp_path / "nowhere")
    with pytest.raises(ParameterError, match="two beginnings; give one of them"):
        frozen_run(folder, **{"start.from_champion": True})
    with pytest.raises(ParameterError, match=r"variant pico, but start.student_variant is n and start.teacher_variant"):
        frozen_run(folder, **{"start.student_variant": "n"})
    save_checkpoint(folder, model.build("pico", 2).eval().fuse(), load_checkpoint(folder)[1])
    with pytest.raises(ParameterError, match="is folded, so it cannot be trained"):
        frozen_run(folder)
    (folder / "model.safetensors").write_bytes(b"half")
    with pytest.raises(ValueError, match=r"model.safetensors is missing or damaged"):
        frozen_run(folder)
