"""Shared by the tests of the DAGs: a fake `nasline` to plan with, and a look at processes."""

from __future__ import annotations

import json
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent.parent


def is_alive(pid: int) -> bool:
    """Whether a process runs; a zombie is dead."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
    except (FileNotFoundError, ProcessLookupError):  # gone before the file was opened, or before it was read
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


def wait_for(condition: Callable[[], bool], seconds: float = 10.0) -> bool:
    """Whether the condition came true in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def free_port() -> int:
    """A port nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class FakeNasline:
    """Plans what the fake command does, and reads what it was asked."""

    def __init__(self, folder: Path) -> None:
        self._plan = folder / "plan.json"
        self._log = folder / "calls.jsonl"
        self.plan()
        self.environment = {
            "NASLINE_COMMAND": f"{sys.executable} {Path(__file__).parent / 'fake_nasline.py'}",
            "FAKE_NASLINE_PLAN": str(self._plan),
            "FAKE_NASLINE_LOG": str(self._log),
            "NASLINE_WORKSPACE": str(folder / "workspace"),
            "PYTHONPATH": str(REPOSITORY),
        }

    def plan(self, **steps: list[dict[str, Any]]) -> None:
        """Set what each step does, attempt by attempt (see fake_nasline.py)."""
        self._plan.write_text(json.dumps(steps), encoding="utf-8")

    def calls(self, name: str = "") -> list[dict[str, Any]]:
        """All calls so far, or those of one step."""
        lines = self._log.read_text(encoding="utf-8").splitlines() if self._log.exists() else []
        return [call for call in map(json.loads, lines) if name in ("", call["name"])]
