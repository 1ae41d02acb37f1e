"""A real S3 server for the tests of workspaces in an object store."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from object_server import CREDENTIALS, free_port, new_workspace, object_server


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of an S3 server of our own."""
    with object_server(tmp_path_factory.mktemp("weed")) as address:
        yield address


@pytest.fixture
def no_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing of this machine's AWS settings; short tries; a cache of the test's own."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "2")
    monkeypatch.setenv("NASLINE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")


@pytest.fixture
def uri(server: str, no_settings: None, monkeypatch: pytest.MonkeyPatch) -> str:
    """Address of an empty workspace."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", server)
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    return new_workspace()


@pytest.fixture
def nobody() -> str:
    """An address where no server listens."""
    return f"127.0.0.1:{free_port()}"
