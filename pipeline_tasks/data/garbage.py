"""`nasline data gc`: what killed commands and forgotten versions left in a DVC project, its cache and its remote."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline_tasks.data.listing import SKIPPED, pointers
from pipeline_tasks.data.versioning import dvc_errors, git_output, project_root
from pipeline_tasks.errors import DataError, UsageError
from pipeline_tasks.workspace import open_workspace

OBJECT = re.compile(r"([0-9a-f]{2})/([0-9a-f]{30}(?:\.dir)?)")
RECORDED = re.compile(r"\bmd5: ([0-9a-f]{32}(?:\.dir)?)\b")
SCRATCH = "nasline-"
LISTED = 20


@dataclass(frozen=True)
class Orphan:
    """Something that no .dvc file of any commit, no dvc.lock and no run names."""

    kind: str
    place: str
    size_bytes: int | None


@dataclass(frozen=True)
class Garbage:
    """What was found, and what deleting needs to know."""

    orphans: list[Orphan]
    unreadable: list[str]
    """Digests of sets that are in use, but whose list of files is nowhere: their files look like orphans."""
    shared_places: list[str]
    """Caches and remotes outside of the project, which other projects may use too."""


def project_of(where: Path) -> Path:
    """The DVC project that `where` is or lies in; raises `UsageError` outside of one."""
    project = where.resolve() if (where / ".dvc").is_dir() else project_root(where / "x")
    if project is None:
        raise UsageError(f"{where} lies outside of a DVC project; make one with `nasline init DIR`")
    return project


def collect(
    where: Path, workspaces: Iterable[Path | str] = (), remote: str | None = None, delete: bool = False
) -> Garbage:
    """Find orphans in the project that `where` lies in, and with `delete` remove them.

    `remote` is the name of a DVC remote to look at too. Sets that a run of the `workspaces` was started with are kept.

    Raises:
        UsageError: outside of a DVC project.
        DataError: deleting is asked for, and the files of a set that is in use cannot be told from orphans.
    """
    project = project_of(where)
    kept = {digest for workspace in workspaces for digest in _digests_of_runs(workspace)}
    with dvc_errors(project):
        from dvc.repo import Repo

        with Repo(str(project)) as repo:
            stores = [("cache", repo.cache.local)]
            if remote is not None:
                stores.append(("remote", repo.cloud.get_remote_odb(remote, "gc")))
            used, unreadable = _used(repo, kept, [store for _, store in stores])
            if delete and unreadable:
                raise DataError(
                    f"nothing was deleted: the list of files of {', '.join(unreadable)} is in no cache or remote, so "
                    "its files cannot be told from orphans; `dvc pull` it, or remove its .dvc file"
                )
            orphans = [*_half_written(project, delete), *_unused(stores, used, delete)]
            outside = [str(store.path) for _, store in stores if not Path(store.path).is_relative_to(project)]
    return Garbage(orphans, unreadable, outside)


def _digests_of_runs(workspace: Path | str) -> Iterator[str]:
    found = open_workspace(str(workspace))
    for run in found.run_ids():
        for entry in found.read_run(run)["datasets"].values():
            if entry and entry.get("digest"):
                yield entry["digest"]


def _half_written(project: Path, delete: bool) -> Iterator[Orphan]:
    """Folders that a killed command was writing, and notes of a killed `nasline data add`."""
    for parent, folders, names in os.walk(project):
        for name in [one for one in folders if one.startswith(".") and one.endswith(".incoming")]:
            folders.remove(name)
            yield _removed(Orphan("half-written set", *_place(Path(parent, name))), delete)
        for name in [one for one in names if one.startswith(".") and one.endswith(".adding")]:
            yield _removed(Orphan("note of a half-added set", *_place(Path(parent, name))), delete)
        folders[:] = [name for name in folders if name not in SKIPPED]
    for scratch in sorted((project / ".dvc" / "tmp").glob(f"{SCRATCH}*")):
        yield _removed(Orphan("scratch folder", *_place(scratch)), delete)


def _place(path: Path) -> tuple[str, int]:
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return str(path), sum(file.stat().st_size for file in files)


def _removed(orphan: Orphan, delete: bool) -> Orphan:
    if delete:
        path = Path(orphan.place)
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return orphan


def _used(repo: Any, kept: set[str], stores: list[Any]) -> tuple[set[str], list[str]]:
    """Objects that something names, and sets whose list of files is nowhere."""
    used = kept | _recorded(Path(repo.root_dir))
    for _ in repo.brancher(all_commits=True, all_branches=True, all_tags=True):
        used |= {out.hash_info.value for out in repo.index.outs if out.hash_info}
    unreadable = []
    for digest in sorted(name for name in used if name.endswith(".dir")):
        files = _files_of(digest, stores)
        if files is None:
            unreadable.append(digest)
        else:
            used |= files
    return used, unreadable


def _recorded(project: Path) -> set[str]:
    """Digests in every .dvc file that lies in the project or that Git ever held; DVC overlooks ignored folders."""
    texts = [pointer.read_text(encoding="utf-8") for pointer in pointers(project)]
    listed = git_output(project, "rev-list", "--all", "--reflog", "--objects") or ""
    for line in listed.splitlines():
        blob, _, path = line.partition(" ")
        if path.endswith(".dvc"):
            texts.append(git_output(project, "cat-file", "blob", blob) or "")
    return {digest for text in texts for digest in RECORDED.findall(text)}


def _files_of(digest: str, stores: list[Any]) -> set[str] | None:
    for store in stores:
        path = store.oid_to_path(digest)
        if store.fs.exists(path):
            with store.fs.open(path, "rb") as file:
                return {entry["md5"] for entry in json.load(file)}
    return None


def _unused(stores: list[tuple[str, Any]], used: set[str], delete: bool) -> Iterator[Orphan]:
    for name, store in stores:
        if not store.fs.exists(store.path):
            continue
        for path in sorted(store.fs.find(store.path)):
            match = OBJECT.fullmatch("/".join(str(path).replace(os.sep, "/").rsplit("/", 2)[-2:]))
            if match and match[1] + match[2] in used:
                continue
            kind = f"object in the {name}" if match else f"leftover in the {name}"
            orphan = Orphan(kind, str(path), os.path.getsize(path) if name == "cache" else None)
            if delete:
                store.fs.remove(path)
            yield orphan


def text(found: Garbage, deleted: bool) -> str:
    """What was found, for a reader."""
    if not found.orphans:
        return "nothing to clean up"
    lines = []
    for kind in dict.fromkeys(orphan.kind for orphan in found.orphans):
        of_kind = [orphan for orphan in found.orphans if orphan.kind == kind]
        size = sum(orphan.size_bytes or 0 for orphan in of_kind)
        megabytes = f", {size / 1e6:.1f} MB" if any(orphan.size_bytes is not None for orphan in of_kind) else ""
        lines.append(f"{kind}: {len(of_kind)}{megabytes}")
        lines += [f"    {orphan.place}" for orphan in of_kind[:LISTED]]
        lines += [f"    and {len(of_kind) - LISTED} more"] if len(of_kind) > LISTED else []
    lines += [f"in use, but its list of files is nowhere: {digest}" for digest in found.unreadable]
    lines += [f"{place} lies outside of the project: others may use it too" for place in found.shared_places]
    return "\n".join([*lines, "deleted" if deleted else "nothing was deleted; --delete removes all of it"])
