"""Whether a Celery worker answers, for its health check: `python worker_health.py NAME@HOST`; exit code 0 or 1.

The same question as `celery inspect ping`, without importing Airflow: half a second of processor time in place of five.
"""

from __future__ import annotations

import os
import sys


def answers(name: str, broker: str, seconds: float = 10.0) -> bool:
    """Whether the worker says pong within some seconds."""
    from celery import Celery

    app = Celery(broker=broker)
    return any(name in reply for reply in app.control.ping(destination=[name], timeout=seconds, limit=1))


if __name__ == "__main__":
    if not answers(sys.argv[1], os.environ["AIRFLOW__CELERY__BROKER_URL"]):
        raise SystemExit(f"worker {sys.argv[1]} does not answer")
