"""The Compose file as Docker's own program reads it."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import make_secrets
import pytest

pytestmark = pytest.mark.slow
REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `make secrets` writes, and the addresses that several machines need."""
    target = tmp_path_factory.mktemp("settings") / ".env"
    make_secrets.write(REPOSITORY / ".env.example", target)
    with target.open("a") as more:
        more.write("NASLINE_ADDRESS=10.0.0.5\nNASLINE_STACK_ADDRESS=10.0.0.5\n")
    return target


def config(program: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`docker-compose ARGUMENTS config --quiet` with nothing of this session's environment."""
    environment = {"PATH": os.environ["PATH"], "HOME": "/nonexistent"}
    return subprocess.run(
        [program, *arguments, "config", "--quiet"], cwd=REPOSITORY, env=environment, capture_output=True, text=True
    )


@pytest.mark.parametrize(
    ("override", "profile"), [(None, "cpu"), (None, "*"), ("network", "cpu"), ("worker", "gpu"), ("worker", "t4")]
)
def test_compose_takes_the_file(compose_program: Path, settings: Path, override: str | None, profile: str) -> None:
    files = ["docker-compose.yml", *([f"deploy/compose.{override}.yml"] if override else [])]
    named = [word for file in files for word in ("--file", file)]
    done = config(compose_program, *named, "--env-file", str(settings), "--profile", profile)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_compose_refuses_to_start_without_a_secret_and_says_what_to_do(
    compose_program: Path, settings: Path, tmp_path: Path
) -> None:
    lines = [line for line in settings.read_text().splitlines() if not line.startswith("REDIS_PASSWORD=")]
    without = tmp_path / "without.env"
    without.write_text("\n".join(["REDIS_PASSWORD=", *lines]))
    done = config(compose_program, "--env-file", str(without))
    assert done.returncode != 0
    assert "REDIS_PASSWORD is missing a value: run make secrets, which writes it to .env" in done.stderr
    make_secrets.write(REPOSITORY / ".env.example", without)  # behind the empty line: the last of two counts
    assert config(compose_program, "--env-file", str(without)).returncode == 0
