"""Objects in an S3 bucket: each is whole or absent, and may be written on the condition that nobody was faster.

Credentials, region and endpoint come from AWS's own chain (environment, profile, role; AWS_ENDPOINT_URL for any other
S3 server), as do the number of tries (AWS_MAX_ATTEMPTS) and the certificates. Nothing of it is logged.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from pipeline_tasks.errors import ConfigurationError, StepError, UnavailableError, UsageError

log = logging.getLogger(__name__)

Item = TypeVar("Item")

ADDRESS = re.compile(r"s3://([a-z0-9][a-z0-9.-]{1,61}[a-z0-9])(?:/(.*))?")
FILES_AT_ONCE = 4
PARTS_AT_ONCE = 4
"""Of one large file; FILES_AT_ONCE * PARTS_AT_ONCE connections at most."""

_CHANGED_MEANWHILE = {"PreconditionFailed", "ConditionalRequestConflict"}
_MISSING = {"NoSuchKey", "404"}
_REFUSED = {
    "403", "AccessDenied", "AuthFailure", "ExpiredToken", "InvalidAccessKeyId", "InvalidToken", "SignatureDoesNotMatch"
}  # fmt: skip
_CLOCKS_DIFFER = "RequestTimeTooSkewed"
_DAMAGED = {"BadDigest", "XAmzContentChecksumMismatch", "XAmzContentSHA256Mismatch"}
_BUSY = {"RequestTimeout", "SlowDown", "Throttling", "TooManyRequests"}


class Conflict(Exception):
    """A conditional write was refused, because the object is not what the writer expected."""


class MissingObject(Exception):
    """There is no object of that name."""


@dataclass(frozen=True)
class StoredObject:
    """A small object, read whole."""

    content: bytes
    version: str
    """Its ETag."""
    age_seconds: float
    """Time since it was written, by the store's own clock (full seconds): clocks of machines may differ."""


class ObjectStore:
    """The objects below `s3://bucket/prefix`; names are relative to it.

    Every method raises UnavailableError when the store does not answer, and ConfigurationError when it refuses.
    """

    def __init__(self, uri: str) -> None:
        match = ADDRESS.fullmatch(uri)
        if not match:
            raise UsageError(f"{uri!r} is no S3 address; write s3://BUCKET/PREFIX")
        self.bucket = match[1]
        self._prefix = (match[2] or "").strip("/")
        self.uri = f"s3://{self.bucket}/{self._prefix}".rstrip("/")

    def address(self, name: str) -> str:
        """Full address of an object, for messages."""
        return f"{self.uri}/{name}"

    # small objects --------------------------------------------------------------------------------------

    def read(self, name: str) -> StoredObject | None:
        """An object's content and version, None when it does not exist."""
        try:
            with self._errors():
                answer = self._client.get_object(Bucket=self.bucket, Key=self._key(name))
                content: bytes = answer["Body"].read()
        except MissingObject:
            return None
        now = answer["ResponseMetadata"]["HTTPHeaders"].get("date")
        written = answer["LastModified"]
        age = (parsedate_to_datetime(now) - written).total_seconds() if now else 0.0
        return StoredObject(content, answer["ETag"], age)

    def read_version(self, name: str, version: str) -> tuple[bytes, bool]:
        """An object's content, if it still has this ETag (without quotes), and whether that can be the content's MD5:
        it never is where the store encrypts with a key of its own service (SSE-KMS).

        Raises:
            MissingObject: there is none.
            Conflict: it has another one.
        """
        with self._errors():
            answer = self._client.get_object(Bucket=self.bucket, Key=self._key(name), IfMatch=f'"{version}"')
            content: bytes = answer["Body"].read()
        return content, answer.get("ServerSideEncryption", "AES256") == "AES256"

    def write(self, name: str, content: bytes) -> None:
        """Write an object, whatever was there."""
        self._put(name, content)

    def create(self, name: str, content: bytes) -> str:
        """Write an object that does not exist yet. Returns its version.

        Raises:
            Conflict: it exists.
        """
        return self._put(name, content, IfNoneMatch="*")

    def replace(self, name: str, content: bytes, version: str) -> str:
        """Write an object that still has the given version. Returns the new one.

        Raises:
            Conflict: it has another version, or is gone.
        """
        try:
            return self._put(name, content, IfMatch=version)
        except MissingObject:
            raise Conflict(name) from None

    def _put(self, name: str, content: bytes, **condition: str) -> str:
        with self._errors():
            answer = self._client.put_object(Bucket=self.bucket, Key=self._key(name), Body=content, **condition)
        return str(answer["ETag"])

    # files ----------------------------------------------------------------------------------------------

    def upload(self, name: str, path: Path) -> None:
        """Write a file as an object; the store compares SHA-256 digests of what it received."""
        with self._errors(), path.open("rb") as file:
            self._client.upload_fileobj(
                file, self.bucket, self._key(name), ExtraArgs={"ChecksumAlgorithm": "SHA256"}, Config=_transfer_config()
            )

    def download(self, name: str, path: Path) -> None:
        """Write an object to a file.

        Raises:
            MissingObject: there is none.
        """
        with self._errors():
            self._client.download_file(self.bucket, self._key(name), str(path), Config=_transfer_config())

    def sizes(self, prefix: str) -> dict[str, int]:
        """Names that begin with `prefix`, and their sizes in bytes."""
        begin = len(self._key(""))
        found: dict[str, int] = {}
        with self._errors():
            pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=self._key(prefix))
            for page in pages:
                found.update({entry["Key"][begin:]: entry["Size"] for entry in page.get("Contents", [])})
        return found

    def versions(self, prefix: str) -> Iterator[tuple[str, int, str]]:
        """Names that begin with `prefix`, their sizes in bytes and ETags (without quotes)."""
        begin = len(self._key(""))
        with self._errors():
            pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=self._key(prefix))
            for page in pages:
                for entry in page.get("Contents", []):
                    yield entry["Key"][begin:], int(entry["Size"]), str(entry["ETag"]).strip('"')

    def delete(self, names: Iterable[str]) -> None:
        """Delete objects; those that do not exist are fine."""
        keys = [{"Key": self._key(name)} for name in names]
        for start in range(0, len(keys), 1000):
            with self._errors():
                batch = {"Objects": keys[start : start + 1000], "Quiet": True}
                self._client.delete_objects(Bucket=self.bucket, Delete=batch)

    # connection -----------------------------------------------------------------------------------------

    def require_conditional_writes(self, marker: str) -> None:
        """Make sure that the store answers, and that it keeps the promise everything here rests on.

        Args:
            marker: Name of an object that is created once, when the store has shown that it refuses a second one.

        Raises:
            ConfigurationError: it overwrites an object that was to be written only if absent.
        """
        if self.read(marker) is not None:
            return
        try:
            for _ in range(2):
                self.create(marker, b"{}\n")
        except Conflict:
            return
        self.delete([marker])
        raise ConfigurationError(
            f"the object store at {self.endpoint} ignores conditional writes (If-None-Match), so two machines could "
            "overwrite each other; use a store that has them, or a workspace folder"
        )

    @property
    def endpoint(self) -> str:
        """Address of the server, without a user's name or password."""
        parts = urlsplit(str(self._client.meta.endpoint_url))
        return f"{parts.scheme}://{parts.netloc.rsplit('@', 1)[-1]}"

    @cached_property
    def _client(self) -> Any:
        try:
            import boto3
            from botocore.config import Config
            from botocore.exceptions import BotoCoreError
        except ModuleNotFoundError as error:
            raise ConfigurationError(
                f"an S3 workspace needs the package {error.name}; install it with `pip install 'nasline[pipeline]'`"
            ) from None
        elsewhere = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        config = Config(
            connect_timeout=10,
            read_timeout=60,
            max_pool_connections=FILES_AT_ONCE * PARTS_AT_ONCE + 2,
            retries={"mode": "standard"},
            s3={"addressing_style": "path" if elsewhere else "auto"},
        )
        try:
            return boto3.session.Session().client("s3", config=config)
        except (BotoCoreError, ValueError) as error:
            raise ConfigurationError(
                f"the settings for {self.uri} cannot be used ({_reason(error)}); correct AWS_ENDPOINT_URL, AWS_PROFILE "
                "and AWS_DEFAULT_REGION"
            ) from None

    def _key(self, name: str) -> str:
        return f"{self._prefix}/{name}" if self._prefix else name

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """Turn what boto3 raises into one sentence for the user."""
        self._client  # noqa: B018  made first: it has errors of its own
        from boto3.exceptions import RetriesExceededError
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            yield
        except ClientError as error:
            raise self._refusal(error.response) from None
        except (BotoCoreError, RetriesExceededError) as error:
            raise self._failure(error) from None

    def _refusal(self, response: dict[str, Any]) -> Exception:
        """The store answered with an error."""
        code = str(response.get("Error", {}).get("Code", ""))
        status = int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
        if code in _CHANGED_MEANWHILE:
            return Conflict(code)
        if code in _MISSING:
            return MissingObject(code)
        if code == "NoSuchBucket":
            return ConfigurationError(
                f"bucket {self.bucket!r} does not exist at {self.endpoint}; create it, or correct {self.uri}"
            )
        if code in _REFUSED:
            return ConfigurationError(
                f"{self.endpoint} refused the credentials for bucket {self.bucket!r} ({code}); set AWS_ACCESS_KEY_ID "
                "and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, to some that may read and write it"
            )
        if code == _CLOCKS_DIFFER:
            return UnavailableError(
                f"the clock of this machine is too far from that of {self.endpoint}, which refuses requests signed at "
                "another time; set this machine's clock, then run the step again"
            )
        if code in _DAMAGED:
            return self._damaged(code)
        if status >= 500 or code in _BUSY:
            return self._away(f"{code}, status {status}")
        text = _reason(response.get("Error", {}).get("Message", ""))
        return ConfigurationError(f"{self.endpoint} refused a request for {self.uri}: {code} {text}".rstrip())

    def _failure(self, error: Exception) -> StepError:
        """There was no answer, or no request could be made."""
        from boto3.exceptions import RetriesExceededError
        from botocore import exceptions as known

        if isinstance(error, known.ChecksumError | known.FlexibleChecksumError):
            return self._damaged(type(error).__name__)
        away = (known.ConnectionError, known.HTTPClientError, known.IncompleteReadError, RetriesExceededError)
        if isinstance(error, away):
            return self._away(type(error).__name__)
        name = type(error).__name__  # the text of such an error may quote what a credential program printed
        return ConfigurationError(
            f"no usable AWS credentials or settings for {self.uri} ({name}); set AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
        )

    def _damaged(self, why: str) -> UnavailableError:
        return UnavailableError(
            f"what went between this machine and the object store at {self.endpoint} arrived damaged ({why}); nothing "
            "of it was used: look at the network between them, then run the step again"
        )

    def _away(self, why: str) -> UnavailableError:
        return UnavailableError(
            f"the object store at {self.endpoint} does not answer ({why}); start it or correct AWS_ENDPOINT_URL, "
            "then run the step again"
        )


def in_parallel(function: Callable[[Item], None], items: Iterable[Item]) -> None:
    """Call a function for some files at once; the first error ends it, and what has not begun is left."""
    pool = ThreadPoolExecutor(FILES_AT_ONCE)
    try:
        for _ in pool.map(function, items):
            pass
    finally:
        pool.shutdown(cancel_futures=True)


def _transfer_config() -> Any:
    from boto3.s3.transfer import TransferConfig

    return TransferConfig(max_concurrency=PARTS_AT_ONCE)


def _reason(text: object) -> str:
    return " ".join(str(text).split())[:200]
