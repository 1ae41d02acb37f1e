"""Checkpoints come back bit for bit, are never half-written, refuse what is broken, and cross class lists."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import model
from model import checkpoint
from model.checkpoint import CheckpointMetadata, load_checkpoint, save_checkpoint, transfer_weights
from model.preprocessing import Preprocessing
from model.yolo_nas import YoloNAS

METADATA = CheckpointMetadata(
    variant="pico",
    class_names=("cat", "dog"),
    preprocessing=Preprocessing(128, margin=4),
    step=17,
    parents={"dataset": "sha256:ab"},
    lineage={"weights": ["random"], "annotations": "CC-BY-4.0", "images": {"CC0": 3}},
)


def _trained_network(num_classes: int = 2) -> YoloNAS:
    """A network whose running statistics are not the initial ones."""
    network = model.build("pico", num_classes)
    network(torch.rand(2, 3, 64, 64))
    return network.eval()


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, YoloNAS]:
    network = _trained_network()
    save_checkpoint(tmp_path / "checkpoint", network, METADATA)
    return tmp_path / "checkpoint", network


def test_round_trip_is_exact(saved):
    directory, network = saved
    loaded, metadata = load_checkpoint(directory)
    assert metadata == METADATA
    assert not loaded.training and not loaded.fused
    for key, value in network.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value), key
    assert torch.equal(model.load(directory).heads.head1.cls_pred.bias, network.heads.head1.cls_pred.bias)


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_a_weight_that_is_no_number_is_named(saved, value):
    directory, network = saved
    with torch.no_grad():
        network.heads.head1.cls_pred.weight[1, 0] = value
    save_checkpoint(directory, network, METADATA)
    sentence = rf"model\.safetensors: heads\.head1\.cls_pred\.weight holds {value:g}, .*use another checkpoint"
    with pytest.raises(ValueError, match=sentence):
        load_checkpoint(directory)


def test_fused_networks_come_back_fused(tmp_path):
    network = _trained_network().fuse()
    save_checkpoint(tmp_path / "fused", network, METADATA)
    loaded, _ = load_checkpoint(tmp_path / "fused")
    assert loaded.fused
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(loaded(images)[0][0], network(images)[0][0])


def test_same_content_gives_same_bytes(saved, tmp_path):
    directory, network = saved
    save_checkpoint(tmp_path / "again", network, METADATA)
    for name in (checkpoint.WEIGHTS_FILE, checkpoint.METADATA_FILE):
        assert (tmp_path / "again" / name).read_bytes() == (directory / name).read_bytes()


def test_saving_again_replaces_and_leaves_nothing_beside(saved):
    directory, network = saved
    save_checkpoint(directory, network, replace(METADATA, step=18))
    assert load_checkpoint(directory)[1].step == 18
    assert [path.name for path in directory.parent.iterdir()] == ["checkpoint"]


def test_failure_while_writing_keeps_the_old_checkpoint(saved, monkeypatch):
    directory, network = saved

    def fail(path: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "_flush", fail)
    with pytest.raises(OSError):
        save_checkpoint(directory, network, replace(METADATA, step=18))
    assert load_checkpoint(directory)[1].step == 17
    assert [path.name for path in directory.parent.iterdir()] == ["checkpoint"]


def test_metadata_must_describe_the_model(tmp_path):
    with pytest.raises(ValueError, match="metadata says pico with 2 classes, the model is pico with 3"):
        save_checkpoint(tmp_path / "checkpoint", model.build("pico", 3), METADATA)
    assert not list(tmp_path.iterdir())


def test_missing_directory_names_the_file(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere/checkpoint.json cannot be read \(No such file or directory\)"):
        load_checkpoint(tmp_path / "nowhere")


def test_missing_and_truncated_weights_name_the_file(saved):
    directory, _ = saved
    weights = directory / checkpoint.WEIGHTS_FILE
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"model.safetensors is missing or damaged .* train the checkpoint again"):
        load_checkpoint(directory)
    weights.unlink()
    with pytest.raises(ValueError, match=r"model.safetensors is missing or damaged"):
        load_checkpoint(directory)


def _edit(directory: Path, **changes) -> None:
    path = directory / checkpoint.METADATA_FILE
    record = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in record.items() if value is not None}))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"schema_version": 2}, "schema_version must be 1, got 2"),
        ({"schema_version": None}, "schema_version must be 1, got None"),
        ({"variant": "xxl"}, "variant must be one of pico, t, n, s, m, l, got 'xxl'"),
        ({"step": None}, "expected the fields"),
        ({"colour": "red"}, "expected the fields"),
        ({"fused": None}, "fused"),
        ({"class_names": []}, "class_names is empty"),
        ({"class_names": "cat"}, "class_names must be a JSON list, got 'cat'"),
        ({"step": "17"}, "step must be a JSON int, got '17'"),
        ({"class_names": ["cat", "cat"]}, "must be unique, repeated: cat"),
        ({"preprocessing": {"input_size": 10, "margin": 0, "pad_value": 0}}, "multiple of 32, got 10"),
        ({"class_names": ["cat", "dog", "cow"]}, "does not hold the weights of a pico with 3 classes"),
        ({"variant": "n"}, "does not hold the weights of a n with 2 classes"),
    ],
)
def test_wrong_metadata_names_file_and_field(saved, changes, message):
    directory, _ = saved
    _edit(directory, **changes)
    with pytest.raises(ValueError, match=message) as caught:
        load_checkpoint(directory)
    assert str(directory) in str(caught.value)


def test_broken_json_names_the_file(saved):
    directory, _ = saved
    (directory / checkpoint.METADATA_FILE).write_text('{"variant": ')
    with pytest.raises(ValueError, match=r"checkpoint.json is not valid checkpoint metadata"):
        load_checkpoint(directory)


def test_transfer_keeps_the_rows_of_shared_class_names():
    source, target = _trained_network(3), model.build("pico", 4)
    fresh = {key: value.clone() for key, value in target.state_dict().items()}
    report = transfer_weights(target, source.state_dict(), ["cat", "dog", "cow"], ["owl", "cow", "bee", "cat"])
    assert report.classes_kept == ["cow", "cat"]
    assert report.reinitialised == []
    assert set(report.kept) == set(fresh)
    for key, value in target.state_dict().items():
        if ".cls_pred." in key:
            assert torch.equal(value[[1, 3]], source.state_dict()[key][[2, 0]]), key
            assert torch.equal(value[[0, 2]], fresh[key][[0, 2]]), key
        else:
            assert torch.equal(value, source.state_dict()[key]), key


def test_transfer_without_shared_names_keeps_fresh_class_predictions():
    source, target = _trained_network(2), model.build("pico", 2)
    fresh = {key: value.clone() for key, value in target.state_dict().items()}
    report = transfer_weights(target, source.state_dict(), ["square", "ring"], ["0", "1"])
    assert report.classes_kept == []
    assert report.reinitialised == [key for key in fresh if ".cls_pred." in key]
    assert all(torch.equal(target.state_dict()[key], fresh[key]) for key in report.reinitialised)


def test_transfer_between_variants_reports_what_did_not_fit():
    source, target = model.build("n", 2), model.build("pico", 2)
    report = transfer_weights(target, source.state_dict(), ["a", "b"], ["a", "b"])
    assert "backbone.stem.conv.branch_3x3.conv.weight" in report.reinitialised
    assert "backbone.stage1.blocks.bottlenecks.0.alpha" in report.kept
    assert set(report.unused) == source.state_dict().keys() - set(report.kept)


@pytest.mark.parametrize(
    "source_names, target_names, message",
    [
        (["a", "b", "c"], ["a", "b"], "source weights have 2 classes, but 3 names"),
        (["a", "b"], ["a"], "the model has 2 classes, but 1 names"),
        (["a", "a"], ["a", "b"], "must be unique, repeated: a"),
    ],
)
def test_transfer_checks_the_class_lists(source_names, target_names, message):
    network = model.build("pico", 2)
    with pytest.raises(ValueError, match=message):
        transfer_weights(network, model.build("pico", 2).state_dict(), source_names, target_names)
