"""The connection to the tracking store."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from pipeline_tasks.errors import ConfigurationError, TemporaryError, UnavailableError
from pipeline_tasks.tracking.local_store import create_database
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
    create_database(uri)
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


REMEDIES = {
    "UNAUTHENTICATED": "check MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD",
    "PERMISSION_DENIED": "an administrator of MLflow has to give this user the right, or the server has to know the "
    "host name of this address (--allowed-hosts)",
}
"""By MLflow's code of a refusal."""
DENIED_BY_MLFLOW = "'Permission denied'"
"""At the end of what the client says when MLflow's own users lack a right; other refusals have other answers."""


def ask(question: Callable[[], Answer], workspace: Workspace) -> Answer | None:
    """The answer of the registry or the tracking store, None when it knows no such thing.

    MLflow's server with users answers "permission denied" to who is no administrator and asks for a model that does not
    exist; so does it for one that may not be read, and no question tells the two apart, hence the warning. Other
    refusals (a host name the server does not know, a proxy) say nothing about the model.

    Raises:
        UnavailableError: it does not answer.
        ConfigurationError: it refuses to answer.
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
        if error.error_code == ErrorCode.Name(PERMISSION_DENIED) and str(error).endswith(DENIED_BY_MLFLOW):
            log.warning(
                "the tracking server denies what was asked, or knows no such thing; taken as not there (if it is "
                "there, an administrator of MLflow has to give %s the right to read it)",
                os.environ.get("MLFLOW_TRACKING_USERNAME") or "this user",
            )
            return None
        raise away(workspace, error) from None
    except server_errors() as error:
        raise away(workspace, error) from None


def away(workspace: Workspace, error: Exception) -> UnavailableError | ConfigurationError:
    """The error of a registry that does not answer, or refuses to: that, no retry cures."""
    place, text = shown_uri(workspace), one_line(error)
    code = getattr(error, "error_code", "")
    if code in REMEDIES:
        user = os.environ.get("MLFLOW_TRACKING_USERNAME") or "who gives no MLFLOW_TRACKING_USERNAME"
        return ConfigurationError(f"the model registry at {place} refuses {user} ({text}); {REMEDIES[code]}")
    return UnavailableError(
        f"the model registry at {place} does not answer ({text}); start it or set MLFLOW_TRACKING_URI"
    )


def one_line(error: Exception) -> str:
    """The beginning of an error's text, as a log may hold it."""
    return without_login(" ".join(str(error).split()))[:200]
