"""The state of unfinished work in an object store, so that another machine goes on from it.

    KEY.partial/files/SHA256     the files, by their digest
    KEY.partial/state.json       names and digests of the files that make up one state; written last

The list is only written when every file it names is there, so a state that was cut off on its way up is never used.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

from pipeline_tasks import digests
from pipeline_tasks.digests import FileDigests
from pipeline_tasks.errors import DataError, TemporaryError
from pipeline_tasks.store import MissingObject, ObjectStore, in_parallel

log = logging.getLogger(__name__)

TRIES = 3
INTERVAL_VARIABLE, UPLOAD_SECONDS = "NASLINE_STATE_UPLOAD_SECONDS", 300.0


class RemoteState:
    """The state folder of one piece of work, here and in the store.

    Args:
        store: Where it is kept.
        prefix: `steps/STEP/KEY.partial`.
        folder: The state folder of this machine. Beside it a mark says which state of the store it grew from.
    """

    def __init__(self, store: ObjectStore, prefix: str, folder: Path) -> None:
        self._store, self._prefix, self._folder = store, prefix, folder
        self._mark = folder.with_name("state.uploaded")
        self._copy = folder.with_name("state.copy")

    def save(self, confirm: Callable[[], None]) -> None:
        """Upload what changed since the last time, then the list, then drop what it no longer names. Nobody may write
        into the folder meanwhile.

        Args:
            confirm: Raises when this process may not write any more.
        """
        self._save(self._folder, confirm)

    def save_copy(self, confirm: Callable[[], None]) -> None:
        """The same beside the work that writes into the folder; what it holds at one moment is uploaded.

        Raises:
            OSError: there is no room for a copy of the folder beside it.
        """
        try:
            if _copied_at_one_moment(self._folder, self._copy):
                self._save(self._copy, confirm)
        finally:
            shutil.rmtree(self._copy, ignore_errors=True)

    def _save(self, folder: Path, confirm: Callable[[], None]) -> None:
        files = {name: entry for name, entry in digests.of_folder(folder).items() if _is_whole(name)}
        digest = digests.of_files(files)
        if digest == self._marked() or not files:
            return
        confirm()
        before = _contents(self._read_list() or {})
        fresh = {content: name for name, content in _by_name(files) if content not in before}
        in_parallel(lambda content: self._store.upload(self._object(content), folder / fresh[content]), fresh)
        confirm()
        self._store.write(self._list, (json.dumps(files, indent=1) + "\n").encode())
        self._mark.write_text(digest, encoding="utf-8")
        self._store.delete(self._object(content) for content in before - _contents(files))

    def load(self) -> None:
        """Replace the folder by the store's state, unless it is what this folder grew from.

        Raises:
            TemporaryError: another process keeps replacing it.
        """
        for _ in range(TRIES):
            files = self._read_list()
            if files is None or digests.of_files(files) == self._marked():
                return
            try:
                self._fetch(files)
            except MissingObject:
                continue  # the last owner, not yet aware that it has lost the lease, has replaced it just now
            log.info("state of another machine fetched: %d files from %s", len(files), self._store.address(self._list))
            return
        raise TemporaryError(f"{self._store.address(self._list)} is being replaced by another machine; try again")

    def delete(self) -> None:
        """Remove the state from the store, with what broken uploads left."""
        self._store.delete(self._store.sizes(self._prefix + "/"))

    def _fetch(self, files: FileDigests) -> None:
        beside = self._folder.with_name("state.fetched")
        shutil.rmtree(beside, ignore_errors=True)
        objects = {name: self._object(content) for name, content in _by_name(files)}
        fetch_files(self._store, objects, files, beside)
        shutil.rmtree(self._folder, ignore_errors=True)
        beside.rename(self._folder)
        self._mark.write_text(digests.of_files(files), encoding="utf-8")

    def _read_list(self) -> FileDigests | None:
        stored = self._store.read(self._list)
        if stored is None:
            return None
        files: FileDigests = json.loads(stored.content)
        return files

    def _marked(self) -> str:
        return self._mark.read_text(encoding="utf-8") if self._mark.exists() else ""

    def _object(self, content: str) -> str:
        return f"{self._prefix}/files/{content}"

    @property
    def _list(self) -> str:
        return f"{self._prefix}/state.json"


class StateUploads:
    """Uploads the state of running work at intervals, so that a machine that is lost takes no more than that along.

    Args:
        save: Uploads the state as it is; called in a thread. It may raise TemporaryError when this process may not
            write any more.
        seconds: Between two uploads.
    """

    def __init__(self, save: Callable[[], None], seconds: float) -> None:
        self._save, self._seconds = save, seconds
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="state uploads", daemon=True)

    def __enter__(self) -> None:
        """Begin to wait for the first one."""
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Return when no upload runs and none will."""
        self._ended.set()
        self._thread.join()

    def _keep(self) -> None:
        while not self._ended.wait(self._seconds):
            try:
                self._save()
            except TemporaryError as error:
                log.error("%s", error)
                return
            except OSError as error:
                log.warning("state was not uploaded, there is no room for a copy of it: %s", error)


def upload_seconds() -> float:
    """NASLINE_STATE_UPLOAD_SECONDS, or 300: what a lost machine may cost of work whose epochs are long."""
    text = os.environ.get(INTERVAL_VARIABLE, "")
    try:
        seconds = float(text) if text else UPLOAD_SECONDS
    except ValueError:
        seconds = 0.0
    if 0 < seconds < threading.TIMEOUT_MAX:
        return seconds
    log.warning("%s is %r, which is no number of seconds above 0; it is %g", INTERVAL_VARIABLE, text, UPLOAD_SECONDS)
    return UPLOAD_SECONDS


def _copied_at_one_moment(folder: Path, copy: Path) -> bool:
    """Copy a folder that is written into; False where it changed under every attempt.

    A copy between whose beginning and end no file came, went or changed is what a kill would have left, and every step
    goes on from that.
    """
    for _ in range(TRIES):
        shutil.rmtree(copy, ignore_errors=True)
        try:
            before = _signature(folder)
            for path in before:
                (copy / path.relative_to(folder)).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, copy / path.relative_to(folder))
            if _signature(folder) == before:
                return True
        except FileNotFoundError:
            log.debug("a file of %s was replaced while it was copied", folder)
        time.sleep(1.0)
    return False


def _signature(folder: Path) -> dict[Path, tuple[int, int, int]]:
    """What changes with every write: inode, size and time of each file."""
    found = {path: path.stat() for path in folder.rglob("*") if path.is_file()}
    return {path: (status.st_ino, status.st_size, status.st_mtime_ns) for path, status in found.items()}


def fetch_files(store: ObjectStore, objects: dict[str, str], files: FileDigests, folder: Path) -> None:
    """Download files into a folder and compare their digests.

    Args:
        objects: Name of each file's object.
        files: Digest and size of each file.

    Raises:
        MissingObject: one of them is not there.
        DataError: one has another digest, twice.
    """
    folder.mkdir(parents=True)

    def fetch(name: str) -> None:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        for _ in range(2):
            store.download(objects[name], path)
            if digests.of_file(path) == files[name]["sha256"]:
                return
        raise DataError(
            f"{store.address(objects[name])} is damaged: its content is not what {files[name]['sha256'][:12]} names; "
            "restore it, or delete the folder around it to have the work done again"
        )

    in_parallel(fetch, objects)


def _is_whole(name: str) -> bool:
    """Files are written beside their place first; what a kill left of that is no state."""
    return not name.endswith(".partial")


def _by_name(files: FileDigests) -> list[tuple[str, str]]:
    return [(name, entry["sha256"]) for name, entry in files.items()]


def _contents(files: FileDigests) -> set[str]:
    return {entry["sha256"] for entry in files.values()}
