"""A workspace's own tracking database comes into being whole."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from pipeline_tasks.tracking.local_store import create_database

CREATION = "import sys; from pipeline_tasks.tracking.local_store import create_database; create_database(sys.argv[1])"


@pytest.mark.parametrize(
    "uri", ["http://localhost:1", "postgresql://localhost/none", "sqlite:///:memory:", "sqlite:///file:x?uri=true"]
)
def test_other_addresses_are_left_alone(uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    create_database(uri)
    assert list(tmp_path.iterdir()) == []


def test_a_database_that_exists_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").write_text("mine")
    create_database(f"sqlite:///{tmp_path}/mlflow.db")
    assert [file.read_text() for file in tmp_path.iterdir()] == ["mine"]


def test_a_database_that_a_server_makes_meanwhile_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Client:
        def __init__(self, uri: str) -> None:
            self.aside = Path(uri.removeprefix("sqlite:///"))

        def search_experiments(self, max_results: int) -> None:
            self.aside.write_text("mine")
            (tmp_path / "mlflow.db").write_text("the server's")

    monkeypatch.setitem(sys.modules, "mlflow.tracking", SimpleNamespace(MlflowClient=Client))  # MLflow takes seconds
    create_database(f"sqlite:///{tmp_path}/mlflow.db")
    assert (tmp_path / "mlflow.db").read_text() == "the server's"
    assert not (tmp_path / "mlflow.db.partial").exists()


@pytest.mark.slow
def test_killed_while_it_makes_the_tables_it_makes_them_again(tmp_path: Path) -> None:
    database, aside = tmp_path / "mlflow.db", tmp_path / "mlflow.db.partial"
    with subprocess.Popen([sys.executable, "-c", CREATION, f"sqlite:///{database}"]) as process:
        deadline = time.monotonic() + 60
        left: set[str] = set()  # looked at before the kill: amid a change it leaves a journal that no reader undoes
        while len(left) < 5 and time.monotonic() < deadline:
            time.sleep(0.01)
            left = _tables(aside)
        process.kill()
    assert len(left) >= 5 and not database.exists(), "killed too late"
    create_database(f"sqlite:///{database}")
    assert left < _tables(database)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["mlflow.db", "mlflow.db.lock"]


def _tables(database: Path) -> set[str]:
    if not database.exists():
        return set()
    connection = sqlite3.connect(f"file:{database}?mode=ro", uri=True)
    try:
        names = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        return {name for name in names if not name.startswith("_alembic_tmp")}  # there for a moment only
    except sqlite3.OperationalError:  # being written
        return set()
    finally:
        connection.close()
