"""Objects in a store: conditions of writes, and what the user is told when the store does not play along."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline_tasks.errors import ConfigurationError, UnavailableError, UsageError
from pipeline_tasks.remote_workspace import RemoteWorkspace
from pipeline_tasks.store import Conflict, ObjectStore
from pipeline_tasks.workspace import Workspace, open_workspace


def test_addresses_of_other_kinds_are_refused(no_settings: None, tmp_path: Path) -> None:
    for bad in ("s3://", "s3://UPPER/x", "gs://bucket/x"):
        with pytest.raises(UsageError, match="s3://BUCKET/PREFIX"):
            open_workspace(bad)
    assert type(open_workspace(str(tmp_path))) is Workspace
    assert open_workspace("s3://bucket/a/").place == "s3://bucket/a"


def test_each_workspace_and_server_has_a_cache_of_its_own(
    no_settings: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    roots = [open_workspace(place).root for place in ("s3://bucket/a", "s3://bucket/b", "s3://bucket/a/")]
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://localhost:9000")
    roots.append(open_workspace("s3://bucket/a").root)
    assert roots[0] == roots[2] and len(set(roots)) == 3
    assert all(root.parent == tmp_path / "cache" for root in roots)


def test_absent_server_and_absent_credentials_are_one_sentence_each(
    no_settings: None, nobody: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://user:secret@{nobody}")
    with pytest.raises(ConfigurationError, match="AWS_ACCESS_KEY_ID") as no_credentials:
        ObjectStore("s3://bucket/x").read("a")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "someone")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "s3cr3t")
    with pytest.raises(UnavailableError, match=f"http://{nobody} does not answer") as away:
        ObjectStore("s3://bucket/x").read("a")
    for caught in (no_credentials, away):
        assert "secret" not in str(caught.value) and "s3cr3t" not in str(caught.value)


@pytest.mark.slow
def test_wrong_credentials_and_missing_bucket_are_named(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigurationError, match="bucket 'no-such-bucket' does not exist at http"):
        RemoteWorkspace("s3://no-such-bucket/x").read_run("r")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(ConfigurationError, match=r"refused the credentials .*SignatureDoesNotMatch") as caught:
        RemoteWorkspace(uri).read_run("r")
    assert "wrong" not in str(caught.value)


@pytest.mark.slow
def test_conditions_of_writes_hold(uri: str) -> None:
    store = ObjectStore(uri)
    first = store.create("a", b"1")
    with pytest.raises(Conflict):
        store.create("a", b"2")
    second = store.replace("a", b"2", first)
    for name, version in (("a", first), ("absent", second)):
        with pytest.raises(Conflict):
            store.replace(name, b"3", version)
    stored = store.read("a")
    assert stored is not None and stored.content == b"2" and 0 <= stored.age_seconds <= 2


@pytest.mark.slow
def test_store_without_conditional_writes_is_refused(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def overwrite(store: ObjectStore, name: str, content: bytes) -> str:
        return store._put(name, content)

    monkeypatch.setattr(ObjectStore, "create", overwrite)
    for _ in range(2):
        with pytest.raises(ConfigurationError, match="ignores conditional writes"):
            RemoteWorkspace(uri).read_run("r")


@pytest.mark.slow
def test_commands_end_with_their_exit_codes(uri: str, nobody: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def nasline(*arguments: str) -> tuple[int, str]:
        command = [sys.executable, "-m", "pipeline_tasks", *arguments]
        result = subprocess.run(command, capture_output=True, text=True)
        assert "Traceback" not in result.stdout + result.stderr
        return result.returncode, result.stdout

    code, output = nasline("validate_data", "--workspace", uri, "--run", "r1")
    assert code == 2 and f"run 'r1' does not exist in workspace {uri}" in output
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{nobody}")
    code, output = nasline("validate_data", "--workspace", uri, "--run", "r1")
    assert code == 69 and output.count("does not answer") == 1


FAKETIME = next(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"), None)


@pytest.mark.slow
@pytest.mark.parametrize("offset", ["-2h", "+30d"])
def test_a_clock_that_is_off_is_named_and_worth_another_try(uri: str, offset: str) -> None:
    assert FAKETIME is not None, "libfaketime is missing; apt-get install faketime"
    program = (
        "import sys\nfrom pipeline_tasks.errors import UnavailableError\nfrom pipeline_tasks.store import ObjectStore\n"
        "try: ObjectStore(sys.argv[1]).read('x')\nexcept UnavailableError as error: print(error)"
    )
    environment = {**os.environ, "LD_PRELOAD": str(FAKETIME), "FAKETIME": offset}
    done = subprocess.run([sys.executable, "-c", program, uri], capture_output=True, text=True, env=environment)
    assert done.stdout.startswith("the clock of this machine is too far from that of http://"), done.stderr
