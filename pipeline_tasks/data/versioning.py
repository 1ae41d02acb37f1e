"""Versions of raw data: `nasline data add`, content digests and the DVC revision of a dataset folder."""

from __future__ import annotations

import logging
import os
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pipeline_tasks import bucket_images
from pipeline_tasks.data.content_digest import files_below, folder_digest
from pipeline_tasks.data.readers import Recognised, open_reader
from pipeline_tasks.data.readers.listing import list_folder
from pipeline_tasks.errors import ConfigurationError, DataError, StepError, TemporaryError, UsageError


@dataclass(frozen=True)
class AddedDataset:
    """A dataset folder that DVC now tracks."""

    path: Path
    format: str
    reason: str  # why it was taken for that format
    digest: str  # what MLflow shows: MD5 of DVC's listing and ".dir"
    files: int
    size_bytes: int
    dvc_file: Path
    next_commands: tuple[str, ...]

    def __str__(self) -> str:
        commands = "\n".join(f"  {command}" for command in self.next_commands)
        megabytes = self.size_bytes / 1e6
        return (
            f"format {self.format}: {self.reason}\n"
            f"{self.path}: {self.files} files, {megabytes:.1f} MB, digest {self.digest}\nNext:\n{commands}"
        )


def add(
    path: Path,
    to: Path | None = None,
    given_format: str | None = None,
    allow_links: bool = False,
    images: str | None = None,
) -> AddedDataset:
    """Track a dataset folder with DVC; with `to`, copy it there first (a folder inside the DVC project).

    `allow_links`: follow links that lead out of the folder; a copy then holds what they point to. `images`: the
    address s3://BUCKET/PREFIX where the pictures stay, in place of the folder images/; they are listed, as they are
    again whenever such a set is added.

    Prints what the folder was recognised as and why, digest, size and the commands that come next. Raises `DataError`
    for a folder that is no dataset or that DVC refuses, `UsageError` outside a DVC project.
    """
    if not path.is_dir():
        raise DataError(f"{path} is not a folder; give the folder of a dataset")
    address = images or bucket_images.address_of(path)
    recognised = None if address else _recognise(path, given_format, allow_links)
    if images and bucket_images.address_of(path) is None:
        _require_no_pictures(path, images, allow_links)
    copied = to is not None and not to.exists()
    folder = path if to is None else _copy(path, to)
    _check_no_links(folder)
    if recognised is None:
        with _copy_removed(folder, copied):
            bucket_images.list_bucket(folder, str(address))
            recognised = _recognise(folder, given_format, allow_links)
    project = project_root(folder)
    if project is None:
        raise UsageError(
            f"{path} lies outside of a DVC project; copy it in with `nasline data add {shlex.quote(str(path))} "
            f"--to data/{folder.resolve().name}`, or run `git init` and `dvc init` in a folder above it"
        )
    with _marked(folder, copied), dvc_errors(folder):
        from dvc.repo import Repo

        with Repo(str(project)) as repo:
            _check_seen_by_dvc(repo, folder)
            repo.scm_context.quiet = True  # its hint is printed by the command, with the digest
            (stage,) = repo.add([str(folder.resolve())])
    tracked = stage.outs[0]
    added = AddedDataset(
        path=folder,
        format=recognised.format,
        reason=recognised.reason,
        digest=tracked.hash_info.value,
        files=tracked.meta.nfiles,
        size_bytes=tracked.meta.size,
        dvc_file=pointer_of(folder),
        next_commands=_next_commands(folder),
    )
    print(added)
    return added


def _require_no_pictures(path: Path, address: str, allow_links: bool) -> None:
    """Before anything is written: the folder images/ and the bucket cannot both hold them."""
    pictures = list_folder(path, allow_links).pictures
    if own := next((picture for picture in pictures if picture.startswith(bucket_images.PICTURES)), None):
        raise DataError(f"{path / own} lies here, while images/ shall stay at {address}; remove one of the two")


def dataset_digest(path: Path, cache: Path | None = None) -> str:
    """Content digest of a dataset folder, the same whether DVC tracks it or not ("….dir", 36 characters).

    `cache` is the file that remembers digests (`content_digest`). Raises `DataError` when the folder is missing.
    """
    if not path.is_dir():
        remedy = f"run `dvc pull {pointer_of(path)}`" if pointer_of(path).is_file() else "give the folder of a dataset"
        raise DataError(f"{path} is not a folder; {remedy}")
    return folder_digest(path, _versioned_files(path), cache)


def dvc_revision(path: Path, cache: Path | None = None) -> str | None:
    """The Git commit that records this dataset, or None when DVC or Git does not track it.

    "+dirty" follows when the folder's content or its .dvc file differs from that commit.
    """
    tracked = next((folder for folder in (path, *path.resolve().parents) if pointer_of(folder).is_file()), None)
    if tracked is None or project_root(tracked) is None:
        return None
    pointer = pointer_of(tracked)
    commit = git_output(pointer.parent, "rev-parse", "--verify", "HEAD")
    if commit is None:
        return None
    pointer_changed = git_output(pointer.parent, "status", "--porcelain", "--", pointer.name) != ""
    recorded = yaml.safe_load(pointer.read_text(encoding="utf-8"))["outs"][0].get("md5")
    return commit if not pointer_changed and recorded == dataset_digest(tracked, cache) else f"{commit}+dirty"


def dvc_remote(path: Path) -> str | None:
    """Name and address of the remote that a set is pushed to by default, without a user's name or password.

    None where DVC tracks nothing, or no remote is set.
    """
    project = project_root(path)
    if project is None:
        return None
    with dvc_errors(path):
        from dvc.config import Config

        config = Config(str(project / ".dvc"))
        name = config["core"].get("remote")
        address = config["remote"].get(name, {}).get("url")
    if address is None:
        return None
    scheme, separator, rest = str(address).rpartition("://")
    return f"{name} {scheme}{separator}{rest.rsplit('@', 1)[-1] if separator else rest}"


def project_root(path: Path) -> Path | None:
    """The folder of the DVC project that `path` lies in (it need not exist), None outside of one."""
    return next((folder for folder in path.resolve().parents if (folder / ".dvc").is_dir()), None)


def pointer_of(folder: Path) -> Path:
    """The .dvc file that tracks a folder."""
    resolved = folder.resolve()
    return resolved.parent / (resolved.name + ".dvc")


def _recognise(path: Path, given_format: str | None, allow_links: bool) -> Recognised:
    reader = open_reader(path, given_format, allow_links)
    if not reader.listing.pictures:
        raise DataError(f"{path} holds no pictures; a dataset needs them beside its annotations")
    return reader.recognised


def _check_seen_by_dvc(repo: Any, folder: Path) -> None:
    """DVC skips folders that Git ignores, and takes `/data/*` for the folder data itself, unlike Git.

    A set there would be added, but neither pushed nor fetched, without a word.
    """
    above = [parent for parent in folder.resolve().parents if Path(repo.root_dir) in parent.parents]
    for parent in above:
        if repo.scm.is_ignored(f"{parent}{os.sep}"):
            raise DataError(
                f"{parent} is ignored by Git as DVC reads .gitignore, so `dvc push` would leave {folder.name} out; "
                "remove the pattern (DVC adds one for each set that it tracks)"
            )


@contextmanager
def _marked(folder: Path, copied: bool) -> Iterator[None]:
    """Leave a note while DVC adds a folder: what is killed then is half-added, which `nasline data gc` finds.

    Of what DVC refuses nothing stays: neither the note nor, where the folder was `copied` to be added, the copy.
    """
    marker = adding_marker(folder)
    marker.touch()
    try:
        yield
    except DataError:
        marker.unlink(missing_ok=True)
        if copied:
            shutil.rmtree(folder, ignore_errors=True)
        raise
    marker.unlink(missing_ok=True)


@contextmanager
def _copy_removed(folder: Path, copied: bool) -> Iterator[None]:
    """A folder that was `copied` to be added goes when what it names cannot be used."""
    try:
        yield
    except StepError:
        if copied:
            shutil.rmtree(folder, ignore_errors=True)
        raise


def adding_marker(folder: Path) -> Path:
    """The file that stands beside a folder while DVC adds it."""
    return folder.with_name(f".{folder.name}.adding")


def _check_no_links(folder: Path) -> None:
    for parent, names, _ in os.walk(folder):
        linked = [name for name in names if os.path.islink(os.path.join(parent, name))]
        if linked:
            raise DataError(
                f"{os.path.join(parent, linked[0])} is a link to a folder, which DVC does not follow; put the files "
                "themselves there, or let `nasline data add PATH --to DIR` copy them"
            )


def _copy(source: Path, target: Path) -> Path:
    """Copy a dataset to a folder of the DVC project, first beside it, so that a broken copy is never taken for it."""
    if project_root(target) is None:
        raise UsageError(f"--to {target} lies outside of a DVC project; give a folder inside one, such as data/NAME")
    if target.exists():
        if dataset_digest(source) == dataset_digest(target):
            return target
        raise DataError(f"{target} exists with other content than {source}; remove it or choose another name for --to")
    with written_aside(target) as beside:
        for name in files_below(source):
            (beside / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / name, beside / name)
    return target


def require_new(target: Path) -> None:
    """Raises `UsageError` where no folder `target` can be made, which is told before pictures are read."""
    if target.exists():
        raise UsageError(f"{target} exists; choose a folder that does not")
    above = next(parent for parent in target.parents if parent.exists())
    if not above.is_dir():
        raise UsageError(f"{target} lies below {above}, which is a file; choose another folder")


@contextmanager
def written_aside(target: Path) -> Iterator[Path]:
    """A new folder beside `target` that gets its name when the block has ended well, in one rename.

    A killed command leaves `.NAME.incoming`, which the next attempt empties and `nasline data gc` finds. Raises
    `UsageError` when `target` exists or lies below a file.
    """
    require_new(target)
    beside = target.with_name(f".{target.name}.incoming")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    try:
        yield beside
    except BaseException:  # also Ctrl-C: nothing half-written stays
        shutil.rmtree(beside, ignore_errors=True)
        raise
    beside.rename(target)


def _next_commands(folder: Path) -> tuple[str, ...]:
    pointer = pointer_of(folder)
    changed = [pointer, *(file for file in [pointer.with_name(".gitignore")] if file.is_file())]
    files = [os.path.relpath(file) for file in changed]
    return (
        shlex.join(["git", "add", *files]),
        shlex.join(["git", "commit", "-m", f"Add dataset {folder.resolve().name}"]),
        "dvc push",
    )


def _versioned_files(folder: Path) -> list[str]:
    """The files that DVC would track; DVC itself is asked only where .dvcignore files have patterns."""
    project = project_root(folder)
    if project is None or not _has_ignore_patterns(project, folder.resolve()):
        return files_below(folder)
    with dvc_errors(folder):
        from dvc.fs import localfs
        from dvc.ignore import DvcIgnoreFilter

        # Not by a `Repo`: that writes into the project, which a worker may only read.
        found = list(DvcIgnoreFilter(localfs, str(project)).find(localfs, str(folder.resolve())))
    return [Path(file).relative_to(folder.resolve()).as_posix() for file in found]


def _has_ignore_patterns(project: Path, folder: Path) -> bool:
    above = [parent for parent in folder.parents if parent == project or project in parent.parents]
    files = [parent / ".dvcignore" for parent in above]
    lines = [line for file in files if file.is_file() for line in file.read_text(encoding="utf-8").splitlines()]
    return any(line.strip() and not line.startswith("#") for line in lines)


@contextmanager
def dvc_errors(folder: Path) -> Iterator[None]:
    """DVC's errors in the words and with the exit codes of the pipeline; what DVC would log is in them."""
    try:
        from dvc.exceptions import DvcException
        from dvc.lock import LockError
    except ImportError as error:
        raise ConfigurationError(f"DVC is not installed ({error}); install nasline[pipeline]") from error
    log = logging.getLogger("dvc")
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        yield
    except LockError as error:
        raise TemporaryError(f"another DVC command holds the project of {folder}; try again when it is done") from error
    except DvcException as error:
        raise DataError(f"DVC cannot work with {folder}: {_first_line(error)}") from error
    finally:
        log.setLevel(level)


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0].strip().rstrip(".")


def git_output(folder: Path, *arguments: str) -> str | None:
    """Output of a Git command, None where Git or its repository is missing."""
    command: list[Any] = ["git", "-C", folder, *arguments]
    try:
        finished = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return finished.stdout.strip()
