"""Whether a service is healthy, for health checks: `python health.py ADDRESS [PART]`; exit code 0 or 1, and why.

With PART the answer is Airflow's own health page, and that part's heartbeat counts. `airflow jobs check` says the same
for four seconds of processor time. Standard library only, and never through a proxy.
"""

from __future__ import annotations

import json
import sys
import urllib.request


def complaint(address: str, part: str = "") -> str:
    """Why the service is not healthy; empty when it is."""
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(address, timeout=8) as response:
            answer = response.read()
        status = json.loads(answer)[part]["status"] if part else "healthy"
    except (OSError, ValueError, KeyError) as error:
        return f"{address}: {error}"
    return "" if status == "healthy" else f"{address}: {part} is {status}"


if __name__ == "__main__":
    raise SystemExit(complaint(*sys.argv[1:3]) or 0)
