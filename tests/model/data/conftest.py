"""What tests of worker processes leave behind is put back."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def child_signal_handler() -> Iterator[None]:
    """torch's loader keeps its SIGCHLD handler for the rest of the process; a child of a later test would call it."""
    before = signal.getsignal(signal.SIGCHLD)
    yield
    signal.signal(signal.SIGCHLD, before)
