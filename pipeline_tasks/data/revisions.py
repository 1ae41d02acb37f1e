"""Files of a set as a Git revision or a digest names them, from DVC's cache or its remote."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from pipeline_tasks.data.versioning import dvc_errors, git_output, pointer_of, project_root
from pipeline_tasks.errors import DataError, UsageError


def digest_at(folder: Path, revision: str) -> str:
    """The digest that a Git revision records for a folder.

    Raises `UsageError` where Git has no such revision, or DVC did not track the folder in it.
    """
    pointer = pointer_of(folder)
    if git_output(pointer.parent, "rev-parse", "--verify", "--quiet", f"{revision}^{{commit}}") is None:
        raise UsageError(f"{revision!r} is no revision of the Git repository of {folder}; `git log` lists them")
    content = git_output(pointer.parent, "show", f"{revision}:./{pointer.name}")
    if content is None:
        raise UsageError(f"revision {revision} has no {pointer.name}; DVC did not track {folder} then")
    return str(yaml.safe_load(content)["outs"][0]["md5"])


def check_out(folder: Path, revision: str, target: Path) -> str:
    """Put the files that `folder` had at a revision into `target`. Returns their digest."""
    project = project_root(folder)
    if project is None:
        raise UsageError(f"{folder} lies outside of a DVC project, so it has no revisions; give a folder")
    digest = digest_at(folder, revision)
    check_out_digest(project, digest, target)
    return digest


def check_out_digest(project: Path, digest: str, target: Path) -> None:
    """Put the files of a set into `target`, which must not exist; from the cache, else from the default remote.

    Files are hard links into the cache where the file system allows, so they must not be changed. Raises `DataError`
    when neither cache nor remote has them all.
    """
    with dvc_errors(target):
        from dvc.repo import Repo

        with Repo(str(project)) as repo:
            if not _complete(repo, digest):
                _fetch(repo, project, digest)
            for name, source in _files(repo, digest):
                _place(source, target / name)
    target.mkdir(parents=True, exist_ok=True)


def _fetch(repo: Any, project: Path, digest: str) -> None:
    """The list of a set's files first, then those that the cache lacks."""
    from dvc.exceptions import DvcException
    from dvc_data.hashfile.hash_info import HashInfo

    reason = "they do not have all of it"
    try:
        repo.cloud.pull([HashInfo("md5", digest)])
        if Path(repo.cache.local.oid_to_path(digest)).is_file():
            missing = {source.parent.name + source.name for _, source in _files(repo, digest) if not source.is_file()}
            repo.cloud.pull([HashInfo("md5", name) for name in missing])
    except (DvcException, OSError) as error:
        reason = str(error).strip().splitlines()[0]
    if not _complete(repo, digest):
        raise DataError(
            f"the set {digest} is neither in the cache of {project} nor in its remote ({reason}); `dvc push` it from "
            "where it still is"
        )


def _complete(repo: Any, digest: str) -> bool:
    listing = Path(repo.cache.local.oid_to_path(digest))
    return listing.is_file() and all(source.is_file() for _, source in _files(repo, digest))


def _files(repo: Any, digest: str) -> Iterator[tuple[str, Path]]:
    """Relative name and place in the cache of each file of a set."""
    cache = repo.cache.local
    for entry in json.loads(Path(cache.oid_to_path(digest)).read_text(encoding="utf-8")):
        yield entry["relpath"], Path(cache.oid_to_path(entry["md5"]))


def _place(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
