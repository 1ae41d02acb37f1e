"""Versions in use and what is left over: `nasline data list`, revisions, `nasline data gc`."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from pipeline_tasks.data.comparison import compare
from pipeline_tasks.data.garbage import collect, text
from pipeline_tasks.data.listing import list_sets
from pipeline_tasks.data.listing import text as listing_text
from pipeline_tasks.data.revisions import check_out_digest, digest_at
from pipeline_tasks.data.sets import open_set
from pipeline_tasks.data.versioning import add, adding_marker, dvc_remote, written_aside
from pipeline_tasks.errors import DataError, UsageError


def git(*arguments: str) -> None:
    subprocess.run(["git", *arguments], check=True, capture_output=True)


@pytest.fixture
def two_versions(project: Path, coco_folder: Any) -> Any:
    """A set in data/set with two commits, v1 and v2, of which v2 has one box less; the remote has nothing yet."""
    (project / "data").mkdir()
    shutil.move(coco_folder.path, project / "data/set")
    folder = type(coco_folder)(project / "data/set")
    with (project / ".dvc/config").open("a") as file:
        file.write("[core]\nremote = store\n['remote \"store\"']\nurl = ../../remote\n")
    add(folder.path)
    git("add", "data/set.dvc", "data/.gitignore", ".dvc/config")
    git("commit", "-m", "one")
    git("tag", "v1")
    with folder.edit("train") as content:
        content["annotations"].pop()
    add(folder.path)
    git("commit", "-am", "two")
    git("tag", "v2")
    return folder


def test_versions_are_compared_listed_and_checked_out(two_versions: Any, project: Path, tmp_path: Path) -> None:
    path = two_versions.path
    with open_set(f"{path}@v1") as before, open_set(str(path)) as after:
        found = compare(before, after)
    assert found.boxes.removed == 1 and found.boxes.same == 23
    assert list((project / ".dvc/tmp").glob("nasline-*")) == []
    first = digest_at(path, "v1")
    check_out_digest(project, first, tmp_path / "old")
    with open_set(str(tmp_path / "old")) as old:
        assert len(old.raw.boxes) == 24
    (one,) = list_sets(project / "data")
    assert (one.images, one.boxes, one.state) == (12, 23, "as recorded")
    assert one.digest == digest_at(path, "HEAD") != first
    assert dvc_remote(path) == f"store {os.path.normpath(project / '../remote')}" or dvc_remote(path)
    two_versions.image("val").unlink()
    (one,) = list_sets(project)
    assert one.state.startswith("changed since") and "data/set  changed since" in listing_text([one])
    shutil.rmtree(path)
    (one,) = list_sets(project)
    assert one.state == "not here; `dvc pull` fetches it"
    with pytest.raises(UsageError, match="'v9' is no revision"):
        digest_at(path, "v9")
    with pytest.raises(DataError, match=f"the set {'0' * 32}.dir"):
        check_out_digest(project, "0" * 32 + ".dir", tmp_path / "none")


@pytest.mark.slow
def test_orphans_are_found_in_cache_and_remote_and_what_is_named_is_kept(two_versions: Any, project: Path) -> None:
    from dvc.repo import Repo

    first, second = (digest_at(two_versions.path, tag) for tag in ("v1", "v2"))
    with Repo(str(project)) as repo:
        repo.push(all_tags=True)
    assert collect(project, remote="store").orphans == []
    git("tag", "-d", "v2")
    git("reset", "--hard", "v1")
    git("reflog", "expire", "--expire=now", "--all")
    run = {"run": "r", "datasets": {"target": {"digest": second}}, "steps": {}}
    (project / "workspace/runs/r").mkdir(parents=True)
    (project / "workspace/runs/r/run.json").write_text(json.dumps(run))
    assert collect(project, [project / "workspace"], "store").orphans == []
    found = collect(project, remote="store")
    assert [orphan.kind for orphan in found.orphans] == ["object in the cache"] * 2 + ["object in the remote"] * 2
    assert second[2:] in text(found, deleted=False) and "--delete removes all of it" in text(found, deleted=False)
    assert len(found.shared_places) == 1
    collect(project, remote="store", delete=True)
    assert collect(project, remote="store").orphans == []
    shutil.rmtree(two_versions.path)
    check_out_digest(project, first, two_versions.path)
    with open_set(str(two_versions.path)) as opened:
        assert len(opened.raw.boxes) == 24


def test_what_a_killed_command_left_is_found_and_removed(project: Path, coco_folder: Any) -> None:
    target = project / "data/new"
    with pytest.raises(KeyboardInterrupt), written_aside(target) as beside:
        (beside / "file").write_text("half")
        shutil.copytree(beside, beside.with_name(".other.incoming"))  # a killed one has nobody to clean up
        raise KeyboardInterrupt
    adding_marker(target).touch()
    (project / ".dvc/tmp/nasline-x").mkdir(parents=True)
    (project / ".dvc/cache/files/md5/ab").mkdir(parents=True)
    (project / ".dvc/cache/files/md5/ab/cdef.tmp").write_text("half")
    found = collect(project)
    assert sorted(orphan.kind for orphan in found.orphans) == [
        "half-written set", "leftover in the cache", "note of a half-added set", "scratch folder"
    ]  # fmt: skip
    assert not target.exists()
    collect(project, delete=True)
    assert collect(project).orphans == [] and list((project / "data").iterdir()) == []


def test_nothing_is_deleted_while_a_set_in_use_cannot_be_read(two_versions: Any, project: Path) -> None:
    digest = digest_at(two_versions.path, "v1")
    (project / f".dvc/cache/files/md5/{digest[:2]}/{digest[2:]}").unlink()
    assert collect(project).unreadable == [digest]
    with pytest.raises(DataError, match="nothing was deleted: the list of files of"):
        collect(project, delete=True)


def test_killed_while_dvc_adds_leaves_a_note(project: Path, coco_folder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from dvc.repo import Repo

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Repo, "add", killed)
        add(coco_folder.path, to=project / "data/set")
    assert [orphan.kind for orphan in collect(project).orphans] == ["note of a half-added set"]
    add(coco_folder.path, to=project / "data/set")
    assert collect(project).orphans == []


def test_workspace_that_is_not_there_is_refused(two_versions: Any, project: Path, nasline: Any) -> None:
    output = nasline("data", "gc", project, "--workspace", "typo", "--delete", code=2)
    assert "--workspace typo is not a folder" in output


def test_usual_workspace_is_that_of_the_project_too(
    two_versions: Any, project: Path, nasline: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NASLINE_WORKSPACE", "runs_of_mine")
    run = {"run": "r", "datasets": {"target": {"digest": "0" * 32 + ".dir"}}, "steps": {}}
    (project / "runs_of_mine/runs/r").mkdir(parents=True)
    (project / "runs_of_mine/runs/r/run.json").write_text(json.dumps(run))
    assert "nothing was deleted: the list of files of 000" in nasline("data", "gc", project, "--delete", code=65)


def test_outside_of_a_project(tmp_path: Path) -> None:
    for function in (collect, list_sets):
        with pytest.raises(UsageError, match="outside of a DVC project; make one with `nasline init DIR`"):
            function(tmp_path)
