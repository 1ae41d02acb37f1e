"""The connection to the tracking store."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from pipeline_tasks.errors import ConfigurationError, TemporaryError, UnavailableError
from pipeline_tasks.workspace import Workspace

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

log = logging.getLogger(__name__)
Answer = TypeVar("Answer")

LOGIN = re.compile(r"(?<=://)[^/\s]*@")
"""Of an address: `user:password@`."""


def tracking_uri(workspace: Workspace) -> str:
    """MLFLOW_TRACKING_URI, or a SQLite file in the workspace."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{workspace.root}/mlflow.db"


def shown_uri(workspace: Workspace) -> str:
    """The tracking store as a log or a sentence may name it: without user and password."""
    return without_login(tracking_uri(workspace))


def without_login(text: str) -> str:
    """A text in which no address has a user or a password before its host any more."""
    return LOGIN.sub("", text)


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
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)  # its errors are raised too, and told once
    import mlflow
    from mlflow.tracking import MlflowClient

    workspace.root.mkdir(parents=True, exist_ok=True)
    uri = tracking_uri(workspace)
    if uri != shown_uri(workspace):  # MLflow prints the address of every run that ends, login included
        os.environ["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] = "true"
    mlflow.set_tracking_uri(uri)
    mlflow.set_registry_uri(uri)
    return MlflowClient(uri)


def open_store(workspace: Workspace) -> MlflowClient:
    """`connect` for those who cannot go on without an answer.

    Raises:
        ConfigurationError: MLFLOW_TRACKING_URI is of a kind that cannot be used here.
        UnavailableError: a database does not answer.
    """
    from mlflow.tracking.registry import UnsupportedModelRegistryStoreURIException

    try:
        return connect(workspace)
    except (ImportError, UnsupportedModelRegistryStoreURIException) as error:
        reason = error if isinstance(error, ImportError) else "MLflow knows no such kind of address"
        raise ConfigurationError(
            f"MLFLOW_TRACKING_URI {shown_uri(workspace)} cannot be used ({reason}); give the address of a server, "
            "http://HOST:PORT"
        ) from None
    except server_errors() as error:
        raise away(workspace, error) from None


def server_errors() -> tuple[type[Exception], ...]:
    """What a tracking store may raise when it is away or unwell; TemporaryError: a step beside us waits for it."""
    from mlflow.exceptions import MlflowException
    from requests.exceptions import RequestException
    from sqlalchemy.exc import SQLAlchemyError

    return (MlflowException, RequestException, SQLAlchemyError, OSError, TemporaryError)


def ask(question: Callable[[], Answer], workspace: Workspace) -> Answer | None:
    """The answer of the registry or the tracking store, None when it knows no such thing.

    MLflow's server with users answers "permission denied" to who is no administrator and asks for a model that does not
    exist; so does it for one that may not be read, hence the warning.

    Raises:
        UnavailableError: it does not answer.
    """
    from mlflow.exceptions import MlflowException
    from mlflow.protos.databricks_pb2 import (
        INVALID_PARAMETER_VALUE,
        PERMISSION_DENIED,
        RESOURCE_DOES_NOT_EXIST,
        ErrorCode,
    )

    unknown = {ErrorCode.Name(RESOURCE_DOES_NOT_EXIST), ErrorCode.Name(INVALID_PARAMETER_VALUE)}
    try:
        return question()
    except MlflowException as error:
        if error.error_code in unknown:
            return None
        if error.error_code == ErrorCode.Name(PERMISSION_DENIED):
            log.warning("the tracking server denies what was asked, or knows no such thing; taken as not there")
            return None
        raise away(workspace, error) from None
    except server_errors() as error:
        raise away(workspace, error) from None


def away(workspace: Workspace, error: Exception) -> UnavailableError:
    """The error of a registry that does not answer."""
    place, text = shown_uri(workspace), one_line(error)
    return UnavailableError(
        f"the model registry at {place} does not answer ({text}); start it or set MLFLOW_TRACKING_URI"
    )


def one_line(error: Exception) -> str:
    """The beginning of an error's text, as a log may hold it."""
    return without_login(" ".join(str(error).split()))[:200]
