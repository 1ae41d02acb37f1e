"""Messages to a real webhook and a real mail server, and what happens when they cannot be sent."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from pipeline_tasks import notification


@pytest.fixture
def webhook() -> Iterator[tuple[str, list[dict[str, str]]]]:
    """An address with a secret path, and what was posted there."""
    posted: list[dict[str, str]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            posted.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200 if self.path == "/secret" else 500)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Silence."""

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/secret", posted
    server.shutdown()
    server.server_close()


def test_a_webhook_gets_the_text(webhook: tuple[str, list[dict[str, str]]]) -> None:
    address, posted = webhook
    took = notification.send("teach failed", ["image a.jpg is truncated"], {notification.WEBHOOK: address})
    assert took == ["webhook at 127.0.0.1"]
    assert posted == [{"text": "*teach failed*\nimage a.jpg is truncated"}]


def test_mail_is_sent_to_all() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        told: list[str] = []
        thread = threading.Thread(target=_answer_mail, args=(server, told))
        thread.start()
        environment = {
            notification.EMAIL: "ada@example.org, bob@example.org",
            notification.SMTP: f"127.0.0.1:{server.getsockname()[1]}",
        }
        took = notification.send("teach\nfailed", ["first line"], environment)
        thread.join(5)
    assert took == ["e-mail to ada@example.org, bob@example.org"], told
    text = "\n".join(told)
    assert "rcpt TO:<ada@example.org>" in text and "rcpt TO:<bob@example.org>" in text
    assert "Subject: [nasline] teach failed" in text and "first line" in text


def _answer_mail(server: socket.socket, told: list[str]) -> None:
    """As much SMTP as one message needs."""
    connection, _ = server.accept()
    with connection, connection.makefile("r", newline="\r\n") as lines:
        connection.sendall(b"220 test\r\n")
        in_message = False
        for line in lines:
            told.append(line.strip())
            if in_message and line.strip() != ".":
                continue
            in_message = line.lower().startswith("data")
            if line.lower().startswith("quit"):
                connection.sendall(b"221 bye\r\n")
                return
            connection.sendall(b"354 go on\r\n" if in_message else b"250 ok\r\n")


def test_what_cannot_be_sent_is_a_warning_without_the_secret(
    webhook: tuple[str, list[dict[str, str]]], caplog: pytest.LogCaptureFixture
) -> None:
    broken = webhook[0].replace("/secret", "/other-secret")
    for address in (broken, "file:///etc/passwd", "http://127.0.0.1:9/other-secret"):
        assert notification.send("x", [], {notification.WEBHOOK: address}) == []
    assert notification.send("x", [], {notification.WEBHOOK: "http://127.0.0.1:9/other secret"}) == []
    assert caplog.text.count("the alert 'x' was not sent (NASLINE_ALERT_WEBHOOK)") == 4
    assert "secret" not in caplog.text and "passwd" not in caplog.text


def test_nothing_is_sent_where_nothing_is_configured(caplog: pytest.LogCaptureFixture) -> None:
    assert notification.send("x", [], {}) == [] and caplog.text == ""


def test_a_missed_deadline_names_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[str] = []
    monkeypatch.setattr(notification, "send", lambda subject, lines: sent.append(subject))
    context = {"dag_run": {"dag_id": "train_yolo_nas", "dag_run_id": "manual__1"}}
    asyncio.run(notification.deadline_missed(context))
    assert sent == ["train_yolo_nas manual__1 has not ended by its deadline"]
