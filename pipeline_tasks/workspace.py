"""The workspace: where runs are written down and where steps publish finished work.

    runs/RUN/run.json            the frozen run, and the key of each of its steps
    steps/STEP/KEY/              published work; it is complete because manifest.json exists
    steps/STEP/KEY.partial/      work in progress: output/ (to be published) and state/ (to resume from)
    steps/STEP/KEY.lock          the lease: held by an OS lock while a process works on that key

`s3://bucket/prefix` is a workspace too: see `pipeline_tasks.remote_workspace`.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from pipeline_tasks import digests
from pipeline_tasks.errors import DataError, TemporaryError, UsageError

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
RUN_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,199}")
LEASE_WAIT_SECONDS = 45.0


@dataclass(frozen=True)
class Published:
    """A published step: its folder and manifest."""

    directory: Path
    manifest: dict[str, Any]

    def digest(self, folder: str = "") -> str:
        """Content digest of the whole output or of a subfolder."""
        return digests.of_files(self.manifest["files"], folder)

    def damage(self, folder: str = "") -> Damage | None:
        """The first file of the output, or of a subfolder, that is not as the manifest says; None where all are."""
        files = self.manifest["files"]
        if digests.of_files(files) != self.manifest["digest"]:
            return Damage(self.directory / MANIFEST, "does not have the digest of the files it lists")
        prefix = folder + "/" if folder else ""
        for name, entry in files.items():
            if name.startswith(prefix) and (what := _difference(self.directory / name, entry["sha256"])):
                return Damage(self.directory / name, what)
        listed = {MANIFEST, *files}
        below = _files_below(self.directory / folder)
        strangers = (path for path in below if path.relative_to(self.directory).as_posix() not in listed)
        return next((Damage(path, "is not of this output", "move it elsewhere") for path in strangers), None)


@dataclass(frozen=True)
class Damage:
    """A file of a published step that is not as it was published. remedy: empty where the work must be done again."""

    file: Path
    what: str
    remedy: str = ""

    @property
    def sentence(self) -> str:
        """Which file, and what is wrong with it."""
        return f"{self.file} {self.what}"


def open_workspace(place: str) -> Workspace:
    """The workspace in a folder, or in an object store (`s3://bucket/prefix`).

    Raises:
        UsageError: the place is an address of another kind.
    """
    if place.startswith("s3://"):
        from pipeline_tasks.remote_workspace import RemoteWorkspace

        if not os.environ.get("MLFLOW_TRACKING_URI"):
            log.warning("MLFLOW_TRACKING_URI is not set: runs and registered models stay on this machine alone")
        return RemoteWorkspace(place)
    if "://" in place:
        raise UsageError(f"--workspace {place!r} must be a folder or s3://BUCKET/PREFIX")
    return Workspace(Path(place))


class Workspace:
    """A folder that holds runs and published steps."""

    def __init__(self, root: Path) -> None:
        self.root = root.expanduser().resolve()
        self.place = str(self.root)
        """How the user calls it."""

    # runs -----------------------------------------------------------------------------------------------

    def run_directory(self, run: str) -> Path:
        """Folder of a run.

        Raises:
            UsageError: the id holds characters that are no part of a file name.
        """
        if not RUN_ID.fullmatch(run):
            raise UsageError(f"--run {run!r} is no run id; use letters, digits, '.', '_', '+' and '-'")
        return self.root / "runs" / run

    def run_ids(self) -> list[str]:
        """All runs of the workspace, sorted."""
        return sorted(path.parent.name for path in (self.root / "runs").glob("*/run.json"))

    def read_run(self, run: str) -> dict[str, Any]:
        """The content of run.json.

        Raises:
            UsageError: the run was never started.
            DataError: the file is damaged.
        """
        path = self.run_directory(run) / "run.json"
        try:
            return parse_run(path.read_text(encoding="utf-8"), str(path))
        except FileNotFoundError:
            raise self._unknown_run(run) from None

    def _unknown_run(self, run: str) -> UsageError:
        return UsageError(
            f"run {run!r} does not exist in workspace {self.place}; create it with `nasline start --run {run}`"
        )

    def write_run(self, run: str, content: dict[str, Any]) -> None:
        """Write run.json in one piece."""
        write_json(self.run_directory(run) / "run.json", content)

    def record_step(self, run: str, step_reference: str, key: str) -> None:
        """Add a step's key to run.json; safe against shards that finish at the same moment."""
        with file_lock(self.run_directory(run) / "run.lock"):
            content = self.read_run(run)
            if content["steps"].get(step_reference) != key:
                content["steps"][step_reference] = key
                self.write_run(run, content)

    # steps ----------------------------------------------------------------------------------------------

    def step_directory(self, step: str, key: str) -> Path:
        """Where a step with that key publishes."""
        return self.root / "steps" / step / key

    def partial_directory(self, step: str, key: str) -> Path:
        """Where a step with that key works until it publishes."""
        directory = self.step_directory(step, key)
        return directory.with_name(directory.name + ".partial")

    def find(self, step: str, key: str) -> Published | None:
        """The published step, whose files may be elsewhere until `published` is called; None as there."""
        return self.published(step, key)

    def published(self, step: str, key: str) -> Published | None:
        """The published step, or None when that work was not finished yet.

        Raises:
            DataError: its manifest is damaged.
        """
        directory = self.step_directory(step, key)
        try:
            manifest = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except ValueError:
            raise DataError(
                f"{directory / MANIFEST} is damaged: remove the folder {directory} and run the step {step} again"
            ) from None
        return Published(directory, manifest)

    def verified(self, step: str, key: str, folder: str = "") -> Published | None:
        """As `published`, with every file of the output, or of its subfolder `folder`, compared with its digest.

        Raises:
            DataError: a file was changed, is gone, or was put there by somebody else.
        """
        published = self.published(step, key)
        if published is not None:
            require_intact(step, published, folder)
        return published

    @contextmanager
    def lease(self, step: str, key: str, wait_seconds: float = LEASE_WAIT_SECONDS) -> Iterator[None]:
        """Hold the right to work on a key; the OS gives it back when the process dies.

        Raises:
            TemporaryError: another process still holds it after `wait_seconds`.
        """
        path = self.step_directory(step, key)
        with file_lock(path.with_name(path.name + ".lock"), wait_seconds, f"{step}/{key}"):
            yield

    @contextmanager
    def champion_lease(self, model: str, wait_seconds: float = 60.0) -> Iterator[Callable[[], None]]:
        """Hold the right to move a model's champion. Gives a function that raises where it was lost meanwhile.

        Raises:
            TemporaryError: another process still holds it after `wait_seconds`.
        """
        with file_lock(self._champion_lock(model), wait_seconds, f"the champion of {model}"):
            yield lambda: None

    def _champion_lock(self, model: str) -> Path:
        return self.root / "champions" / f"{model}.move.lock"

    def publish(self, step: str, key: str, manifest: dict[str, Any]) -> Published:
        """Make the partial output the published one, in one rename; its state folder is removed.

        Raises:
            DataError: the key was published meanwhile with other content.
        """
        partial, target = self.partial_directory(step, key), self.step_directory(step, key)
        output = partial / "output"
        files = digests.of_folder(output)
        manifest = {**manifest, "files": files, "digest": digests.of_files(files)}
        existing = self.published(step, key)
        if existing is not None:
            require_equal(str(existing.directory), existing.manifest, manifest)
            return existing
        self._share(step, key, output, manifest)
        put_in_place(output, target, manifest)
        shutil.rmtree(partial, ignore_errors=True)
        return Published(target, manifest)

    def _share(self, step: str, key: str, folder: Path, manifest: dict[str, Any]) -> None:
        """Publish for other machines; nothing to do where all see the same folder."""

    def save_state(self, step: str, key: str) -> None:
        """Keep the state of unfinished work for other machines; nothing to do where all see the same folder."""

    def load_state(self, step: str, key: str) -> None:
        """Take over the state that another machine left; nothing to do where all see the same folder."""


def parse_run(text: str, place: str) -> dict[str, Any]:
    """The content of a run.json.

    Raises:
        DataError: the text is damaged.
    """
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{place}:{error.lineno}: run.json is damaged ({error.msg}); start the run anew") from None
    assert isinstance(content, dict)
    return content


def require_equal(place: str, existing: dict[str, Any], manifest: dict[str, Any]) -> None:
    """Compare two manifests of one key.

    Raises:
        DataError: their files differ.
    """
    if existing["digest"] != manifest["digest"]:
        raise DataError(
            f"{place} was published meanwhile with other content "
            f"({existing['digest'][:12]} is not {manifest['digest'][:12]}); nothing was overwritten"
        )


def require_intact(step: str, published: Published, folder: str = "") -> None:
    """Compare the files of a published step, or of a subfolder, with their digests.

    Raises:
        DataError: one was changed, is gone, or was put there by somebody else.
    """
    if damage := published.damage(folder):
        remedy = damage.remedy or f"remove the folder {published.directory} and run the step {step} again"
        raise DataError(f"{damage.sentence}: {remedy}")


def _difference(file: Path, expected: str) -> str | None:
    try:
        found = digests.of_file(file)
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    return None if found == expected else f"was changed after it was published ({found[:12]} is not {expected[:12]})"


def _files_below(folder: Path) -> Iterator[Path]:
    """Hidden ones left out: file systems and desktops put their own there."""
    return (path for path in sorted(folder.rglob("*")) if path.is_file() and not path.name.startswith("."))


def put_in_place(folder: Path, target: Path, manifest: dict[str, Any]) -> None:
    """Add the manifest and make the folder the published one, in one rename."""
    write_json(folder / MANIFEST, manifest)
    _flush_folder(folder)
    os.rename(folder, target)
    _flush(target.parent)


def lease_wait_seconds() -> float:
    """NASLINE_LEASE_WAIT_SECONDS, or the default. The DAGs wait for hours: the work that is waited for is their own."""
    return float(os.environ.get("NASLINE_LEASE_WAIT_SECONDS", LEASE_WAIT_SECONDS))


@contextmanager
def file_lock(path: Path, wait_seconds: float = 60.0, what: str = "") -> Iterator[None]:
    """Hold an exclusive OS lock on a file; the kernel releases it when the process dies."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+", encoding="utf-8") as file:
        _wait_for_lock(file, path, wait_seconds, what or str(path))
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield


def _wait_for_lock(file: IO[str], path: Path, wait_seconds: float, what: str) -> None:
    deadline = time.monotonic() + wait_seconds
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() >= deadline:
                holder = path.read_text(encoding="utf-8").strip() or "unknown"
                raise TemporaryError(
                    f"{what} is being worked on by process {holder}; wait for it to end, or stop it, and try again"
                ) from None
            time.sleep(0.2)


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file so that a reader sees the old or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("w", encoding="utf-8") as file:
        json.dump(content, file, indent=1, sort_keys=True, allow_nan=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _flush_folder(folder: Path) -> None:
    for path in folder.rglob("*"):
        _flush(path)
    _flush(folder)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
