"""Airflow on a fresh SQLite file, the DAG folder importable, and a fake `nasline` whose behaviour a test plans."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent.parent
os.environ.update(
    AIRFLOW__CORE__LOAD_EXAMPLES="False",
    AIRFLOW__CORE__DAGS_FOLDER=str(REPOSITORY / "dags"),
    AIRFLOW__CORE__UNIT_TEST_MODE="False",
)
for folder in (REPOSITORY, REPOSITORY / "dags", REPOSITORY / "stack", REPOSITORY / "tests" / "dags"):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

from dag_helpers import FakeNasline  # noqa: E402


@pytest.fixture(scope="session", autouse=True)
def airflow_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new AIRFLOW_HOME with an empty database, set before anything imports Airflow."""
    home = tmp_path_factory.mktemp("airflow")
    os.environ["AIRFLOW_HOME"] = str(home)
    from airflow.utils import db

    db.initdb()
    return home


@pytest.fixture
def fake_nasline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeNasline]:
    """The fake command, set as NASLINE_COMMAND."""
    fake = FakeNasline(tmp_path)
    for name, value in fake.environment.items():
        monkeypatch.setenv(name, value)
    yield fake
