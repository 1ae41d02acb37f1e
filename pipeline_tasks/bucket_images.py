"""Sets whose pictures stay in a bucket: `s3://BUCKET/PREFIX` stands for their folder images/.

The folder holds annotations and two files: images_root.yaml names the address, images_root.arrow lists the pictures
with size and ETag as `nasline data add` found them. So the digest of the folder names the pictures too, and what is
fetched later is compared with that list: one that was exchanged in the bucket is refused.
"""

from __future__ import annotations

import errno
import hashlib
import os
import random
import re
import time
from bisect import bisect_left
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import yaml

from pipeline_tasks.errors import DataError, UnavailableError
from pipeline_tasks.image_cache import ImageCache, default_cache
from pipeline_tasks.store import ADDRESS, Conflict, MissingObject, ObjectStore

if TYPE_CHECKING:
    import pyarrow as pa

ROOT_FILE, LIST_FILE = "images_root.yaml", "images_root.arrow"
KEY = "images_root"
PICTURES = "images/"
FETCHED_AT_ONCE = 16
"""Threads for a set whose pictures stay in a bucket: they mostly wait."""
TRIES = 4
FIRST_PAUSE_SECONDS = 0.5
"""Before the second try, doubled for each further one; boto3's own tries come on top."""
_MD5 = re.compile(r"[0-9a-f]{32}")


class BucketImages:
    """The pictures of one set, by their paths below its folder (`images/a.jpg`)."""

    def __init__(self, folder: Path, address: str, cache: ImageCache) -> None:
        self.folder, self.address = folder, address
        self._cache = cache
        self._stores: dict[int, ObjectStore] = {}

    @cached_property
    def _table(self) -> pa.Table:
        """Columns path, size and etag, sorted by path; mapped into memory, so that processes share it."""
        import pyarrow as pa

        file = self.folder / LIST_FILE
        try:
            table = pa.ipc.open_file(pa.memory_map(str(file))).read_all()
            return table.select(["path", "size", "etag"])
        except FileNotFoundError:
            raise DataError(
                f"{self.folder / ROOT_FILE} names {self.address}, but its pictures were never listed; run "
                f"`nasline data add {self.folder}`"
            ) from None
        except (OSError, pa.ArrowException, KeyError):
            raise DataError(
                f"{file} is damaged; run `nasline data add {self.folder}` to list the bucket anew"
            ) from None

    @cached_property
    def _paths(self) -> Any:
        return self._table["path"].combine_chunks()

    def paths(self) -> list[str]:
        """All pictures, sorted."""
        found: list[str] = self._paths.to_pylist()
        return found

    def size(self, path: str) -> int | None:
        """Bytes of a picture, None where the list has none of that name."""
        row = self._row(path)
        return None if row is None else int(self._table["size"][row].as_py())

    def etags(self, paths: Sequence[str]) -> dict[str, str]:
        """ETags of those of the pictures that are in the list, by path."""
        import pyarrow as pa
        import pyarrow.compute as pc

        rows = pc.index_in(pa.array(paths, pa.string()), value_set=self._paths)
        found = zip(paths, self._table["etag"].combine_chunks().take(rows).to_pylist(), strict=True)
        return {path: etag for path, etag in found if etag is not None}

    def content(self, path: str) -> bytes:
        """The bytes of a picture, from the local cache or else from the bucket.

        Raises:
            FileNotFoundError: the list or the bucket has no such picture.
            DataError: another picture has taken its place since the list was made.
            UnavailableError: the store does not answer, or gives other bytes than it should, again and again.
        """
        row = self._row(path)
        if row is None:
            raise FileNotFoundError(errno.ENOENT, f"it is not in the list of {self.address}", path)
        size, etag = int(self._table["size"][row].as_py()), str(self._table["etag"][row].as_py())
        name = path.removeprefix(PICTURES)
        key = hashlib.sha256(f"{self.address}\n{name}\n{etag}".encode()).hexdigest()
        content = self._cache.get(key, size)
        if content is None:
            content = self._fetch(path, name, size, etag)
            self._cache.put(key, content)
        return content

    def _row(self, path: str) -> int | None:
        paths = self._paths
        row = bisect_left(range(len(paths)), path, key=lambda index: paths[index].as_py())
        return row if row < len(paths) and paths[row].as_py() == path else None

    def _fetch(self, path: str, name: str, size: int, etag: str) -> bytes:
        """Try again, with pauses, where the store is away or what comes is not what the list says."""
        pause = FIRST_PAUSE_SECONDS
        for last in (False,) * (TRIES - 1) + (True,):
            try:
                content, with_md5 = self._store.read_version(name, etag)
            except MissingObject:
                raise FileNotFoundError(errno.ENOENT, f"it is not in {self.address} any more", path) from None
            except Conflict:
                raise self._changed(name) from None
            except UnavailableError:
                if last:
                    raise
            else:
                if _is_whole(content, size, etag if with_md5 else ""):
                    return content
            if not last:
                time.sleep(pause * random.uniform(0.5, 1.0))
                pause *= 2
        raise UnavailableError(
            f"{self._store.address(name)} came with other bytes than its list says, {TRIES} times; look at the store "
            f"or what stands before it, or list the bucket anew with `nasline data add {self.folder}`"
        )

    def _changed(self, name: str) -> DataError:
        return DataError(
            f"{self._store.address(name)} was exchanged since it was listed; put the old one back, or list the bucket "
            f"anew with `nasline data add {self.folder}`, which makes a new version of the set"
        )

    @property
    def _store(self) -> ObjectStore:
        """One for each process: connections must not be shared with those that are forked off."""
        process = os.getpid()
        if process not in self._stores:
            self._stores = {process: ObjectStore(self.address)}
        return self._stores[process]


_opened: dict[tuple[str, int, int | None], BucketImages] = {}
"""By folder and times of its two files: a loader asks for every picture."""


def of_folder(folder: Path) -> BucketImages | None:
    """The pictures that stay in a bucket; None for a set with pictures of its own.

    Raises:
        DataError: images_root.yaml cannot be understood, or its pictures were never listed.
    """
    named = _changed_at(folder / ROOT_FILE)
    if named is None:
        return None
    place = (str(folder), named, _changed_at(folder / LIST_FILE))
    if place not in _opened:
        _opened[place] = BucketImages(folder, _address(folder / ROOT_FILE), default_cache())
    return _opened[place]


def is_there(folder: Path, path: str) -> bool:
    """Whether a set has the picture `path`: in its folder, or in the list of the bucket where its pictures stay."""
    bucket = of_folder(folder)
    return Path(folder, path).is_file() if bucket is None else bucket.size(path) is not None


def shared_list(folders: Sequence[Path]) -> Path | None:
    """The folder whose list of a bucket serves all these sets; None where all have their pictures themselves.

    Raises:
        DataError: their pictures lie in different places, which one set cannot name.
    """
    addresses = [address_of(folder) for folder in folders]
    if len(set(addresses)) > 1:
        places = (f"{folder}: {address or 'in the folder'}" for folder, address in zip(folders, addresses, strict=True))
        raise DataError(
            f"the pictures of the sets lie in different places ({', '.join(places)}), but a set has only one; let "
            "`nasline data export` write copies that have their pictures, and take these"
        )
    if addresses[0] is None:
        return None
    if any((folder / LIST_FILE).read_bytes() != (folders[0] / LIST_FILE).read_bytes() for folder in folders[1:]):
        raise DataError(
            f"{' and '.join(map(str, folders))} have different lists of {addresses[0]}; run `nasline data add` for "
            "each, so that all are of today"
        )
    return folders[0]


def _changed_at(file: Path) -> int | None:
    try:
        return os.stat(file).st_mtime_ns
    except OSError:
        return None


def address_of(folder: Path) -> str | None:
    """The address that a folder's images_root.yaml names, None where there is none."""
    return _address(folder / ROOT_FILE) if (folder / ROOT_FILE).is_file() else None


def _address(file: Path) -> str:
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise DataError(f"{file} cannot be read: {' '.join(str(error).split())}") from None
    address = content.get(KEY) if isinstance(content, dict) else None
    if not isinstance(address, str) or not ADDRESS.fullmatch(address):
        raise DataError(f"{file} must hold `{KEY}: s3://BUCKET/PREFIX`, got {address!r}")
    return address.rstrip("/")


def list_bucket(folder: Path, address: str) -> int:
    """Write down which pictures lie in the bucket, in images_root.yaml and images_root.arrow; gives their number.

    A list that has not changed keeps its bytes, so that the digest of the set stays.

    Raises:
        UsageError: the address is none.
        DataError: there are no pictures, or names that no folder could have.
    """
    import pyarrow as pa

    from pipeline_tasks.data.coco import is_picture

    store = ObjectStore(address)
    rows = sorted(
        (f"{PICTURES}{name}", size, etag)
        for name, size, etag in store.versions("")
        if is_picture(PurePosixPath(name).name)
    )
    if not rows:
        raise DataError(f"{store.uri} holds no pictures; give the address that stands for the set's folder images/")
    for path, _, _ in rows:
        if not path.isprintable() or any(part in ("", ".", "..") for part in path.split("/")):
            raise DataError(f"{store.uri} has the object {path!r}, which is no name of a file; rename or remove it")
    columns = list(zip(*rows, strict=True))
    schema = pa.schema({"path": pa.string(), "size": pa.int64(), "etag": pa.string()})
    table = pa.table([pa.array(list(c)) for c in columns], schema=schema)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, schema) as writer:
        writer.write_table(table)
    _write(folder / LIST_FILE, sink.getvalue().to_pybytes())
    _write(folder / ROOT_FILE, f"{KEY}: {store.uri}\n".encode())
    return len(rows)


def _write(file: Path, content: bytes) -> None:
    beside = file.with_name(f".{file.name}.incoming")
    if file.is_file() and file.read_bytes() == content:
        beside.unlink(missing_ok=True)  # a killed command left it, and the set would hold it
        return
    beside.write_bytes(content)
    os.replace(beside, file)


def _is_whole(content: bytes, size: int, etag: str) -> bool:
    """The ETag of an object that was written in one piece is mostly its MD5; else only the size can be compared."""
    if len(content) != size:
        return False
    return not _MD5.fullmatch(etag) or hashlib.md5(content, usedforsecurity=False).hexdigest() == etag
