"""A stand-in for `nasline` with the same contract: argv in, lines and NASLINE_RESULT out, an exit code at the end.

What it does is read from the JSON file FAKE_NASLINE_PLAN: for a step (`gate`, `pretrain/student`) a list with one
entry per attempt, the last one repeated. An entry may say `exit`, `say` (its last sentence), `seconds` to wait in,
`helper` (start a process of its own that would outlive it), `stubborn` (ignore SIGTERM), `result` (more fields of what
it reports). Every call is added to
FAKE_NASLINE_LOG as a line of JSON.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from pipeline_tasks.process import die_with_parent


def main() -> int:
    """Play one step."""
    step, *rest = sys.argv[1:]
    role = rest[rest.index("--role") + 1] if "--role" in rest else ""
    name = f"{step}/{role}" if role else step
    attempt = _append_call(name)
    plan = json.loads(Path(os.environ["FAKE_NASLINE_PLAN"]).read_text(encoding="utf-8"))
    entries = plan.get(name, [{}])
    return _play(name, rest, entries[min(attempt, len(entries) - 1)])


def _append_call(name: str) -> int:
    """Write the call down; return how often the step was called before."""
    log = Path(os.environ["FAKE_NASLINE_LOG"])
    before = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    settings = sorted(variable for variable in os.environ if variable.startswith("AIRFLOW__"))
    call = {"name": name, "pid": os.getpid(), "argv": sys.argv[1:], "airflow_settings": settings}
    with log.open("a", encoding="utf-8") as file:
        file.write(json.dumps(call) + "\n")
    return sum(call["name"] == name for call in before)


def _play(name: str, arguments: list[str], entry: dict[str, Any]) -> int:
    if entry.get("stubborn"):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    die_with_parent()
    print(f"INFO {name} begins", flush=True)
    print(f"NASLINE_MLFLOW http://127.0.0.1:5000/#/experiments/1/runs/{name.replace('/', '-')}", flush=True)
    if entry.get("helper"):
        helper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        print(f"INFO helper {helper.pid}", flush=True)
    time.sleep(entry.get("seconds", 0))
    print(entry.get("say", f"{name} published"), flush=True)
    if not entry.get("exit"):
        run = arguments[arguments.index("--run") + 1] if "--run" in arguments else ""
        result: dict[str, Any] = {"run": run, "step": name.split("/")[0], "key": f"key-of-{name}", "reused": False}
        if name == "start":
            result["shards"] = 3
            options = json.loads(arguments[arguments.index("--options-json") + 1])
            result["target"] = options.get("gate.target", "cpu")
        print("NASLINE_RESULT " + json.dumps({**result, **entry.get("result", {})}), flush=True)
    return int(entry.get("exit", 0))


if __name__ == "__main__":
    raise SystemExit(main())
