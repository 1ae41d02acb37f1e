"""The last line of a command for the program that started it."""

from __future__ import annotations

import json
import sys
from typing import Any


def report(content: dict[str, Any]) -> None:
    """Tell the DAG's operator what was done; a person at a terminal has read it."""
    if not sys.stdout.isatty():
        print("NASLINE_RESULT " + json.dumps(content, sort_keys=True), flush=True)
