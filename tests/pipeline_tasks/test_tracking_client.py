"""What a tracking server with users says to who asks for something that is not there."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from pipeline_tasks.errors import ConfigurationError, UnavailableError
from pipeline_tasks.tracking.client import ask
from pipeline_tasks.tracking.experiments import _artifact_location
from pipeline_tasks.workspace import Workspace

ADDRESS = "API request to endpoint /api/2.0/mlflow/registered-models/alias failed with error code 403 != 200"


def question(code: str, text: str = "no") -> object:
    """A question that the server refuses with this code."""
    from mlflow.exceptions import MlflowException
    from mlflow.protos.databricks_pb2 import ErrorCode

    def refused() -> None:
        raise MlflowException(text, error_code=ErrorCode.Value(code))

    return refused


def test_denied_is_taken_as_not_there_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        refused = question("PERMISSION_DENIED", f"{ADDRESS}. Response body: 'Permission denied'")
        assert ask(refused, Workspace(tmp_path)) is None  # type: ignore[arg-type]
    assert "denies what was asked, or knows no such thing" in caplog.text


def test_unknown_is_not_there_without_a_word(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert ask(question("RESOURCE_DOES_NOT_EXIST"), Workspace(tmp_path)) is None  # type: ignore[arg-type]
    assert not caplog.text


@pytest.mark.parametrize(
    ("code", "body", "remedy"),
    [
        ("UNAUTHENTICATED", "You are not authenticated.", "check MLFLOW_TRACKING_USERNAME and "),
        ("PERMISSION_DENIED", "Invalid Host header - possible DNS rebinding attack detected", "--allowed-hosts"),
        ("PERMISSION_DENIED", "<html>the proxy lets nobody in</html>", "has to give this user the right"),
    ],
)
def test_a_refusal_that_says_nothing_about_the_model_is_no_missing_model_and_no_retry_cures_it(
    tmp_path: Path, code: str, body: str, remedy: str
) -> None:
    with pytest.raises(ConfigurationError, match=f"refuses .*; .*{remedy}"):
        ask(question(code, f"{ADDRESS}. Response body: {body!r}"), Workspace(tmp_path))  # type: ignore[arg-type]


def test_a_server_in_trouble_is_asked_again(tmp_path: Path) -> None:
    with pytest.raises(UnavailableError):
        ask(question("INTERNAL_ERROR"), Workspace(tmp_path))  # type: ignore[arg-type]


def test_a_store_with_a_relative_path_keeps_its_artifacts_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("mlflow.get_tracking_uri", lambda: "sqlite:///tracking.db")
    assert _artifact_location() == (tmp_path / "mlflow-artifacts").as_uri()
