"""Sets in an S3 remote of DVC: pushed, fetched by their digest, and cleaned up."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipeline_tasks.data.garbage import collect
from pipeline_tasks.data.project import init
from pipeline_tasks.data.revisions import check_out_digest
from pipeline_tasks.data.versioning import add, dataset_digest, dvc_remote
from pipeline_tasks.store import ObjectStore


@pytest.mark.slow
def test_set_comes_back_from_the_bucket_and_orphans_in_it_are_found(
    uri: str, coco_folder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, git_identity: None
) -> None:
    (tmp_path / "aws").touch()
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "aws"))  # DVC insists on a file
    store, project = ObjectStore(uri), tmp_path / "project"
    init(project, remote=f"{uri}/sets")
    first = add(coco_folder.path, to=project / "data/set").digest
    subprocess.run("git add -A && git commit -qm one", shell=True, check=True, cwd=project)
    subprocess.run([Path(sys.executable).parent / "dvc", "push", "-q"], check=True, cwd=project)
    assert len(store.sizes("sets/files/md5/")) == 16  # 12 pictures, 3 annotation files, their list
    assert dvc_remote(project / "data/set") == f"storage {uri}/sets"
    assert collect(project, remote="storage").orphans == []
    shutil.rmtree(project / ".dvc/cache")
    check_out_digest(project, first, tmp_path / "again")
    assert dataset_digest(tmp_path / "again") == first
    store.write("sets/files/md5/00/112233445566778899aabbccddeeff", b"nobody names me")
    (orphan,) = collect(project, remote="storage").orphans
    assert orphan.kind == "object in the remote" and orphan.place.endswith("00/112233445566778899aabbccddeeff")
    collect(project, remote="storage", delete=True)
    assert collect(project, remote="storage").orphans == []
    assert len(store.sizes("sets/files/md5/")) == 16  # 12 pictures, 3 annotation files, their list
