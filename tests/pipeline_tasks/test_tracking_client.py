"""What is made of what a tracking server says, or of its silence."""

from __future__ import annotations

import logging
import signal
from pathlib import Path

import pytest

from pipeline_tasks.errors import ConfigurationError, TemporaryError, UnavailableError
from pipeline_tasks.process import Stopper
from pipeline_tasks.tracking.client import ask
from pipeline_tasks.tracking.experiments import _artifact_location
from pipeline_tasks.tracking.mirror import Tracker
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


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_stop_is_no_server_that_is_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, wrapped: bool
) -> None:
    """What broke off is told by the step; libraries make errors of their own of it."""
    stopper = Stopper()

    def interrupted(_: Tracker) -> str:
        try:
            stopper._handle(signal.SIGTERM, None)
        except TemporaryError:
            if wrapped:
                raise OSError("the connection broke off")  # noqa: B904
            raise
        return "delivered"

    monkeypatch.setattr(Tracker, "_deliver", interrupted)
    with caplog.at_level(logging.WARNING):
        assert Tracker(Workspace(tmp_path), "one", "validate_data").deliver() is None
    assert not caplog.text
    assert stopper.requested()


def test_a_server_that_is_away_is_told_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def away(_: Tracker) -> str:
        raise OSError("nobody answers")

    monkeypatch.setattr(Tracker, "_deliver", away)
    tracker = Tracker(Workspace(tmp_path), "one", "validate_data")
    with caplog.at_level(logging.WARNING):
        assert tracker.deliver() is None and tracker.deliver() is None
    (told,) = caplog.messages
    assert "is away (nobody answers)" in told
