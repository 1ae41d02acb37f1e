"""`make demo`, for real: the whole DAG through Airflow on generated digits, accepted and rejected."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def checkout(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the tracked and new files in a new directory, as a clone would have them."""
    folder = tmp_path_factory.mktemp("checkout")
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=repository, capture_output=True, text=True, check=True,
    )  # fmt: skip
    for name in filter(None, listed.stdout.split("\0")):
        if (repository / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(repository / name, folder / name)
    return folder


def demo(checkout: Path, *options: str, code: int = 0) -> str:
    """Run the demo with an environment that holds next to nothing."""
    (checkout / "home").mkdir(exist_ok=True)
    environment = {
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "HOME": str(checkout / "home"),
    }
    if threads := os.environ.get("OMP_NUM_THREADS"):  # another group of tests runs beside this one
        environment["OMP_NUM_THREADS"] = threads
    done = subprocess.run(
        [sys.executable, str(checkout / "demo" / "run.py"), *options],
        cwd=checkout, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == code, done.stdout[-4000:] + done.stderr[-2000:]
    return done.stdout


def test_demo_ends_with_a_champion_that_has_learned(checkout: Path) -> None:
    output = demo(checkout)
    found = re.search(r"^INT8 +([\d.]+)", output, re.MULTILINE)
    assert found and float(found[1]) >= 0.5, output
    assert re.search(r"float [\d.]+, PTQ [\d.]+, selective [\d.]+, QAT [\d.]+", output)
    kept = re.search(r"pseudo-labels (\d+) boxes kept.*precision ([\d.]+).*recall ([\d.]+)", output)
    assert kept and int(kept[1]) >= 100 and float(kept[2]) > 0.5, output
    assert "models:/demo_digits@champion" in output and "make up" in output
    pictures = re.search(r"^pictures +(\S+)", output, re.MULTILINE)
    assert pictures and (checkout / pictures[1] / "predictions.png").exists()


def test_rejected_demo_reuses_everything_before_the_gate_and_says_why(checkout: Path) -> None:
    output = demo(checkout, "--gate", "fail")
    assert "misses the limit 0.999" in output
    assert re.search(r"^reused .*distill.*export", output, re.MULTILINE)
    assert re.search(r"^registered +nothing", output, re.MULTILINE)
