"""A DVC project for the tests of versions."""

from __future__ import annotations

import logging
import shutil
import subprocess
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def empty_project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A DVC project in a Git repository, made once."""
    from dvc.repo import Repo

    logging.getLogger("dvc").setLevel(logging.CRITICAL)  # its handlers hold the streams of the test that loaded it
    folder = tmp_path_factory.mktemp("empty")
    subprocess.run(["git", "init", "--quiet", str(folder)], check=True)
    Repo.init(str(folder)).close()
    return folder


@pytest.fixture
def project(empty_project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, git_identity: None) -> Path:
    """A DVC project of the test's own, and the current folder."""
    folder = tmp_path / "project"
    shutil.copytree(empty_project, folder)
    monkeypatch.chdir(folder)
    return folder
