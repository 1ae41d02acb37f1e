"""A few words to the people who run Nasline, when nobody is looking: to a webhook and by e-mail, where configured.

Plain standard library: Airflow's own processes import it. A message that cannot be sent is a line in the log and never
the end of what it was about; the webhook's address is a secret, so only its host is ever told.
"""

from __future__ import annotations

import json
import logging
import os
import smtplib
import urllib.request
from collections.abc import Mapping
from email.message import EmailMessage
from http.client import HTTPException
from typing import Any
from urllib.parse import urlsplit

log = logging.getLogger(__name__)

WEBHOOK, EMAIL, SENDER = "NASLINE_ALERT_WEBHOOK", "NASLINE_ALERT_EMAIL", "NASLINE_ALERT_FROM"
SMTP, SMTP_USER, SMTP_PASSWORD = "NASLINE_SMTP", "NASLINE_SMTP_USER", "NASLINE_SMTP_PASSWORD"
SECONDS = 10.0


def send(subject: str, lines: list[str], environment: Mapping[str, str] = os.environ) -> list[str]:
    """Send a message everywhere that is configured; returns the places that took it.

    Environment: NASLINE_ALERT_WEBHOOK, an address that takes `{"text": ...}` as JSON (Slack, Mattermost, Teams and
    most others do); NASLINE_ALERT_EMAIL, addresses with commas between, by NASLINE_SMTP (`HOST:PORT`, default
    localhost:25; with NASLINE_SMTP_USER and NASLINE_SMTP_PASSWORD over STARTTLS) from NASLINE_ALERT_FROM.
    """
    took = []
    for name, deliver in ((WEBHOOK, _post), (EMAIL, _mail)):
        if not environment.get(name):
            continue
        try:
            took.append(deliver(subject, lines, environment))
        except (OSError, ValueError, smtplib.SMTPException, HTTPException) as error:
            log.warning("the alert %r was not sent (%s): %s", subject, name, _without_address(error, environment))
    return took


def _post(subject: str, lines: list[str], environment: Mapping[str, str]) -> str:
    address = environment[WEBHOOK]
    if urlsplit(address).scheme not in ("http", "https"):
        raise ValueError(f"{WEBHOOK} must be an http or https address")
    body = json.dumps({"text": "\n".join([f"*{subject}*", *lines])}).encode()
    request = urllib.request.Request(address, body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=SECONDS):
        return f"webhook at {urlsplit(address).hostname}"


def _mail(subject: str, lines: list[str], environment: Mapping[str, str]) -> str:
    message = EmailMessage()
    message["Subject"] = " ".join(f"[nasline] {subject}".split())
    message["To"] = environment[EMAIL]
    message["From"] = environment.get(SENDER, "nasline@localhost")
    message.set_content("\n".join(lines) + "\n")
    host, _, port = environment.get(SMTP, "localhost:25").partition(":")
    with smtplib.SMTP(host, int(port or 25), timeout=SECONDS) as server:
        if environment.get(SMTP_USER):
            server.starttls()
            server.login(environment[SMTP_USER], environment.get(SMTP_PASSWORD, ""))
        server.send_message(message)
    return f"e-mail to {environment[EMAIL]}"


def _without_address(error: Exception, environment: Mapping[str, str]) -> str:
    if isinstance(error, HTTPException):  # it may hold a part of the address
        return type(error).__name__
    text = " ".join(str(error).split())
    for secret in (environment.get(WEBHOOK), environment.get(SMTP_PASSWORD)):
        text = text.replace(secret, "...") if secret else text
    return text


async def deadline_missed(context: Mapping[str, Any]) -> None:
    """What Airflow's triggerer calls when a run has not ended by its deadline."""
    run = context.get("dag_run", {})
    name = f"{run.get('dag_id', 'a DAG')} {run.get('dag_run_id') or run.get('run_id', '')}".strip()
    send(f"{name} has not ended by its deadline", ["It goes on; look at it in Airflow."])
