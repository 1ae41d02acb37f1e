"""The champion's bundle is trusted as a whole, so every file of it is compared with what was registered."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest

from pipeline_tasks.errors import DataError
from pipeline_tasks.tracking import registration, registry
from pipeline_tasks.tracking.champions import ChampionMovedError, Compared
from pipeline_tasks.tracking.registry import (
    BEST_TAG,
    BUNDLE_TAG,
    ENGINE_TAG,
    bundle_digest,
    fetch_champion,
    fetch_model,
    require_unchanged,
)
from pipeline_tasks.workspace import Workspace

FILES = (
    "engine/model.onnx", "gate/verdict.json", "gate/accuracy.json", "student/model.safetensors",
    "teacher/model.safetensors", "lineage.json", "best/engine/model.onnx", "best/lineage.json",
)  # fmt: skip


def write_bundle(folder: Path) -> Path:
    for name in FILES:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    return folder


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return write_bundle(tmp_path / "registered")


def pinned(bundle: Path, **changes: Any) -> dict[str, Any]:
    digests = {"digest": bundle_digest(bundle / "engine"), "bundle": bundle_digest(bundle)}
    return {"name": "yolo", "version": "7", **digests, **changes}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("harm", [lambda file: file.write_text("another"), lambda file: file.unlink()])
def test_an_edited_bundle_is_not_the_champion(bundle: Path, name: str, harm: Callable[[Path], Any]) -> None:
    entry = pinned(bundle)
    require_unchanged(bundle, entry)
    harm(bundle / name)
    with pytest.raises(DataError, match=rf"{bundle} is not the bundle of yolo v7 .* remove the folder {bundle},"):
        require_unchanged(bundle, entry)


def test_a_file_that_was_put_into_a_bundle_is_seen(bundle: Path) -> None:
    shutil.rmtree(bundle / "best")
    entry = pinned(bundle)
    write_bundle(bundle)
    with pytest.raises(DataError, match="is not the bundle of yolo v7"):
        require_unchanged(bundle, entry)


@pytest.mark.parametrize("old", [{"bundle": None}, {}])
def test_of_an_older_run_the_engine_is_compared(bundle: Path, old: dict[str, Any]) -> None:
    entry = {**{name: value for name, value in pinned(bundle).items() if name != "bundle"}, **old}
    (bundle / "lineage.json").write_text("another")
    require_unchanged(bundle, entry)
    (bundle / "engine/model.onnx").write_text("another")
    with pytest.raises(DataError, match=rf"{bundle}/engine is not the engine of yolo v7"):
        require_unchanged(bundle, entry)


@pytest.fixture
def server(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A registry that holds the bundle as version 7, its champion."""
    tags = {ENGINE_TAG: bundle_digest(bundle / "engine"), BUNDLE_TAG: bundle_digest(bundle)}
    version = SimpleNamespace(version=7, tags=tags)
    monkeypatch.setattr(registry, "store_exists", lambda _: True)
    monkeypatch.setattr(registry, "open_store", lambda _: None)
    monkeypatch.setattr(registry, "version_by_alias", lambda *_: version)
    monkeypatch.setattr(registry, "version_by_number", lambda *_: version)
    monkeypatch.setattr(registry, "_download", lambda _, __, folder: shutil.copytree(bundle, folder))
    return version


def test_the_whole_bundle_is_pinned(server: SimpleNamespace, bundle: Path, tmp_path: Path) -> None:
    workspace = Workspace(tmp_path / "workspace")
    (workspace.root / "champions").mkdir(parents=True)
    champion = fetch_champion(workspace, "yolo")
    assert champion and champion["bundle"] == bundle_digest(bundle)
    require_unchanged(workspace.root / champion["directory"], champion)
    del server.tags[BUNDLE_TAG]  # registered by an older release
    assert fetch_champion(workspace, "yolo") == champion
    (workspace.root / champion["directory"] / "engine/model.onnx").write_text("another")
    with pytest.raises(DataError, match="is not the engine of yolo v7"):
        fetch_champion(workspace, "yolo")


@pytest.mark.parametrize("before", [True, False])
def test_a_bundle_that_is_not_the_registered_one_is_refused(
    server: SimpleNamespace, bundle: Path, tmp_path: Path, before: bool
) -> None:
    """Edited in the artifact store before it is fetched, or in the workspace behind that."""
    workspace = Workspace(tmp_path / "workspace")
    (workspace.root / "champions").mkdir(parents=True)
    edited = bundle if before else fetch_model(workspace, "models:/yolo@champion")
    (edited / "lineage.json").write_text("another")
    for fetch in (lambda: fetch_model(workspace, "models:/yolo/7"), lambda: fetch_champion(workspace, "yolo")):
        with pytest.raises(DataError, match=r"is not the bundle of yolo v7 .* remove the folder"):
            fetch()


def test_a_version_keeps_the_digest_of_the_bundle_it_was_made_with(monkeypatch: pytest.MonkeyPatch) -> None:
    told: dict[str, str] = {}
    client = SimpleNamespace(
        set_model_version_tag=lambda _, __, key, value: told.update({key: value}),
        set_registered_model_alias=lambda *_: None,
        search_model_versions=lambda _: [SimpleNamespace(version=7)],
    )
    monkeypatch.setattr(registration, "open_store", lambda _: client)
    tags = {ENGINE_TAG: "same", BEST_TAG: "itself", BUNDLE_TAG: "of today's run", "nasline.run": "today"}
    workspace: Any = None
    registration.register_bundle(workspace, "yolo", Path("bundle"), None, tags, promote=False)
    assert told == {ENGINE_TAG: "same", BEST_TAG: "itself", "nasline.run": "today"}


def test_a_version_whose_gate_compared_with_another_champion_is_registered_and_no_champion(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    told: list[Compared | None] = []

    def refuse(*arguments: Any) -> None:
        told.append(arguments[-1])
        raise ChampionMovedError("yolo v7 was compared with v5")

    client = Mock(search_model_versions=lambda _: [SimpleNamespace(version=7)])
    monkeypatch.setattr(registration, "open_store", lambda _: client)
    monkeypatch.setattr(registration, "move_champion", refuse)
    workspace: Any = None
    tags = {ENGINE_TAG: "same", BEST_TAG: "itself"}
    found = registration.register_bundle(
        workspace, "yolo", Path("bundle"), None, tags, promote=True, compared=Compared("5")
    )
    assert found == {
        "model": "yolo", "version": "7", "aliases": ["candidate"], "not_champion": "yolo v7 was compared with v5"
    }  # fmt: skip
    assert told == [Compared("5")] and "registered, but not champion" in caplog.text
