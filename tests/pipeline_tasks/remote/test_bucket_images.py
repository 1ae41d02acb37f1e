"""Sets whose pictures stay in a bucket of a real S3 server: read, validated and loaded as if they lay in the folder."""

from __future__ import annotations

import hashlib
import http.client
import multiprocessing
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
from boto3.s3.transfer import TransferConfig

import pipeline_tasks.store
from model.data.augmentation import AugmentationConfig
from model.data.loader import TrainingLoader
from model.data.tables import read_dataset
from model.preprocessing import Preprocessing
from pipeline_tasks import bucket_images
from pipeline_tasks.bucket_images import LIST_FILE, ROOT_FILE, list_bucket, of_folder
from pipeline_tasks.data.project import init
from pipeline_tasks.data.readers import read_folder
from pipeline_tasks.data.versioning import add, dataset_digest
from pipeline_tasks.errors import DataError, UnavailableError, UsageError
from pipeline_tasks.images import make_open_image
from pipeline_tasks.store import ObjectStore

pytestmark = pytest.mark.slow
SPLITS = ("train", "val", "test")


@pytest.fixture
def bucket_set(uri: str, coco_folder: Any, tmp_path: Path) -> Path:
    """The clean set without its pictures, which lie in the bucket."""
    folder = tmp_path / "cells"
    shutil.copytree(coco_folder.path / "annotations", folder / "annotations")
    store = ObjectStore(f"{uri}/photos")
    for picture in (coco_folder.path / "images").iterdir():
        store.write(picture.name, picture.read_bytes())
    store.write("notes.txt", b"no picture")
    assert list_bucket(folder, f"{uri}/photos") == 12
    return folder


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bucket_images, "FIRST_PAUSE_SECONDS", 0.01)


def contents(folder: Path) -> dict[str, bytes]:
    opened = of_folder(folder)
    assert opened is not None
    return {path: opened.content(path) for path in opened.paths()}


def cached(folder: Path) -> list[Path]:
    return [file for file in folder.glob("*/*") if file.is_file()]


def test_the_set_reads_and_validates_as_if_the_pictures_lay_there(
    bucket_set: Path, coco_folder: Any, nasline: Any, tmp_path: Path
) -> None:
    here, there = (read_folder(folder, "target", SPLITS) for folder in (coco_folder.path, bucket_set))
    assert there.images == here.images and there.boxes == here.boxes and there.unlisted_files == ()
    for run, folder in (("here", coco_folder.path), ("there", bucket_set)):
        nasline("start", "--run", run, "--start.dataset", folder, code=0)
        nasline("validate_data", "--run", run, code=0)
    steps = sorted((tmp_path / "workspace/steps/validate_data").glob("*/target"))
    assert len(steps) == 2
    for name in ("images.parquet", "boxes.parquet", "dataset.json"):  # digests and hashes of the pictures among them
        assert steps[0].joinpath(name).read_bytes() == steps[1].joinpath(name).read_bytes()
    assert len(cached(tmp_path / "cache/images")) == 12


def test_a_yolo_set_whose_sizes_stand_in_the_pictures(bucket_set: Path, coco_folder: Any, tmp_path: Path) -> None:
    from pipeline_tasks.data.writers import write_folder

    written = write_folder(read_folder(coco_folder.path), coco_folder.path, tmp_path / "yolo", "yolo").folder
    here = read_folder(written, "target", SPLITS)
    store = ObjectStore(str(bucket_images.address_of(bucket_set)))
    for picture in sorted((written / "images").rglob("*.jpg")):
        store.write(f"../yolo/{picture.relative_to(written / 'images')}".removeprefix("../"), picture.read_bytes())
    shutil.rmtree(written / "images")
    list_bucket(written, f"{store.uri}/yolo")
    there = read_folder(written, "target", SPLITS)
    assert there.images == here.images and there.boxes == here.boxes and len(here.boxes) == 24


@pytest.mark.parametrize("workers", [0, 2])
def test_loader_processes_and_a_bound_smaller_than_the_set(
    bucket_set: Path,
    coco_folder: Any,
    nasline: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    workers: int,
) -> None:
    nasline("start", "--run", "one", "--start.dataset", coco_folder.path, code=0)
    nasline("validate_data", "--run", "one", code=0)
    (tables,) = (tmp_path / "workspace/steps/validate_data").glob("*/target")
    sizes = [picture.stat().st_size for picture in (coco_folder.path / "images").iterdir()]
    monkeypatch.setenv("NASLINE_IMAGE_CACHE", str(tmp_path / "small"))
    monkeypatch.setenv("NASLINE_IMAGE_CACHE_GB", str(3.5 * max(sizes) / 1e9))
    batches = []
    for folder in (coco_folder.path, bucket_set):
        loader = TrainingLoader(
            read_dataset(tables).split("train"),
            make_open_image({"target": folder}),
            Preprocessing(32),
            2,
            AugmentationConfig(),
            seed=0,
            workers=workers,
            cache_megabytes=0,
        )
        batches.append([batch for epoch in range(2) for batch in loader.epoch(epoch)])
    for ours, theirs in zip(*batches, strict=True):
        assert np.array_equal(np.asarray(ours.images), np.asarray(theirs.images))
    kept = cached(tmp_path / "small")
    assert 1 <= len(kept) <= 3 and sum(file.stat().st_size for file in kept) <= 3.5 * max(sizes)


def test_what_changed_or_went_in_the_bucket_is_told(bucket_set: Path) -> None:
    opened = of_folder(bucket_set)
    assert opened is not None
    store = ObjectStore(opened.address)
    store.write("val_0.jpg", b"another picture")
    store.delete(["val_1.jpg"])
    open_image = make_open_image({"target": bucket_set})
    with pytest.raises(DataError, match=r"photos/val_0.jpg was exchanged since it was listed; put the old one back"):
        open_image("target/images/val_0.jpg")
    with pytest.raises(ValueError, match=r"val_1.jpg cannot be opened: it is not in s3://.*/photos any more"):
        open_image("target/images/val_1.jpg")
    with pytest.raises(ValueError, match="cannot be opened: it is not in the list of s3://"):
        open_image("target/images/../annotations/instances_val.json")
    before = dataset_digest(bucket_set)
    list_bucket(bucket_set, opened.address)
    assert dataset_digest(bucket_set) != before
    assert contents(bucket_set)["images/val_0.jpg"] == b"another picture"


def test_a_set_is_added_and_listed_again(
    bucket_set: Path, uri: str, tmp_path: Path, nasline: Any, git_identity: None
) -> None:
    (bucket_set / ROOT_FILE).unlink()
    (bucket_set / LIST_FILE).unlink()
    project = tmp_path / "project"
    init(project)
    target = project / "data/cells"
    with pytest.raises(DataError, match="holds no pictures; give the address that stands for"):
        add(bucket_set, target, images=f"{uri}/nothing")
    with pytest.raises(UsageError, match="is no S3 address"):
        add(bucket_set, target, images="s3:/photos")
    (bucket_set / "images").mkdir()
    (bucket_set / "images/own.jpg").write_bytes(b"x")
    with pytest.raises(DataError, match=r"own\.jpg lies here, while images/ shall stay at s3://.*; remove one"):
        add(bucket_set, target, images=f"{uri}/photos")
    shutil.rmtree(bucket_set / "images")
    assert not target.exists() and not (bucket_set / ROOT_FILE).exists()
    (bucket_set / f".{LIST_FILE}.incoming").write_bytes(b"half a list, of a command that was killed")
    first = add(bucket_set, target, images=f"{uri}/photos")
    assert (first.format, first.files) == ("coco", 5)  # three annotation files and the two about the bucket
    assert add(target).digest == first.digest
    ObjectStore(f"{uri}/photos").write("more.jpg", (contents(target)["images/val_0.jpg"]))
    assert add(target).digest != first.digest
    assert "5 images" not in nasline("data", "list", project, code=0)
    (target / LIST_FILE).unlink()
    assert "its pictures were never listed; run `nasline data add" in nasline("data", "validate", target, code=65)
    (target / "images").mkdir()
    (target / "images/own.jpg").write_bytes(b"x")
    list_bucket(target, f"{uri}/photos")
    assert "remove one of the two" in nasline("data", "validate", target, code=65)


def test_show_fetches_the_pictures_it_shows(bucket_set: Path, coco_folder: Any, tmp_path: Path, nasline: Any) -> None:
    options = ("--pictures", 3, "--out")
    nasline("data", "show", bucket_set, *options, tmp_path / "there", code=0)
    assert len(cached(tmp_path / "cache/images")) == 3
    nasline("data", "show", coco_folder.path, *options, tmp_path / "here", code=0)
    for picture in ("0000.jpg", "0001.jpg", "0002.jpg"):
        here, there = (tmp_path / name / "pictures" / picture for name in ("here", "there"))
        assert here.read_bytes() == there.read_bytes()


def test_diff_compares_lists_and_fetches_where_an_etag_may_be_no_digest(
    bucket_set: Path, coco_folder: Any, tmp_path: Path, nasline: Any
) -> None:
    assert "equal: 12 images, 24 boxes" in nasline("data", "diff", coco_folder.path, bucket_set, code=0)
    before = tmp_path / "before"
    shutil.copytree(bucket_set, before)
    store = ObjectStore(str(bucket_images.address_of(bucket_set)))
    picture = contents(bucket_set)["images/val_0.jpg"]
    shutil.rmtree(tmp_path / "cache")
    store.write("val_0.jpg", picture + b"x")
    store.write("moved.jpg", picture)
    list_bucket(bucket_set, store.uri)
    assert "0 renamed, 1 with other pixels" in nasline("data", "diff", before, bucket_set, code=0)
    assert cached(tmp_path / "cache/images") == []  # the lists tell it all
    assert "1 with other pixels" in nasline("data", "diff", coco_folder.path, bucket_set, code=0)
    assert len(cached(tmp_path / "cache/images")) == 1


def test_diff_of_a_folder_with_objects_whose_etag_is_no_md5(
    bucket_set: Path, coco_folder: Any, tmp_path: Path, nasline: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_parts = TransferConfig(multipart_threshold=1)
    monkeypatch.setattr(pipeline_tasks.store, "_transfer_config", lambda: in_parts)
    store = ObjectStore(str(bucket_images.address_of(bucket_set)))
    store.upload("val_0.jpg", coco_folder.path / "images/val_0.jpg")
    list_bucket(bucket_set, store.uri)
    opened = of_folder(bucket_set)
    assert opened is not None and opened.etags(["images/val_0.jpg", "no"])["images/val_0.jpg"].endswith("-1")
    assert "equal: 12 images, 24 boxes" in nasline("data", "diff", coco_folder.path, bucket_set, code=0)
    assert len(cached(tmp_path / "cache/images")) == 1


def test_split_and_merge_leave_the_pictures_in_the_bucket(
    bucket_set: Path, coco_folder: Any, tmp_path: Path, nasline: Any
) -> None:
    for folder, name in ((coco_folder.path, "here"), (bucket_set, "there")):
        assert "no picture is in two splits" in nasline("data", "split", folder, "--check", code=0)
        nasline("data", "split", folder, "--to", tmp_path / name, "--by", "stratified", code=0)
    here, there = (read_folder(tmp_path / name) for name in ("here", "there"))
    assert there.images == here.images and there.boxes == here.boxes
    assert not (tmp_path / "there/images").exists()
    assert contents(tmp_path / "there") == contents(bucket_set)
    nasline("data", "merge", bucket_set, tmp_path / "there", "--to", tmp_path / "merged", code=0)
    merged = read_folder(tmp_path / "merged")
    assert sorted(merged.images["path"].to_pylist()) == sorted(here.images["path"].to_pylist())
    assert not (tmp_path / "merged/images").exists() and len(merged.boxes) == len(here.boxes)
    refused = nasline("data", "merge", bucket_set, coco_folder.path, "--to", tmp_path / "mixed", code=65)
    assert "lie in different places" in refused and "data export` write copies" in refused
    ObjectStore(str(bucket_images.address_of(bucket_set))).write("more.jpg", b"x")
    list_bucket(bucket_set, str(bucket_images.address_of(bucket_set)))
    refused = nasline("data", "merge", bucket_set, tmp_path / "there", "--to", tmp_path / "mixed", code=65)
    assert "have different lists of s3://" in refused and not (tmp_path / "mixed").exists()


@pytest.mark.parametrize("form", ["coco", "yolo", "voc", "objects365"])
def test_export_fetches_the_pictures(
    bucket_set: Path, coco_folder: Any, tmp_path: Path, nasline: Any, form: str
) -> None:
    for folder, name in ((coco_folder.path, "here"), (bucket_set, "there")):
        nasline("data", "export", folder, "--to", tmp_path / name, "--format", form, code=0)
    files = [{p.relative_to(root): p.read_bytes() for p in root.rglob("*") if p.is_file()}
             for root in (tmp_path / "here", tmp_path / "there")]  # fmt: skip
    assert files[0] == files[1] and sum(name.suffix == ".jpg" for name in files[0]) == 12


def test_a_repaired_copy_and_a_split_of_another_format(
    bucket_set: Path, coco_folder: Any, tmp_path: Path, nasline: Any
) -> None:
    nasline("data", "validate", bucket_set, "--fix", "--to", tmp_path / "repaired", code=0)
    assert len(list((tmp_path / "repaired/images").iterdir())) == 12
    nasline("data", "export", coco_folder.path, "--to", tmp_path / "yolo", "--format", "yolo", code=0)
    store = ObjectStore(f"{bucket_images.address_of(bucket_set)}/yolo")
    for picture in (tmp_path / "yolo/images").rglob("*.jpg"):
        store.write(str(picture.relative_to(tmp_path / "yolo/images")), picture.read_bytes())
    shutil.rmtree(tmp_path / "yolo/images")
    list_bucket(tmp_path / "yolo", store.uri)
    nasline("data", "split", tmp_path / "yolo", "--to", tmp_path / "split", "--by", "stratified", "--near-bits", -1,
            code=0)  # fmt: skip
    raw = read_folder(tmp_path / "split")
    assert set(raw.images["path"].to_pylist()) == set(contents(tmp_path / "split")) and len(raw.boxes) == 24


def test_export_of_a_picture_that_went_writes_nothing(bucket_set: Path, tmp_path: Path, nasline: Any) -> None:
    ObjectStore(str(bucket_images.address_of(bucket_set))).delete(["val_1.jpg"])
    told = nasline("data", "export", bucket_set, "--to", tmp_path / "out", "--format", "coco", code=65)
    assert "val_1.jpg cannot be opened: it is not in s3://" in told and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "content", ["images_root: /home/me", "images_root: s3://a b/c", "- s3://bucket/x", "images_root: [", "\x00"]
)
def test_an_address_that_is_none(tmp_path: Path, content: str) -> None:
    (tmp_path / ROOT_FILE).write_text(content)
    with pytest.raises(DataError, match=r"images_root.yaml (must hold|cannot be read)"):
        of_folder(tmp_path)


def test_a_damaged_list(bucket_set: Path) -> None:
    (bucket_set / LIST_FILE).write_bytes((bucket_set / LIST_FILE).read_bytes()[:100])
    with pytest.raises(DataError, match=r"images_root.arrow is damaged; run `nasline data add"):
        contents(bucket_set)


class Between(ThreadingHTTPServer):
    """Passes requests on to the real server; some answers come with other bytes, or stop halfway."""

    daemon_threads = True

    def __init__(self, server: str) -> None:
        super().__init__(("127.0.0.1", 0), _Passer)
        self.server = urlsplit(server).netloc
        self.wrong, self.requests = 0, 0
        self.encrypts = False
        self.flowing = threading.Event()
        self.flowing.set()
        self.address = f"http://127.0.0.1:{self.server_port}"


class _Passer(BaseHTTPRequestHandler):
    server: Between

    def do_GET(self) -> None:
        between = self.server
        between.requests += 1
        connection = http.client.HTTPConnection(between.server)
        connection.request("GET", self.path, headers=dict(self.headers))
        answer = connection.getresponse()
        content = answer.read()
        connection.close()
        if between.wrong > 0:
            between.wrong -= 1
            content = content[:-1] + bytes([content[-1] ^ 255])
        self.send_response(answer.status)
        for name, value in answer.getheaders():
            if not name.lower().startswith(("x-amz-checksum", "content-length", "transfer-encoding")):
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        if between.encrypts:
            self.send_header("x-amz-server-side-encryption", "aws:kms")
        self.end_headers()
        half = len(content) // 2
        self.wfile.write(content[:half])
        self.wfile.flush()
        between.flowing.wait(60)
        with suppress(OSError):  # the reader is gone
            self.wfile.write(content[half:])

    def log_message(self, *_: object) -> None:
        """Silence."""


@pytest.fixture
def between(server: str, bucket_set: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Between]:
    """Stands between the set's reader and the server from now on."""
    with Between(server) as running:
        threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        monkeypatch.setenv("AWS_ENDPOINT_URL", running.address)
        yield running
        running.shutdown()


def test_wrong_bytes_are_fetched_again_and_never_kept(
    between: Between, bucket_set: Path, coco_folder: Any, tmp_path: Path
) -> None:
    between.wrong = 2
    found = contents(bucket_set)
    assert found == {f"images/{p.name}": p.read_bytes() for p in (coco_folder.path / "images").iterdir()}
    assert between.requests == 14
    assert contents(bucket_set) == found and between.requests == 14  # all from the cache
    shutil.rmtree(tmp_path / "cache/images")
    between.wrong = 10**6
    with pytest.raises(UnavailableError, match="came with other bytes than its list says, 4 times"):
        contents(bucket_set)
    assert cached(tmp_path / "cache/images") == []


def test_the_etag_of_what_a_key_service_encrypts_is_no_digest(between: Between, bucket_set: Path) -> None:
    between.wrong, between.encrypts = 10**6, True  # so that no content has the MD5 that its ETag looks like
    assert len(contents(bucket_set)) == 12 and between.requests == 12


def _fetch_all(folder: Path, told: multiprocessing.Queue[Any]) -> None:
    digests = {path: hashlib.md5(content).hexdigest() for path, content in contents(folder).items()}
    told.put(digests)


def test_a_process_killed_in_the_middle_of_a_fetch_leaves_nothing_wrong(
    between: Between, bucket_set: Path, coco_folder: Any, tmp_path: Path
) -> None:
    context = multiprocessing.get_context("fork")
    told: multiprocessing.Queue[Any] = context.Queue()
    between.flowing.clear()
    first = context.Process(target=_fetch_all, args=(bucket_set, told))
    first.start()
    deadline = time.monotonic() + 20
    while not between.requests and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.1)
    assert first.pid is not None and between.requests == 1
    os.kill(first.pid, signal.SIGKILL)
    first.join(10)
    assert cached(tmp_path / "cache/images") == []
    between.flowing.set()
    pair = [context.Process(target=_fetch_all, args=(bucket_set, told)) for _ in range(2)]
    for process in pair:
        process.start()
    expected = {
        f"images/{p.name}": hashlib.md5(p.read_bytes()).hexdigest() for p in (coco_folder.path / "images").iterdir()
    }
    assert [told.get(timeout=30) for _ in pair] == [expected, expected]
    for process in pair:
        process.join(10)
    assert len(cached(tmp_path / "cache/images")) == 12
