"""`nasline init`."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline_tasks.data.project import init
from pipeline_tasks.data.versioning import add, dvc_remote
from pipeline_tasks.errors import DataError, UsageError
from pipeline_tasks.params import Parameters, resolve


def test_project_has_parameters_stages_and_versions(tmp_path: Path, nasline: Any) -> None:
    folder = tmp_path / "mine"
    output = nasline("init", folder, "--remote", "s3://bucket/sets", code=0)
    assert "made .git, .dvc/config, params.yaml, dvc.yaml, .gitignore, data/.gitignore" in output
    assert resolve(folder / "params.yaml", {}) == Parameters()
    assert dvc_remote(folder / "data" / "set") == "storage s3://bucket/sets"
    ignored = subprocess.run(
        ["git", "-C", str(folder), "check-ignore", ".nasline/x", "outputs/x", "data/set.dvc", "params.yaml"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert ignored.stdout.split() == [".nasline/x", "outputs/x"]
    config = (folder / ".dvc/config").read_text().lower()
    assert "analytics = false" in config and "autostage = false" in config


def test_dvc_sees_the_sets_of_a_new_project_and_of_this_repository(
    coco_folder: Any, tmp_path: Path, repository: Path
) -> None:
    """DVC reads `/data/*` as ignoring data/ itself, and then pushes nothing of it."""
    from dvc.repo import Repo

    init(tmp_path / "mine")
    digest = add(coco_folder.path, to=tmp_path / "mine/data/set").digest
    with Repo(str(tmp_path / "mine")) as repo:
        assert digest in {out.hash_info.value for out in repo.index.outs}
    assert "/data" not in (repository / ".gitignore").read_text(encoding="utf-8")
    (tmp_path / "mine/.gitignore").write_text("/data/*\n!/data/*.dvc\n")
    with pytest.raises(DataError, match=r"data is ignored by Git as DVC reads \.gitignore"):
        add(coco_folder.path, to=tmp_path / "mine/data/other")
    assert sorted(path.name for path in (tmp_path / "mine/data").iterdir()) == [".gitignore", "set", "set.dvc"]


def test_what_is_there_stays(tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text("distill:\n  epochs: 7\n")
    assert "params.yaml" not in init(tmp_path)
    assert resolve(tmp_path / "params.yaml", {}).distill.epochs == 7
    assert init(tmp_path) == []
    (tmp_path / "dvc.yaml").unlink()
    assert init(tmp_path) == ["dvc.yaml"]


def test_remote_is_added_later_and_never_exchanged(tmp_path: Path) -> None:
    init(tmp_path / "mine")
    assert init(tmp_path / "mine", str(tmp_path / "store")) == ["the remote"]
    assert init(tmp_path / "mine", str(tmp_path / "store")) == []
    with pytest.raises(UsageError, match=r"has the remote storage .*store already"):
        init(tmp_path / "mine", "s3://bucket/sets")
    assert dvc_remote(tmp_path / "mine/data/set") == f"storage {tmp_path / 'store'}"


@pytest.mark.parametrize("remote", ["", "s3://", "s3:/bucket", "ftp://host/sets"])
def test_remote_of_another_kind_is_refused_before_anything_is_made(tmp_path: Path, remote: str) -> None:
    with pytest.raises(UsageError, match=r"must be a folder or s3://BUCKET/PREFIX"):
        init(tmp_path / "mine", remote)
    assert not (tmp_path / "mine").exists()


def test_inside_another_project_or_a_file(tmp_path: Path) -> None:
    init(tmp_path / "outer")
    with pytest.raises(UsageError, match="lies inside of the DVC project"):
        init(tmp_path / "outer/inner")
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="is a file"):
        init(tmp_path / "file")


def test_stages_of_a_project_are_those_of_the_repository(repository: Path) -> None:
    copy = repository / "pipeline_tasks/templates/dvc.yaml"
    assert copy.read_text(encoding="utf-8") == (repository / "dvc.yaml").read_text(encoding="utf-8")
    assert yaml.safe_load(copy.read_text(encoding="utf-8"))["stages"]


def test_templates_are_part_of_the_installed_package(repository: Path) -> None:
    import tomllib

    settings = tomllib.loads((repository / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    patterns = settings["package-data"]["pipeline_tasks"]
    packed = {file.name for pattern in patterns for file in (repository / "pipeline_tasks").glob(pattern)}
    assert packed == {file.name for file in (repository / "pipeline_tasks/templates").iterdir()} == {
        "dvc.yaml", "gitignore"
    }  # fmt: skip
