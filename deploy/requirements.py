"""`requirements.py EXTRA...`: the requirements of extras of this project without those of the project itself, which
brings torch. For the images of Airflow and MLflow. Standard library only.
"""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent / "pyproject.toml"


def requirements(*extras: str) -> list[str]:
    """The lines of these extras in pyproject.toml."""
    declared = tomllib.loads(PROJECT.read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    return [line for extra in extras for line in declared[extra]]


if __name__ == "__main__":
    print("\n".join(requirements(*sys.argv[1:])))
