"""The state of unfinished work in an object store, so that another machine goes on from it.

    KEY.partial/files/SHA256     the files, by their digest
    KEY.partial/state.json       names and digests of the files that make up one state; written last

The list is only written when every file it names is there, so a state that was cut off on its way up is never used.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

from pipeline_tasks import digests
from pipeline_tasks.digests import FileDigests
from pipeline_tasks.errors import DataError, TemporaryError
from pipeline_tasks.store import MissingObject, ObjectStore, in_parallel

log = logging.getLogger(__name__)

TRIES = 3


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

    def save(self, confirm: Callable[[], None]) -> None:
        """Upload what changed since the last time, then the list, then drop what it no longer names.

        Args:
            confirm: Raises when this process may not write any more.
        """
        files = {name: entry for name, entry in digests.of_folder(self._folder).items() if _is_whole(name)}
        digest = digests.of_files(files)
        if digest == self._marked() or not files:
            return
        confirm()
        before = _contents(self._read_list() or {})
        fresh = {content: name for name, content in _by_name(files) if content not in before}
        in_parallel(lambda content: self._store.upload(self._object(content), self._folder / fresh[content]), fresh)
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
