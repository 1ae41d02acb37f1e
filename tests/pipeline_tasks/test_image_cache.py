"""The local cache of pictures: its bound, who goes first, damage, and several processes."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import time
from contextlib import suppress
from pathlib import Path

import pytest

from pipeline_tasks.errors import ConfigurationError
from pipeline_tasks.image_cache import ImageCache, default_cache


def key(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()


def used(folder: Path) -> int:
    total = 0
    for file in [file for file in folder.glob("*/*") if file.name != "usage"]:
        with suppress(FileNotFoundError):  # another process has removed it
            total += file.stat().st_size
    return total


def aged(cache: ImageCache, folder: Path, name: str, seconds: float) -> None:
    path = folder / key(name)[:2] / key(name)[2:]
    os.utime(path, (time.time() - seconds,) * 2)


def test_what_was_put_comes_back_and_nothing_else(tmp_path: Path) -> None:
    cache = ImageCache(tmp_path / "images", 1000)
    assert cache.get(key("a"), 3) is None
    cache.put(key("a"), b"abc")
    assert cache.get(key("a"), 3) == b"abc" and cache.get(key("b"), 3) is None
    assert ImageCache(tmp_path / "images", 1000).get(key("a"), 3) == b"abc"


def test_the_least_recently_used_go_first_and_the_bound_holds(tmp_path: Path) -> None:
    cache = ImageCache(tmp_path, 1000)
    for number in range(10):
        cache.put(key(str(number)), bytes(100))
        aged(cache, tmp_path, str(number), 100 - number)
    assert cache.get(key("0"), 100) is not None  # just used
    cache.put(key("new"), bytes(150))
    assert used(tmp_path) <= 1000
    kept = [number for number in range(10) if cache.get(key(str(number)), 100) is not None]
    assert kept == [0, 4, 5, 6, 7, 8, 9]  # 1 to 3 went: 900 bytes are left after a clean-up
    for number in range(30):
        cache.put(key(f"more {number}"), bytes(70))
        assert used(tmp_path) <= 1000


def test_a_picture_larger_than_the_bound_is_not_kept(tmp_path: Path) -> None:
    ImageCache(tmp_path, 10).put(key("a"), bytes(11))
    ImageCache(tmp_path, 0).put(key("b"), b"x")
    assert used(tmp_path) == 0


def test_a_truncated_file_is_dropped(tmp_path: Path) -> None:
    cache = ImageCache(tmp_path, 1000)
    cache.put(key("a"), b"abcdef")
    file = tmp_path / key("a")[:2] / key("a")[2:]
    file.write_bytes(b"abc")
    assert cache.get(key("a"), 6) is None and not file.exists()


def test_what_a_killed_process_was_writing_goes_and_the_sum_is_counted_anew(tmp_path: Path) -> None:
    cache = ImageCache(tmp_path, 1000)
    cache.put(key("a"), bytes(100))
    half = tmp_path / key("b")[:2] / ".half.1-1.incoming"
    half.parent.mkdir(exist_ok=True)
    half.write_bytes(bytes(300))
    os.utime(half, (1, 1))
    (tmp_path / "usage").write_text("990")  # it had reserved the room
    cache.put(key("c"), bytes(100))
    assert used(tmp_path) == 500 and (tmp_path / "usage").read_text() == "500"
    cache.put(key("d"), bytes(450))
    cache.put(key("e"), bytes(60))
    assert not half.exists() and cache.get(key("a"), 100) is not None
    (tmp_path / "usage").write_text("not a number")
    cache.put(key("f"), bytes(10))
    assert int((tmp_path / "usage").read_text()) == used(tmp_path)


def test_a_place_that_cannot_be_written_is_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").touch()
    cache = ImageCache(tmp_path / "file" / "images", 1000)
    cache.put(key("a"), b"abc")
    cache.put(key("b"), b"abc")
    assert caplog.text.count("pictures are not kept in") == 1
    assert cache.get(key("a"), 3) is None


def _churn(folder: Path, seed: int, failed: multiprocessing.Queue[str]) -> None:
    cache = ImageCache(folder, 20_000)
    for number in range(80):
        name = str((number * (7 + seed)) % 60)
        content = name.encode() * 300
        found = cache.get(key(name), len(content))
        if found is None:
            cache.put(key(name), content)
        elif found != content:
            failed.put(name)
        if used(folder) > 22_000:  # two others may be writing a picture each
            failed.put("bound")


def test_processes_share_one_cache(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    failed: multiprocessing.Queue[str] = context.Queue()
    workers = [context.Process(target=_churn, args=(tmp_path, seed, failed)) for seed in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    assert failed.empty() and 0 < used(tmp_path) <= 20_000
    assert not list(tmp_path.rglob("*.incoming"))


@pytest.mark.parametrize("given", ["-1", "much", "nan", "inf"])
def test_a_bound_that_is_none(monkeypatch: pytest.MonkeyPatch, given: str) -> None:
    monkeypatch.setenv("NASLINE_IMAGE_CACHE_GB", given)
    with pytest.raises(ConfigurationError, match="NASLINE_IMAGE_CACHE_GB must be a number of gigabytes"):
        default_cache()
