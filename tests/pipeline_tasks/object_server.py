"""A real S3 server for tests, with a bucket and one pair of keys."""

from __future__ import annotations

import os
import random
import socket
import subprocess
import sys
import time
import urllib.request
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline_tasks.errors import ConfigurationError
from pipeline_tasks.store import ObjectStore

CREDENTIALS = {"AWS_ACCESS_KEY_ID": "nasline-tests", "AWS_SECRET_ACCESS_KEY": "only-on-this-machine"}
BUCKET = "workspaces"


def free_port() -> int:
    """A port p, where p + 10000 is free too: weed takes that for gRPC.

    Both lie below those that the system gives to outgoing connections, one of which could take it meanwhile.
    """
    while True:
        port = random.randrange(12000, 22000)
        try:
            for number in (port, port + 10000):
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", number))
            return port
        except OSError:
            continue


@contextmanager
def object_server(folder: Path) -> Iterator[str]:
    """Address of a server whose objects lie in `folder`."""
    ports: dict[str, int] = {}
    for name in ("master", "volume", "filer", "s3", "admin"):
        ports[name] = next(port for port in iter(free_port, None) if port not in ports.values())
    command = [str(Path(sys.executable).parent / "weed"), "mini", f"-dir={folder}", "-ip=127.0.0.1"]
    command += ["-ip.bind=127.0.0.1", "-master.telemetry=false", "-webdav=false", "-admin.ui=false"]
    command += ["-s3.port.iceberg=0", f"-bucket={BUCKET}", *(f"-{name}.port={port}" for name, port in ports.items())]
    log = folder / "server.log"
    environment = {key: value for key, value in os.environ.items() if not key.startswith("AWS_")}
    with log.open("wb") as file:
        process = subprocess.Popen(command, env={**environment, **CREDENTIALS}, stdout=file, stderr=file)
    address = f"http://127.0.0.1:{ports['s3']}"
    try:
        _wait_until_healthy(address, process, log)
        yield address
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:  # on a busy machine; nobody needs its files any more
            process.kill()
            process.wait()


def _wait_until_healthy(address: str, process: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(300):
        assert process.poll() is None, log.read_text()
        try:
            with urllib.request.urlopen(f"{address}/healthz", timeout=1):
                return
        except OSError:
            time.sleep(0.1)
    raise AssertionError(log.read_text())


def new_workspace() -> str:
    """Address of an empty workspace at the server that the environment names."""
    store = ObjectStore(f"s3://{BUCKET}/{uuid.uuid4().hex}")
    for _ in range(50):  # the server makes the bucket just after it says that it is healthy
        try:
            store.read("anything")
            return store.uri
        except ConfigurationError:
            time.sleep(0.1)
    raise AssertionError("the server made no bucket")
