"""A workspace in an object store, worked on by any number of machines through a cache folder each.

The cache has the layout of a local workspace. In the store:

    runs/RUN/run.json                   written on the condition that nobody changed it since it was read
    steps/STEP/KEY/DIGEST/...           the files of an output; DIGEST is that of all of them, so two writers never meet
    steps/STEP/KEY/manifest.json        written last and only if absent: with it the output is published
    steps/STEP/KEY.partial/             state to resume from (see remote_state)
    steps/STEP/KEY.lock                 the lease (see remote_lease)
    champions/MODEL.move.lock           another, on the right to move a model's champion

Data that is read again and again (runs' tracking notes, the local registry, fetched champions) stays in the cache.
"""

from __future__ import annotations

import json
import logging
import os
import random
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

from pipeline_tasks import digests
from pipeline_tasks.errors import ConfigurationError, DataError, TemporaryError, UnavailableError
from pipeline_tasks.remote_lease import LEASE_SECONDS, RemoteLease
from pipeline_tasks.remote_state import RemoteState, StateUploads, fetch_files, upload_seconds
from pipeline_tasks.store import Conflict, MissingObject, ObjectStore, in_parallel
from pipeline_tasks.workspace import (
    LEASE_WAIT_SECONDS,
    MANIFEST,
    Published,
    Workspace,
    file_lock,
    parse_run,
    put_in_place,
    require_equal,
    require_intact,
    write_json,
)

log = logging.getLogger(__name__)

MARKER = "workspace.json"
FETCH_WAIT_SECONDS = 3600.0
RECORD_TRIES = 30


class RemoteWorkspace(Workspace):
    """A workspace at `s3://bucket/prefix`.

    Args:
        uri: Address of the workspace.
        cache: Folder of this machine. Default: a folder of its own in NASLINE_CACHE, or in ~/.cache/nasline.
        lease_seconds: How long a lease lasts that is not renewed.

    All methods raise UnavailableError when the store is away, ConfigurationError when it refuses.
    """

    def __init__(self, uri: str, cache: Path | None = None, lease_seconds: float = LEASE_SECONDS) -> None:
        self._unchecked_store = ObjectStore(uri)
        super().__init__(cache or cache_folder(self._unchecked_store.uri))
        self.place = self._unchecked_store.uri
        self._lease_seconds = lease_seconds
        self._leases: dict[tuple[str, str], RemoteLease] = {}
        self._uploads: dict[tuple[str, str], StateUploads] = {}
        self._saving = threading.Lock()
        self._run_versions: dict[str, str | None] = {}

    @cached_property
    def _store(self) -> ObjectStore:
        """Nothing is asked of the store before it is needed."""
        self._unchecked_store.require_conditional_writes(MARKER)
        return self._unchecked_store

    # runs -----------------------------------------------------------------------------------------------

    def run_directory(self, run: str) -> Path:
        """Folder of a run in the cache; its run.json is fetched when it is asked for first."""
        directory = super().run_directory(run)
        if run not in self._run_versions:
            self._fetch_run(run)
        return directory

    def run_ids(self) -> list[str]:
        """All runs of the workspace, sorted."""
        matches = (re.fullmatch(r"runs/([^/]+)/run\.json", name) for name in self._store.sizes("runs/"))
        return sorted(match[1] for match in matches if match)

    def read_run(self, run: str) -> dict[str, Any]:
        """The content of run.json; the copy in the cache while the store is away.

        Raises:
            UsageError: the run was never started.
        """
        try:
            content = self._fetch_run(run)
        except UnavailableError:
            if not (super().run_directory(run) / "run.json").exists():
                raise
            log.debug("run.json is read from the cache", exc_info=True)
            return super().read_run(run)
        if content is None:
            raise self._unknown_run(run)
        return content

    def write_run(self, run: str, content: dict[str, Any]) -> None:
        """Write run.json, if nobody has changed it since it was read here.

        Raises:
            TemporaryError: somebody has.
        """
        self.run_directory(run)
        try:
            self._put_run(run, content)
        except Conflict:
            raise TemporaryError(
                f"run {run!r} was changed by another process at the same moment; run the command again"
            ) from None

    def record_step(self, run: str, step_reference: str, key: str) -> None:
        """Add a step's key to run.json; safe against shards that finish at the same moment on many machines."""
        for attempt in range(RECORD_TRIES):
            content = self._fetch_run(run)
            if content is None:
                raise self._unknown_run(run)
            if content["steps"].get(step_reference) == key:
                return
            content["steps"][step_reference] = key
            try:
                return self._put_run(run, content)
            except Conflict:
                time.sleep(random.uniform(0, 0.05 * 2 ** min(attempt, 5)))
        raise TemporaryError(f"run {run!r} is changed by others without a pause; run the command again")

    def _fetch_run(self, run: str) -> dict[str, Any] | None:
        path = super().run_directory(run) / "run.json"
        stored = self._store.read(_run_name(run))
        self._run_versions[run] = stored.version if stored else None
        if stored is None:
            path.unlink(missing_ok=True)
            return None
        content = parse_run(stored.content.decode(), self._store.address(_run_name(run)))
        write_json(path, content)
        return content

    def _put_run(self, run: str, content: dict[str, Any]) -> None:
        version, body = self._run_versions[run], _json(content)
        if version is None:
            self._run_versions[run] = self._store.create(_run_name(run), body)
        else:
            self._run_versions[run] = self._store.replace(_run_name(run), body, version)
        write_json(super().run_directory(run) / "run.json", content)

    # steps ----------------------------------------------------------------------------------------------

    def find(self, step: str, key: str) -> Published | None:
        """The published step by its manifest; nothing else is fetched."""
        stored = self._store.read(f"{_name(step, key)}/{MANIFEST}")
        if stored is None:
            return self.published(step, key)
        return Published(self.step_directory(step, key), json.loads(stored.content))

    def published(self, step: str, key: str) -> Published | None:
        """The published step, fetched into the cache; None when no machine has finished that work yet.

        Raises:
            DataError: a published file is damaged or missing, here (where the store has lost it) or in the store.
        """
        stored = self._store.read(f"{_name(step, key)}/{MANIFEST}")
        cached = super().published(step, key)
        if stored is None:
            if cached is not None:
                require_intact(step, cached)
                log.warning("%s is no longer in the store; it is published again from the cache", _name(step, key))
                self._share(step, key, cached.directory, cached.manifest)
            return cached
        manifest: dict[str, Any] = json.loads(stored.content)
        return _if_equal(cached, manifest) or self._fetch(step, key, manifest)

    def verified(self, step: str, key: str, folder: str = "") -> Published | None:
        """As in a local workspace; what is fetched now was compared on its way, and a damaged copy is fetched anew.

        Raises:
            DataError: a published file is damaged or missing in the store too.
        """
        was_here = super().published(step, key) is not None
        published = self.published(step, key)
        damage = published.damage(folder) if published is not None and was_here else None
        if published is None or damage is None:
            return published
        stored = self._store.read(f"{_name(step, key)}/{MANIFEST}")
        if stored is None:
            require_intact(step, published, folder)
            return published
        log.warning("%s; the output is fetched anew from the store", damage.sentence)
        return self._fetch(step, key, json.loads(stored.content), damaged=True)

    @contextmanager
    def lease(self, step: str, key: str, wait_seconds: float = LEASE_WAIT_SECONDS) -> Iterator[None]:
        """Hold the right to work on a key, on this machine and among all.

        Raises:
            TemporaryError: another process still holds it after `wait_seconds`.
        """
        with super().lease(step, key, wait_seconds):
            name = _name(step, key) + ".lock"
            lease = RemoteLease(self._store, name, self.root / name, self._lease_seconds)
            uploads = StateUploads(lambda: self._upload_state(step, key, copy=True), upload_seconds())
            lease.acquire(wait_seconds)
            self._leases[step, key], self._uploads[step, key] = lease, uploads
            try:
                with uploads:
                    yield
            finally:
                del self._leases[step, key], self._uploads[step, key]
                lease.release()

    @contextmanager
    def champion_lease(self, model: str, wait_seconds: float = 60.0) -> Iterator[Callable[[], None]]:
        """The right to move a model's champion, on this machine and among all that work in this workspace.

        Raises:
            TemporaryError: another process still holds it after `wait_seconds`.
        """
        with super().champion_lease(model, wait_seconds):
            name = f"champions/{model}.move.lock"
            lease = RemoteLease(self._store, name, self._champion_lock(model), self._lease_seconds)
            lease.acquire(wait_seconds)
            try:
                yield lease.confirm
            finally:
                lease.release()

    def publish(self, step: str, key: str, manifest: dict[str, Any]) -> Published:
        """Upload the partial output, its manifest last and only if absent; then as in a local workspace.

        Raises:
            TemporaryError: the lease was lost.
            DataError: the key was published meanwhile with other content.
        """
        self._uploads[step, key].stop()
        self._leases[step, key].confirm()
        published = super().publish(step, key, manifest)
        self._state(step, key).delete()
        return published

    def _share(self, step: str, key: str, folder: Path, manifest: dict[str, Any]) -> None:
        prefix, files = f"{_name(step, key)}/{manifest['digest']}", manifest["files"]
        there = self._store.sizes(prefix + "/")
        missing = [name for name, entry in files.items() if there.get(f"{prefix}/{name}") != entry["size"]]
        in_parallel(lambda name: self._store.upload(f"{prefix}/{name}", folder / name), missing)
        if (step, key) in self._leases:
            self._leases[step, key].confirm()
        self._publish_manifest(f"{_name(step, key)}/{MANIFEST}", manifest)

    def _publish_manifest(self, name: str, manifest: dict[str, Any]) -> None:
        try:
            self._store.create(name, _json(manifest))
        except Conflict:
            stored = self._store.read(name)
            if stored is None:
                raise TemporaryError(f"{name} is being written by another process; run the step again") from None
            require_equal(self._store.address(name), json.loads(stored.content), manifest)

    def _fetch(self, step: str, key: str, manifest: dict[str, Any], damaged: bool = False) -> Published:
        """Download beside, compare digests and rename, so that a broken download is never taken for an output."""
        target, prefix = self.step_directory(step, key), f"{_name(step, key)}/{manifest['digest']}"
        beside = target.with_name(target.name + ".fetched")
        with file_lock(target.with_name(target.name + ".fetch-lock"), FETCH_WAIT_SECONDS, f"download of {prefix}"):
            fetched_meanwhile = _if_equal(super().published(step, key), manifest)
            if fetched_meanwhile is not None and not (damaged and fetched_meanwhile.damage()):
                return fetched_meanwhile
            shutil.rmtree(beside, ignore_errors=True)
            try:
                fetch_files(self._store, {n: f"{prefix}/{n}" for n in manifest["files"]}, manifest["files"], beside)
            except MissingObject:
                address = self._store.address(_name(step, key))
                raise DataError(f"{address} lacks a file of its manifest; delete it to have it made again") from None
            shutil.rmtree(target, ignore_errors=True)
            put_in_place(beside, target, manifest)
        return Published(target, manifest)

    # state ----------------------------------------------------------------------------------------------

    def save_state(self, step: str, key: str) -> None:
        """Upload the state folder; a store that is away is a warning, for the work can go on without.

        The same happens every five minutes (NASLINE_STATE_UPLOAD_SECONDS) while the work goes on.

        Raises:
            TemporaryError: the lease was lost, so another machine does this work.
        """
        self._upload_state(step, key, copy=False)

    def _upload_state(self, step: str, key: str, copy: bool) -> None:
        state = self._state(step, key)
        try:
            with self._saving:
                (state.save_copy if copy else state.save)(self._leases[step, key].confirm)
        except (UnavailableError, ConfigurationError) as error:
            log.warning("state was not uploaded, only this machine can go on from it: %s", error)

    def load_state(self, step: str, key: str) -> None:
        """Fetch the state that another machine left, if this machine's is older."""
        self._state(step, key).load()

    def _state(self, step: str, key: str) -> RemoteState:
        return RemoteState(self._store, _name(step, key) + ".partial", self.partial_directory(step, key) / "state")


def cache_folder(uri: str) -> Path:
    """Where a machine keeps its copy; one for each address and server."""
    base = os.environ.get("NASLINE_CACHE") or "~/.cache/nasline"
    server = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""
    return Path(base).expanduser() / digests.of_json([server, uri])[:16]


def _if_equal(cached: Published | None, manifest: dict[str, Any]) -> Published | None:
    return cached if cached is not None and cached.manifest["digest"] == manifest["digest"] else None


def _name(step: str, key: str) -> str:
    return f"steps/{step}/{key}"


def _run_name(run: str) -> str:
    return f"runs/{run}/run.json"


def _json(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=1, sort_keys=True, allow_nan=False) + "\n").encode()
