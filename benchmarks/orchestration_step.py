"""Stands in for `nasline` while benchmarks/orchestration.py measures: loads what the command loads, does no work.

Notes when it could begin (`began`: everything the real command imports before it looks at a step is imported) and when
it ended, into the file ORCHESTRATION_LOG.
"""

from __future__ import annotations

import json
import os
import sys
import time
from itertools import pairwise

import pipeline_tasks.__main__ as command
from pipeline_tasks.params import form_fields


def main() -> None:
    """Play one step: its name, its result and nothing else."""
    assert command.main
    form_fields()  # of which the real command makes its options
    began = time.time()
    step, *rest = sys.argv[1:]
    result = {"run": "run", "step": step, "key": "key", "reused": False, "shards": 1, "target": "cpu", "summary": {}}
    print("NASLINE_RESULT " + json.dumps(result), flush=True)
    part = next((f"/{after}" for word, after in pairwise(rest) if word in ("--role", "--shard")), "")
    line = {"step": step + part + ("/merge" if "--merge" in rest else ""), "began": began, "ended": time.time()}
    with open(os.environ["ORCHESTRATION_LOG"], "a", encoding="utf-8") as log:
        log.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
