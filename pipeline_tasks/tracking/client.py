"""The connection to the tracking store."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from pipeline_tasks.errors import TemporaryError, UnavailableError
from pipeline_tasks.workspace import Workspace

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

Answer = TypeVar("Answer")


def tracking_uri(workspace: Workspace) -> str:
    """MLFLOW_TRACKING_URI, or a SQLite file in the workspace."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{workspace.root}/mlflow.db"


def store_exists(workspace: Workspace) -> bool:
    """False for a local database that was never written; asking it would take seconds to create its tables."""
    uri = tracking_uri(workspace)
    return not uri.startswith("sqlite:///") or Path(uri.removeprefix("sqlite:///")).exists()


def connect(workspace: Workspace) -> MlflowClient:
    """A client of the tracking store that gives up after seconds, so that training never waits for it."""
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    logging.getLogger("alembic").setLevel(logging.WARNING)
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.WARNING)
    import mlflow
    from mlflow.tracking import MlflowClient

    workspace.root.mkdir(parents=True, exist_ok=True)
    uri = tracking_uri(workspace)
    mlflow.set_tracking_uri(uri)
    mlflow.set_registry_uri(uri)
    return MlflowClient(uri)


def server_errors() -> tuple[type[Exception], ...]:
    """What a tracking store may raise when it is away or unwell; TemporaryError: a step beside us waits for it."""
    from mlflow.exceptions import MlflowException
    from requests.exceptions import RequestException
    from sqlalchemy.exc import SQLAlchemyError

    return (MlflowException, RequestException, SQLAlchemyError, OSError, TemporaryError)


def ask(question: Callable[[], Answer], workspace: Workspace) -> Answer | None:
    """The answer of the registry or the tracking store, None when it knows no such thing.

    Raises:
        UnavailableError: it does not answer.
    """
    from mlflow.exceptions import MlflowException
    from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE, RESOURCE_DOES_NOT_EXIST, ErrorCode

    unknown = {ErrorCode.Name(RESOURCE_DOES_NOT_EXIST), ErrorCode.Name(INVALID_PARAMETER_VALUE)}
    try:
        return question()
    except MlflowException as error:
        if error.error_code in unknown:
            return None
        raise away(workspace, error) from None
    except server_errors() as error:
        raise away(workspace, error) from None


def away(workspace: Workspace, error: Exception) -> UnavailableError:
    """The error of a registry that does not answer."""
    text = " ".join(str(error).split())[:200]
    place = tracking_uri(workspace)
    return UnavailableError(
        f"the model registry at {place} does not answer ({text}); start it or set MLFLOW_TRACKING_URI"
    )
