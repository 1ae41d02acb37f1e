"""A step's process as its Airflow task sees it: started by argv, read line by line, stopped with all it started.

Plain standard library, so that it can be read, and tested, without Airflow.
"""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress

DIE_WITH_PARENT = "NASLINE_DIE_WITH_PARENT"
"""Tells the step whose child it is, so that it asks the kernel to end it when that process dies."""


class ChildProcess:
    """One command in a session, and so a process group, of its own.

    The group is what gets signalled: workers the command starts go where it goes. Whatever of the group is
    left when the command itself has ended is killed, so reading its output always comes to an end.
    """

    def __init__(self, argv: Sequence[str], environment: Mapping[str, str]) -> None:
        self._process = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**environment, DIE_WITH_PARENT: str(os.getpid())},
            start_new_session=True,
        )
        self._watcher = threading.Thread(target=self._end_group_with_leader, daemon=True)
        self._watcher.start()
        self._last_resort: threading.Timer | None = None

    @property
    def pid(self) -> int:
        """Process id, which is the process group's id too."""
        return self._process.pid

    def lines(self) -> Iterator[str]:
        """The output, standard error included, a line at a time as it comes; bytes that are no UTF-8 replaced.

        Of a progress bar, which overwrites its line, the last state is kept.
        """
        assert self._process.stdout is not None
        for line in self._process.stdout:
            yield line.decode(errors="replace").rstrip().rpartition("\r")[2]

    def wait(self) -> int:
        """The exit code, negative for a signal, once the whole group is gone."""
        self._watcher.join()
        if self._last_resort is not None:
            self._last_resort.cancel()
        assert self._process.stdout is not None
        self._process.stdout.close()
        return self._process.wait()

    def ask_to_stop(self, grace_seconds: float) -> None:
        """SIGTERM to the group now, SIGKILL after `grace_seconds`; returns at once, so a signal handler may call it."""
        if self._last_resort is not None or not self._watcher.is_alive():
            return
        self._signal_group(signal.SIGTERM)
        self._last_resort = threading.Timer(grace_seconds, self._signal_group, (signal.SIGKILL,))
        self._last_resort.daemon = True
        self._last_resort.start()

    def _signal_group(self, number: signal.Signals) -> None:
        if self._watcher.is_alive():  # the watcher lives until the group is over; later the id may be another's
            with suppress(ProcessLookupError):
                os.killpg(self.pid, number)

    def _end_group_with_leader(self) -> None:
        """Wait for the command without collecting it: its id stays taken while the rest of the group is killed."""
        os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
