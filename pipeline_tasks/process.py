"""What a step's process owes its surroundings: it dies with its Airflow task and stops cleanly when told to."""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from pipeline_tasks.errors import StepError, StoppedError, TemporaryError

log = logging.getLogger(__name__)

PARENT_VARIABLE = "NASLINE_DIE_WITH_PARENT"
LAUNCHER_VARIABLE = "NASLINE_LAUNCHED_BY"
"""Process id of the `nasline` that started this one as one of several training processes (`pipeline_tasks.launch`)."""

_PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """Ask the kernel for a signal when the parent dies: SIGTERM where the DAG's operator asked for that.

    A plain child survives a `kill -9` of its Airflow task and would train on beside the retry. The parent may
    die before the request is made, so the parent is compared afterwards. One of several training processes gets
    SIGKILL: the command that started it passes every other signal on and waits, so who kills it means all.

    Raises:
        TemporaryError: the parent is already gone.
    """
    for variable, number in ((PARENT_VARIABLE, signal.SIGTERM), (LAUNCHER_VARIABLE, signal.SIGKILL)):
        expected = os.environ.pop(variable, None)
        if expected is not None and sys.platform.startswith("linux"):
            _die_with(int(expected), number)


def _die_with(parent: int, number: signal.Signals) -> None:
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, number, 0, 0, 0)
    if os.getppid() != parent:
        raise TemporaryError(f"the process {parent} that started this step is gone; the step stops before it began")


def share_cores_kindly() -> None:
    """Let idle threads of a parallel region sleep instead of spin; read by the OpenMP runtime when torch is loaded.

    With another process on one of two cores, training ran at 10.9 instead of 2.8 images/s (docs/LOG.md).
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


class Stopper:
    """Turns SIGTERM and SIGINT into an orderly end.

    Steps that cannot pause are interrupted where they are (nothing is published before its end). Training loops
    run inside `cooperative()`: there the signal only raises a flag, which they read after each optimiser step.
    """

    def __init__(self) -> None:
        self._requested = False
        self._cooperative = False
        self._parent = os.getppid()

    def install(self) -> None:
        """Handle the signals from now on (main thread only)."""
        signal.signal(signal.SIGTERM, self._handle)
        signal.signal(signal.SIGINT, self._handle)

    def requested(self) -> bool:
        """Whether the process was told to stop."""
        return self._requested

    def stop_if_requested(self) -> None:
        """End here when told to before; for places where the interruption itself may have been taken for an error.

        Raises:
            StoppedError: the process was told to stop.
        """
        if self._requested:
            raise StoppedError("told to stop; nothing was published")

    @contextmanager
    def told_apart(self) -> Iterator[None]:
        """Around work in libraries, some of which take the interruption for an error of their own (an import that broke
        off, an export that failed): the end is then the one that was asked for.

        Raises:
            StoppedError: instead of such an error, when the process was told to stop.
        """
        try:
            yield
        except StepError:
            raise
        except Exception:  # whatever a library made of it
            self.stop_if_requested()
            raise

    @contextmanager
    def cooperative(self) -> Iterator[None]:
        """Inside, the caller promises to read `requested` often."""
        self._cooperative = True
        try:
            yield
        finally:
            self._cooperative = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._requested and not self._cooperative:
            return
        self._requested = True
        if os.getppid() != self._parent:
            _send_output_nowhere()
        if not self._cooperative:
            raise StoppedError(f"told to stop by {signal.Signals(number).name}; nothing was published")


def end_undisturbed() -> None:
    """Have an installed `Stopper` ignore its signals from here on: the process only has to say how it ended.

    When one training process dies, the others notice by themselves and are told to stop as well; the signal used to
    come while they were leaving their reason.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        if isinstance(getattr(signal.getsignal(number), "__self__", None), Stopper):
            signal.signal(number, signal.SIG_IGN)


def _send_output_nowhere() -> None:
    """Once the parent is dead its pipe is broken, and a log line would end the step before its checkpoint."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    os.close(nowhere)
