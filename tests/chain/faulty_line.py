"""A line to a server that a test can cut, slow down or let flip bits; what it carries goes through a real proxy."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from urllib.parse import urlsplit

CHUNK = 65536
BODY = 8192
"""A shorter piece may be a header; it passes unharmed."""


class FaultyLine:
    """A TCP proxy on a port of its own in front of a server.

    slow_seconds: waited before each piece, in both directions.
    corrupt: "download" or "upload": in that direction one bit of each long piece is flipped.
    """

    def __init__(self, address: str) -> None:
        parts = urlsplit(address)
        assert parts.hostname and parts.port
        self._server = (parts.hostname, parts.port)
        self.slow_seconds, self.corrupt = 0.0, ""
        self.flipped = 0
        self.pieces = 0
        self._open: set[socket.socket] = set()
        self._listener = self._listen(0)
        self._port = self._listener.getsockname()[1]
        self.address = f"http://127.0.0.1:{self._port}"

    def cut(self) -> None:
        """Nobody listens any more, and what was connected is broken off."""
        self._listener.shutdown(socket.SHUT_RDWR)  # wakes accept, which a close alone does not
        self._listener.close()
        for connection in list(self._open):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def mend(self) -> None:
        """Listen again, on the same port."""
        self._listener = self._listen(self._port)

    def _listen(self, port: int) -> socket.socket:
        listener = socket.create_server(("127.0.0.1", port))
        threading.Thread(target=self._accept, args=[listener], daemon=True).start()
        return listener

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            server = socket.create_connection(self._server)
            self._open |= {client, server}
            for source, target, direction in ((client, server, "upload"), (server, client, "download")):
                threading.Thread(target=self._carry, args=[source, target, direction], daemon=True).start()

    def _carry(self, source: socket.socket, target: socket.socket, direction: str) -> None:
        with contextlib.suppress(OSError):
            while piece := source.recv(CHUNK):
                time.sleep(self.slow_seconds)
                self.pieces += 1
                if direction == self.corrupt and len(piece) >= BODY:
                    middle = len(piece) // 2
                    piece = piece[:middle] + bytes([piece[middle] ^ 1]) + piece[middle + 1 :]
                    self.flipped += 1
                target.sendall(piece)
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            self._open.discard(end)
