"""The SQLite database of a workspace that has no tracking server.

MLflow makes its tables one by one and cannot go on with a database in which some are missing: killed in between, it
would refuse every later call. So they are made in a file aside, which gets its name when it is whole.
"""

from __future__ import annotations

import os
from pathlib import Path

from pipeline_tasks.workspace import file_lock

SCHEME = "sqlite:///"


def create_database(uri: str) -> None:
    """Make the database of a plain `sqlite:///` address where there is none; any other address is left alone."""
    database = Path(uri.removeprefix(SCHEME))
    if not uri.startswith(SCHEME) or "?" in uri or database.name == ":memory:" or database.exists():
        return
    with file_lock(database.with_name(f"{database.name}.lock"), what=str(database)):
        if not database.exists():
            _create(database)


def _create(database: Path) -> None:
    from mlflow.tracking import MlflowClient

    aside = database.with_name(f"{database.name}.partial")
    for remains in (aside, aside.with_name(f"{aside.name}-journal")):
        remains.unlink(missing_ok=True)
    MlflowClient(f"{SCHEME}{aside}").search_experiments(max_results=1)  # the first question makes the tables
    if database.exists():  # a server that was started meanwhile makes its own, and has it open
        aside.unlink()
    else:
        os.rename(aside, database)
