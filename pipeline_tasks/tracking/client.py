"""The connection to the tracking store."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline_tasks.errors import TemporaryError
from pipeline_tasks.workspace import Workspace

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient


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
