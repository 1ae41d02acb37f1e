"""Fixtures every test may use."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from typed_chain import finished, small_digits  # noqa: F401  # one run of the chain, and its pictures, for all tests

os.environ.setdefault("OMP_NUM_THREADS", "1")
REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def repository() -> Path:
    """Root of the checkout."""
    return REPOSITORY


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder with golden vectors and real images; a missing one is a failure, never a skip."""
    folder = Path(os.environ.get("NASLINE_SHARED", REPOSITORY.parent / "shared"))
    assert (folder / "golden").is_dir(), f"NASLINE_SHARED={folder} has no folder golden/"
    return folder
