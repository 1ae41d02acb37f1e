"""A lease in an object store: an object with its owner and when it ends, renewed while the owner lives.

Whether it has ended is judged by the store's clock alone: how long ago the object was written, against how long its
owner said it would hold. All writes are conditional, so of two machines that reach for it one gets it, and an owner
that was frozen or cut off learns at its next renewal that the lease has gone to another.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import threading
import time
import uuid
from pathlib import Path
from typing import Any

from pipeline_tasks.errors import StepError, TemporaryError
from pipeline_tasks.store import Conflict, ObjectStore, StoredObject

log = logging.getLogger(__name__)

LEASE_SECONDS = 60.0


class RemoteLease:
    """The right to work on one thing, for the caller that also holds the OS lock on `lock_file`.

    Args:
        store: Where the lease lies.
        name: Its object.
        lock_file: A lock file of this machine. An earlier owner that held the lock on the very same file is dead.
        seconds: How long the lease lasts without a renewal.
    """

    def __init__(self, store: ObjectStore, name: str, lock_file: Path, seconds: float = LEASE_SECONDS) -> None:
        self._store, self._name, self._seconds = store, name, seconds
        self._owner = uuid.uuid4().hex
        self._lock_identity = lock_identity(lock_file)
        self._version = ""
        self._renewals = 0
        self._lost: TemporaryError | None = None
        self._writing = threading.Lock()
        self._released = threading.Event()
        self._thread = threading.Thread(target=self._keep, name=f"lease {name}", daemon=True)

    def acquire(self, wait_seconds: float) -> None:
        """Take the lease, and renew it from then on.

        Raises:
            TemporaryError: another machine still holds it after `wait_seconds`.
        """
        deadline = time.monotonic() + wait_seconds
        while True:
            stored = self._store.read(self._name)
            if (stored is None or self._is_free(stored)) and self._take(stored):
                self._thread.start()
                return
            if time.monotonic() >= deadline:
                raise TemporaryError(
                    f"{self._name.removesuffix('.lock')} is being worked on by {_holder(stored)}; wait for it to end, "
                    "or stop it, and try again"
                )
            time.sleep(min(1.0, self._seconds / 4))

    def confirm(self) -> None:
        """Renew the lease now.

        Raises:
            TemporaryError: it has gone to another machine; nothing may be published any more.
        """
        with self._writing:
            if self._lost is None:
                self._renew()
            if self._lost is not None:
                raise self._lost

    def release(self) -> None:
        """Give the lease back; when the store is away it ends by itself."""
        self._released.set()
        self._thread.join(timeout=5.0)
        if self._thread.is_alive() or self._lost is not None:
            return
        try:
            self._store.replace(self._name, _json({"owner": None}), self._version)
        except (Conflict, StepError) as error:
            log.debug("lease %s was not given back (%s); it ends in %.0f s", self._name, error, self._seconds)

    def _take(self, stored: StoredObject | None) -> bool:
        try:
            if stored is None:
                self._version = self._store.create(self._name, self._content())
            else:
                self._version = self._store.replace(self._name, self._content(), stored.version)
        except Conflict:
            return False
        return True

    def _is_free(self, stored: StoredObject) -> bool:
        """Given back, ended, left by a dead process of this machine, or ours by a write whose answer got lost."""
        held = json.loads(stored.content)
        if held["owner"] in (None, self._owner) or held["lock"] == self._lock_identity:
            return True
        return stored.age_seconds > float(held["seconds"])

    def _keep(self) -> None:
        """Renew three times within the lease's life, until it is given back or lost."""
        warned = False
        while not self._released.wait(self._seconds / 3):
            try:
                self.confirm()
                warned = False
            except TemporaryError as error:
                log.error("%s", error)
                return
            except StepError as error:
                (log.debug if warned else log.warning)("lease %s could not be renewed: %s", self._name, error)
                warned = True

    def _renew(self) -> None:
        self._renewals += 1
        try:
            self._version = self._store.replace(self._name, self._content(), self._version)
        except Conflict:
            stored = self._store.read(self._name)
            if stored is not None and json.loads(stored.content)["owner"] == self._owner:
                self._version = stored.version  # written, but the answer got lost
                return
            self._lost = TemporaryError(
                f"the lease on {self._name.removesuffix('.lock')} was lost to {_holder(stored)}; nothing was "
                "published, run the step again when that one has ended"
            )

    def _content(self) -> bytes:
        """No two renewals have equal bytes: a version made from the content could not tell them apart."""
        ends = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() + self._seconds))
        return _json(
            {
                "owner": self._owner,
                "host": platform.node(),
                "process": os.getpid(),
                "lock": self._lock_identity,
                "seconds": self._seconds,
                "renewals": self._renewals,
                "ends_about": ends,
            }
        )


def lock_identity(lock_file: Path) -> str:
    """Names a lock file of one running kernel; equal means the same OS lock."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    kernel = boot.read_text(encoding="ascii").strip() if boot.exists() else platform.node()
    status = lock_file.stat()
    return f"{kernel}:{status.st_dev}:{status.st_ino}"


def _holder(stored: StoredObject | None) -> str:
    if stored is None:
        return "nobody (the lease was deleted)"
    held: dict[str, Any] = json.loads(stored.content)
    if held["owner"] is None:
        return "another machine, which has ended since"
    return f"process {held['process']} on {held['host']} (lease renewed {stored.age_seconds:.0f} s ago)"


def _json(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=1) + "\n").encode()
