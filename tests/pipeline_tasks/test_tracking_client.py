"""What a tracking server with users says to who asks for something that is not there."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from pipeline_tasks.errors import UnavailableError
from pipeline_tasks.tracking.client import ask
from pipeline_tasks.workspace import Workspace


def question(code: str) -> object:
    """A question that the server refuses with this code."""
    from mlflow.exceptions import MlflowException
    from mlflow.protos.databricks_pb2 import ErrorCode

    def refused() -> None:
        raise MlflowException("no", error_code=ErrorCode.Value(code))

    return refused


def test_denied_is_taken_as_not_there_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert ask(question("PERMISSION_DENIED"), Workspace(tmp_path)) is None  # type: ignore[arg-type]
    assert "denies what was asked, or knows no such thing" in caplog.text


def test_unknown_is_not_there_without_a_word(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert ask(question("RESOURCE_DOES_NOT_EXIST"), Workspace(tmp_path)) is None  # type: ignore[arg-type]
    assert not caplog.text


def test_a_wrong_password_is_no_answer(tmp_path: Path) -> None:
    with pytest.raises(UnavailableError):
        ask(question("UNAUTHENTICATED"), Workspace(tmp_path))  # type: ignore[arg-type]
