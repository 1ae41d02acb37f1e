"""A few requests to Airflow's REST API, as the user that the environment names; plain standard library.

Environment: NASLINE_AIRFLOW_URL; NASLINE_AIRFLOW_TOKEN, or NASLINE_AIRFLOW_USER and NASLINE_AIRFLOW_PASSWORD. Token and
password may stand in a file instead, NASLINE_AIRFLOW_TOKEN_FILE and NASLINE_AIRFLOW_PASSWORD_FILE. None of the secrets
is ever told: neither in a log, nor to another host that a redirect names.
"""

from __future__ import annotations

import json
import os
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from typing import Any, NoReturn
from urllib.error import HTTPError
from urllib.parse import urlsplit

from pipeline_tasks.errors import ConfigurationError, UnavailableError

URL, USER = "NASLINE_AIRFLOW_URL", "NASLINE_AIRFLOW_USER"
TOKEN, PASSWORD = "NASLINE_AIRFLOW_TOKEN", "NASLINE_AIRFLOW_PASSWORD"
SECONDS = 60.0
LARGEST_ANSWER = 64 * 2**20


class AirflowRest:
    """Airflow's API at NASLINE_AIRFLOW_URL; logs in at the first request.

    Raises:
        ConfigurationError: the address or what is needed to log in is missing or unusable.
    """

    def __init__(self, environment: Mapping[str, str] = os.environ) -> None:
        self.address = _address(environment)
        self._environment = environment
        self._token = _secret(TOKEN, environment)
        if not self._token and not (environment.get(USER) and _secret(PASSWORD, environment)):
            raise ConfigurationError(
                f"{URL} is set, but nothing to log in with; set {TOKEN}, or {USER} and {PASSWORD} (or {TOKEN}_FILE, "
                f"{PASSWORD}_FILE)"
            )

    def call(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        """One request below /api/v2.

        Raises:
            UnavailableError: Airflow cannot be reached, or is in trouble itself.
            ConfigurationError: it refused the request, or what answers is no Airflow.
        """
        self._token = self._token or self._log_in()
        return self._request(method, f"/api/v2{path}", body, {"Authorization": f"Bearer {self._token}"})

    def _log_in(self) -> str:
        login = {"username": self._environment[USER], "password": _secret(PASSWORD, self._environment)}
        answer = self._request("POST", "/auth/token", login, {})
        token = answer.get("access_token") if isinstance(answer, dict) else None
        if not isinstance(token, str):
            raise ConfigurationError(f"{self.address} gave no token to {USER}; is it Airflow 3? ({URL})")
        return token

    def _request(self, method: str, path: str, body: dict[str, Any] | None, headers: dict[str, str]) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            self.address + path, data, {"Content-Type": "application/json", **headers}, method=method
        )
        try:
            with _OPENER.open(request, timeout=SECONDS) as response:
                return json.loads(response.read(LARGEST_ANSWER) or b"null")
        except HTTPError as error:
            with error:
                self._refused(error, method, path)
        except ValueError:  # no JSON
            raise ConfigurationError(f"{self.address} does not answer as Airflow does; check {URL}") from None
        except TimeoutError:
            raise UnavailableError(f"Airflow at {self.address} gave no answer within {SECONDS:g} s") from None
        except (OSError, HTTPException) as error:
            reason = getattr(error, "reason", None) or type(error).__name__
            raise UnavailableError(f"Airflow at {self.address} cannot be reached: {reason}") from None

    def _refused(self, error: HTTPError, method: str, path: str) -> NoReturn:
        where = f"Airflow at {self.address}"
        if error.code >= 500 or error.code == 429:
            raise UnavailableError(f"{where} cannot answer now ({error.code} to {method} {path})") from None
        if error.code in (401, 403):
            who = TOKEN if _secret(TOKEN, self._environment) else f"the user of {USER}"
            raise ConfigurationError(
                f"{where} refused {who} ({error.code} to {method} {path}); check the secret and the role"
            ) from None
        if 300 <= error.code < 400:
            raise ConfigurationError(f"{where} sends to another address; put the final one into {URL}") from None
        raise ConfigurationError(f"{where} refused {method} {path} ({error.code}); is it Airflow 3?") from None


@contextmanager
def understood(airflow: AirflowRest) -> Iterator[None]:
    """Answers without the fields that are looked for: `ConfigurationError`, since it is no Airflow 3."""
    try:
        yield
    except (KeyError, TypeError, AttributeError):
        raise ConfigurationError(f"{airflow.address} does not answer as Airflow 3 does; check {URL}") from None


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect could take the token to another host, and makes a GET of a POST."""

    def redirect_request(self, *_: Any) -> None:
        """Refuse: the answer comes back as an `HTTPError`."""


_OPENER = urllib.request.build_opener(_NoRedirect)


def _address(environment: Mapping[str, str]) -> str:
    given = environment.get(URL, "").strip().rstrip("/")
    try:
        parts = urlsplit(given)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        usable = False
    if not usable or parts.query or parts.fragment:
        raise ConfigurationError(f"{URL} must be the address of Airflow, such as http://127.0.0.1:8080")
    if parts.username or parts.password:
        raise ConfigurationError(f"{URL} must hold no user or password; set {USER} and {PASSWORD}")
    return given


def _secret(name: str, environment: Mapping[str, str]) -> str:
    """From the variable, else from the file that NAME_FILE names."""
    file = environment.get(f"{name}_FILE")
    if environment.get(name) or not file:
        return environment.get(name, "").strip()
    try:
        return Path(file).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no text"
        raise ConfigurationError(f"{name}_FILE {file} cannot be read: {reason}") from None
