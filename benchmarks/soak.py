"""Kill the steps of the typed chain at random, and compare what comes out with a chain that nobody disturbed.

    python benchmarks/soak.py run [--kills 100] [--seed N] [--work FOLDER]
    python benchmarks/soak.py table

A round is the whole chain of tests/chain/typed_chain.py in a new workspace: `pico` at 64 px, the student pretrained by
two processes, every training with a loader process. Each step is killed up to five times, after a random part of the
time it takes undisturbed: SIGKILL or SIGTERM, to the step alone, to one of the processes below it, or to all of them.
Then it has to get through. After every kill the workspace is looked at: what is published is whole, run.json names only
what is published, no version of the model lacks its tags, and no process is left. At the end every digest and the
gate's accuracy are compared with the undisturbed chain's. A round is a row of results/soak.json, which grows with every
step, so that a soak may itself be stopped at any moment; it goes on with a new round, and the cut one keeps its kills.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parent
for folder in ("stack", "tests/chain", "."):
    sys.path.insert(0, str(REPOSITORY / folder))

from benchmarks.rows import Rows  # noqa: E402

ROWS = Rows("soak")
RUN = "soak"
MOST_KILLS_OF_A_STEP = 5
SECONDS_TO_DIE = 120.0
SIGNALS = ("SIGKILL", "SIGTERM")
TARGETS = ("step", "a child", "all")
OPTIONS = (
    *("--start.loader_workers", "1"),
    *("--quantize.selection_evaluations", "0"),  # that search times the engine, and may choose differently
)
UNTIMED = ("validate_data", "pretrain/student", "pretrain/teacher", "teach", "pseudo_label", "distill", "quantize")
"""Steps whose every weight, table and metric is compared; the later ones hold the time of a call."""
TELLING = re.compile(r"(safetensors|jsonl|csv|parquet|quantize\.json|thresholds\.json)$")
"""Of a step's files; pages and pictures name times and places."""


@dataclass
class Kill:
    """One kill: when, of what, and what became of the command."""

    step: str
    name: str
    target: str
    after_seconds: float
    exit_code: int
    seconds_to_die: float


@dataclass
class Round:
    """What one round saw."""

    kills: list[Kill] = field(default_factory=list)
    missed: int = 0
    """Kills that came after the step had ended."""
    faults: list[str] = field(default_factory=list)
    compared: bool = False
    """Whether it came to its end, where the results are compared."""


def run(wanted: int, seed: int, work: Path) -> None:
    """Go on with rounds until as many kills are stored."""
    from typed_chain import Terminal, make_small_digits

    os.environ["OMP_NUM_THREADS"] = "1"
    data = work / "digits"
    if not data.exists():
        make_small_digits(data)
    seconds = json.loads(undisturbed(work, data).read_text(encoding="utf-8"))
    expected = results(Terminal(work / "undisturbed", data))
    number = 0
    while tally()["kills"] < wanted:
        number += 1
        what = {"seed": seed, "round": number}
        if ROWS.find(what) is None:
            row: dict[str, Any] = {}
            with tempfile.TemporaryDirectory(dir=work) as folder:
                terminal, draw = Terminal(Path(folder), data), random.Random(f"{seed} {number}")
                for found in disturbed(terminal, expected, seconds, draw):
                    row = ROWS.add(what, figures(found))
            print(json.dumps(row["figures"]), flush=True)
    print(table())


def undisturbed(work: Path, data: Path) -> Path:
    """The chain without a kill, once: how long each of its commands took, as a file."""
    from typed_chain import CHAIN, Terminal

    terminal, times = Terminal(work / "undisturbed", data), work / "undisturbed.json"
    if times.exists():
        return times
    if not (terminal.workspace / "runs" / RUN).exists():
        terminal.start(RUN, *OPTIONS)
    seconds = {}
    for command in CHAIN:
        began = time.monotonic()
        terminal.nasline(*words(command))
        seconds[" ".join(command)] = time.monotonic() - began
    times.write_text(json.dumps(seconds), encoding="utf-8")
    return times


def words(command: tuple[str, ...]) -> tuple[str, ...]:
    """A command of the chain as it is typed here."""
    together = ("--processes", "2") if command == ("pretrain", "--role", "student") else ()
    return (*command, "--run", RUN, *together)


def disturbed(
    terminal: Any, expected: dict[str, str], seconds: dict[str, float], draw: random.Random
) -> Iterator[Round]:
    """The whole chain with kills, told after each step; whatever is not as it should be is a fault, in words."""
    from typed_chain import CHAIN

    found = Round()
    terminal.start(RUN, *OPTIONS)
    for command in CHAIN:
        name = " ".join(command)
        for _ in range(draw.randint(1, MOST_KILLS_OF_A_STEP)):
            kill_once(terminal, command, draw.uniform(0.02, 1.0) * seconds[name], draw, found)
            found.faults += [f"after a kill of {name}: {fault}" for fault in inconsistencies(terminal)]
        process = popen(terminal, command)
        output, _ = process.communicate()
        if process.returncode != 0:
            found.faults.append(f"{name} did not get through: exit code {process.returncode}: {last_words(output)}")
            yield found
            return
        yield found
    ended = results(terminal)
    names = sorted(expected.keys() | ended.keys())
    found.faults += [f"{name} differs at the end" for name in names if expected.get(name) != ended.get(name)]
    found.compared = True
    yield found


def kill_once(terminal: Any, command: tuple[str, ...], delay: float, draw: random.Random, found: Round) -> None:
    """Start a command and kill it, or one of the processes below it, after a delay."""
    name, target = draw.choice(SIGNALS), draw.choice(TARGETS)
    process = popen(terminal, command)
    began = time.monotonic()
    with suppress(subprocess.TimeoutExpired):
        process.wait(delay)
    below = sorted(descendants(process.pid))
    target = target if below or target != "a child" else "step"
    victims = {"step": [process.pid], "a child": [draw.choice(below or [0])], "all": [process.pid, *below]}[target]
    if process.poll() is not None:
        found.missed += 1
        process.communicate()
        return
    for victim in victims:
        with suppress(ProcessLookupError):
            os.kill(victim, signal.Signals[name])
    killed = time.monotonic()
    output, _ = process.communicate(timeout=SECONDS_TO_DIE)
    left = wait_for_the_end_of(process.pid)
    took = time.monotonic() - killed
    text = " ".join(command)
    found.kills.append(Kill(text, name, target, round(killed - began, 2), process.returncode, round(took, 2)))
    if left:
        found.faults.append(f"{len(left)} processes of {text} lived on after {name} to {target}")
    if "Traceback" in output or process.returncode not in (0, 75, -signal.SIGKILL, -signal.SIGTERM):
        found.faults.append(f"{name} to {target} of {text}: exit code {process.returncode}: {last_words(output)}")


def last_words(output: str) -> str:
    """What a command said at its end, or of an error in its middle, as a row keeps it."""
    traceback = output.find("Traceback")
    return " ".join((output[traceback:][:1500] if traceback >= 0 else output[-300:]).split())


def popen(terminal: Any, command: tuple[str, ...]) -> subprocess.Popen[str]:
    """The command in a session of its own, so that whatever it leaves is found; its words go to a pipe."""
    return subprocess.Popen(
        [sys.executable, "-m", "pipeline_tasks", *words(command)], cwd=terminal.folder, text=True,
        env=terminal.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip


def descendants(pid: int) -> Iterator[int]:
    """Processes below one, by /proc."""
    with suppress(FileNotFoundError, ProcessLookupError):
        for task in Path(f"/proc/{pid}/task").glob("*/children"):
            for child in map(int, task.read_text().split()):
                yield child
                yield from descendants(child)


def wait_for_the_end_of(session: int, seconds: float = 20.0) -> list[int]:
    """Processes of a session that still live after a while."""
    from services import session_members

    deadline = time.monotonic() + seconds
    while (left := session_members(session)) and time.monotonic() < deadline:
        time.sleep(0.1)
    return left


def inconsistencies(terminal: Any) -> list[str]:
    """What in the workspace a kill must never leave."""
    from pipeline_tasks import digests

    found = []
    for folder in terminal.workspace.glob("steps/*/*"):
        if not folder.is_dir() or folder.suffix in (".partial", ".shards"):
            continue
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        files = digests.of_folder(folder)
        del files["manifest.json"]
        if files != manifest["files"]:
            found.append(f"{folder.parent.name} is published with other files than its manifest names")
    recorded = json.loads((terminal.workspace / "runs" / RUN / "run.json").read_text(encoding="utf-8"))["steps"]
    for step, key in recorded.items():
        if not (terminal.workspace / "steps" / step.split("/")[0] / key / "manifest.json").exists():
            found.append(f"run.json names {step}, which is not published")
    return found


def results(terminal: Any) -> dict[str, str]:
    """Digests of what must be equal in the end."""
    from pipeline_tasks import digests

    found = {}
    for step in UNTIMED:
        for name, entry in terminal.manifest(RUN, step)["files"].items():
            if TELLING.search(name):
                found[f"{step}: {name}"] = entry["sha256"]
    found["gate: accuracy.json"] = digests.of_file(terminal.published(RUN, "gate") / "accuracy.json")
    return {**found, **registry(terminal)}


def registry(terminal: Any) -> dict[str, str]:
    """The registered versions with their aliases, and whether each has the tags that the comparisons need."""
    from pipeline_tasks.tracking.client import connect
    from pipeline_tasks.tracking.registry import BEST_TAG, ENGINE_TAG
    from pipeline_tasks.workspace import Workspace

    client = connect(Workspace(terminal.workspace))
    told = {}
    for version in client.search_model_versions("name = 'chain_digits'"):
        aliases = sorted(client.get_model_version("chain_digits", version.version).aliases)
        told[f"version {version.version}"] = json.dumps([aliases, {ENGINE_TAG, BEST_TAG} <= version.tags.keys()])
    return told


def figures(found: Round) -> dict[str, Any]:
    """A round as a row keeps it."""
    return {
        "kills": len(found.kills),
        "missed": found.missed,
        "signals": dict(Counter(kill.name for kill in found.kills)),
        "targets": dict(Counter(kill.target for kill in found.kills)),
        "steps": dict(Counter(kill.step.split()[0] for kill in found.kills)),
        "exit_codes": dict(Counter(str(kill.exit_code) for kill in found.kills)),
        "longest_seconds_to_die": max((kill.seconds_to_die for kill in found.kills), default=0.0),
        "faults": found.faults,
        "compared": found.compared,
    }


def tally() -> dict[str, Any]:
    """All rounds together."""
    rows = [row["figures"] for row in ROWS.all()]
    counted: dict[str, Any] = {name: Counter() for name in ("signals", "targets", "steps", "exit_codes")}
    for row in rows:
        for name, counter in counted.items():
            counter.update(row[name])
    return {
        "rounds": len(rows),
        "compared to the end": sum(row["compared"] for row in rows),
        "kills": sum(row["kills"] for row in rows),
        "faults": sum(len(row["faults"]) for row in rows),
        **{name: dict(sorted(counter.items())) for name, counter in counted.items()},
    }


def table() -> str:
    """The tally as Markdown."""
    counted = tally()
    lines = ["| | |", "|---|---|"]
    lines += [f"| {name} | {counted[name]} |" for name in ("rounds", "compared to the end", "kills", "faults")]
    for name in ("signals", "targets", "steps", "exit_codes"):
        text = ", ".join(f"{what} {count}" for what, count in counted[name].items())
        lines.append(f"| {name.replace('_', ' ')} | {text} |")
    return "\n".join(lines)


def main() -> None:
    """Kill until the number is reached, or print the tally."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    running = commands.add_parser("run", help="go on until as many kills are stored")
    running.add_argument("--kills", type=int, default=100, help="of all stored rows together (default 100)")
    running.add_argument("--seed", type=int, default=0)
    running.add_argument("--work", type=Path, help="keeps the undisturbed chain (default: a folder that is removed)")
    commands.add_parser("table", help="print the tally")
    arguments = parser.parse_args()
    if arguments.command == "table":
        print(table())
        return
    with tempfile.TemporaryDirectory(prefix="nasline-soak-") as folder:
        work = arguments.work or Path(folder)
        work.mkdir(parents=True, exist_ok=True)
        run(arguments.kills, arguments.seed, work)


if __name__ == "__main__":
    main()
