"""Several processes for one training step: `nasline STEP --processes N` starts them and answers for them.

torchrun's agent does it, inside the process of the command: started as a program of its own it would end with exit
code 1 whatever happened, and could outlive the command. Each training process is the same command once more, started
by argv. What it could not do it writes into a folder, so that one sentence and one exit code come out, of the process
that failed first and not of those that lost it.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline_tasks.errors import EXIT_UNFORESEEN, ConfigurationError, TemporaryError, UsageError
from pipeline_tasks.process import LAUNCHER_VARIABLE

if TYPE_CHECKING:
    from torch.distributed.launcher.api import LaunchConfig

log = logging.getLogger(__name__)

TRAINING_STEPS = ("pretrain", "teach", "distill", "quantize")
"""The steps that several processes can share."""

REPORTS_VARIABLE = "NASLINE_REPORTS"
TORCHRUN_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
SECONDS_TO_SAVE = 3600
"""After SIGTERM; who cannot wait so long sends SIGKILL to the command, and the kernel ends the processes."""
SECONDS_OF_DOUBT = 10.0
"""The agent gives processes 30 s before it kills them: one that was killed sooner after a crash died by itself."""


def is_member() -> bool:
    """Whether torchrun, ours or the user's own, started this process as one of several."""
    return all(name in os.environ for name in TORCHRUN_VARIABLES)


def rank() -> int:
    """Index of this process among those that torchrun started; 0 for a process of its own."""
    return int(os.environ["RANK"]) if is_member() else 0


def count(asked: int | None, default: int) -> int:
    """How many processes a step is to have: the option, else `start.processes`; 1 where torchrun has begun already.

    Raises:
        UsageError: the option is not positive, or contradicts the torchrun that started this process.
    """
    if asked is not None and asked < 1:
        raise UsageError(f"--processes must be at least 1, got {asked}")
    if not is_member():
        return asked or default
    started = int(os.environ["WORLD_SIZE"])
    if asked not in (None, started):
        raise UsageError(f"--processes {asked} contradicts torchrun, which started {started}; leave the option out")
    return 1


def own_device(device: str) -> None:
    """Show this process one CUDA device alone, the one of its place on this machine; to be called before torch starts.

    Raises:
        ConfigurationError: one device is named for all, or there are fewer devices than processes.
    """
    if device == "cpu":
        return
    if device != "cuda":
        raise ConfigurationError(f"start.device {device!r} names one device for several processes; use cuda")
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    shown = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = shown.split(",") if shown else [str(index) for index in range(local_rank + 1)]
    if local_rank >= len(devices):
        raise ConfigurationError(
            f"CUDA_VISIBLE_DEVICES={shown} has no device for training process {local_rank + 1} of this machine; "
            "start fewer processes"
        )
    os.environ["CUDA_VISIBLE_DEVICES"] = devices[local_rank]


# in a training process ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Report:
    """Why a training process ended: what it would have told the user, had it been alone."""

    rank: int
    exit_code: int
    sentence: str
    time: float


def report(exit_code: int, sentence: str) -> bool:
    """Leave the reason of an end to the command that started this process; False where there is none."""
    folder = os.environ.get(REPORTS_VARIABLE)
    if folder is None:
        return False
    content = asdict(Report(rank(), exit_code, sentence, time.time()))
    path = Path(folder, f"{rank()}.json")
    with suppress(OSError):  # the command is gone, and its folder with it
        path.with_suffix(".partial").write_text(json.dumps(content), encoding="utf-8")
        path.with_suffix(".partial").rename(path)
    return True


# in the command -------------------------------------------------------------------------------------------


def run(words: Sequence[str], processes: int, device: str) -> int:
    """Run `nasline WORDS` as several processes to their end, and return the exit code of the whole.

    SIGTERM and SIGINT are passed on to them; they end by themselves after the running optimiser step.

    Raises:
        ConfigurationError: the machine has fewer CUDA devices than processes.
        StepError: whatever ended them.
    """
    _require_devices(processes, device)
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import elastic_launch

    log.info("%d processes train together", processes)
    with tempfile.TemporaryDirectory(prefix="nasline-") as folder, _environment(folder, processes):
        launch = elastic_launch(_configuration(processes, folder), sys.executable)
        try:
            launch("-m", "pipeline_tasks", *words)
        except SignalException as told:
            raise TemporaryError(_stopped(_reports(folder), told.sigval)) from None
        except ChildFailedError as failed:
            ended = {index: (failure.exitcode, failure.timestamp) for index, failure in failed.failures.items()}
            exit_code, sentence = first_cause(ended, _reports(folder))
            _say(exit_code, sentence)
            return exit_code
    return 0


def _require_devices(processes: int, device: str) -> None:
    if device == "cpu":
        return
    import torch

    found = torch.cuda.device_count()
    if found < processes:
        raise ConfigurationError(
            f"{processes} processes need a CUDA device each, but torch finds {found}; give --processes {max(found, 1)}"
        )


def _configuration(processes: int, folder: str) -> LaunchConfig:
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.launcher.api import LaunchConfig

    if not log.isEnabledFor(logging.DEBUG):
        logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)
    return LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="localhost",
        max_restarts=0,
        monitor_interval=0.1,
        logs_specs=DefaultLogsSpecs(log_dir=folder),
        signals_to_handle="SIGTERM,SIGINT",
        shutdown_timeout=SECONDS_TO_SAVE,
    )


@contextmanager
def _environment(folder: str, processes: int) -> Iterator[None]:
    """What the training processes find in their environment, beside torchrun's own variables."""
    cores = len(os.sched_getaffinity(0))
    given = {
        REPORTS_VARIABLE: folder,
        LAUNCHER_VARIABLE: str(os.getpid()),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, cores // processes))),
    }
    before = {name: os.environ.get(name) for name in given}
    os.environ.update(given)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def _reports(folder: str) -> list[Report]:
    """What the training processes left, oldest first."""
    found = [Report(**json.loads(path.read_text(encoding="utf-8"))) for path in Path(folder).glob("*.json")]
    return sorted(found, key=lambda report: report.time)


def _stopped(reports: Sequence[Report], told: signal.Signals) -> str:
    """The first process's sentence, which names the step it has saved."""
    sentences = {report.rank: report.sentence for report in reports if report.exit_code == TemporaryError.exit_code}
    return sentences.get(0, f"told to stop by {told.name}; run the same command again to go on")


def first_cause(ended: Mapping[int, tuple[int, float]], reports: Sequence[Report]) -> tuple[int, str]:
    """Exit code and sentence of the failure that brought the others about.

    Args:
        ended: Per process that did not end well: its exit code, negative for a signal, and when the agent saw it.
        reports: What processes left, oldest first. One that lost another leaves a crash or a stop of its own.
    """
    lost = (EXIT_UNFORESEEN, TemporaryError.exit_code)
    for report in reports:
        if report.exit_code not in lost:
            return report.exit_code, report.sentence
    crashes = [report for report in reports if report.exit_code == EXIT_UNFORESEEN]
    latest = crashes[0].time + SECONDS_OF_DOUBT if crashes else float("inf")
    for index, (exit_code, seen) in sorted(ended.items()):
        if exit_code < 0 and seen <= latest:
            name = signal.Signals(-exit_code).name
            remedy = "run the same command again to go on from the last save"
            return TemporaryError.exit_code, f"training process {index} was ended by {name}; {remedy}"
    if reports:
        return reports[0].exit_code, reports[0].sentence
    index = min(ended)
    return ended[index][0], f"training process {index} ended with exit code {ended[index][0]}; see what it wrote above"


def _say(exit_code: int, sentence: str) -> None:
    if exit_code == EXIT_UNFORESEEN:  # an error of ours: the traceback, as a process alone would have left it
        print(sentence, file=sys.stderr, flush=True)
    else:
        log.error("%s", sentence)
