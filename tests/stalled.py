"""A way to PostgreSQL that goes silent after so many bytes, as of a process or a host that is stopped there."""

import contextlib
import socket
import threading
from collections.abc import Iterator
from types import TracebackType
from typing import Self
from urllib.parse import urlsplit, urlunsplit


class StalledWay:
    """Forward one connection after the other, until their bytes to the server are `limit` in all; then nothing more.

    What is open stays open, in both directions. One that the server closes is closed.

    Attributes:
        deaf: Once it is set, nothing that comes from the server is read any more.
        url: The database's, this way, without TLS.
        sent: All that went to the server.
    """

    def __init__(self, url: str, limit: int | None = None) -> None:
        self.deaf, self._closed = threading.Event(), threading.Event()
        parts = urlsplit(url)
        self._server = (str(parts.hostname), int(parts.port or 5432))
        self._limit = limit
        self._listening = socket.create_server(("127.0.0.1", 0))
        self._open: list[socket.socket] = [self._listening]
        self.sent = bytearray()
        there = f"{parts.username}@127.0.0.1:{self._listening.getsockname()[1]}"
        self.url = urlunsplit(parts._replace(netloc=there, query="sslmode=disable&gssencmode=disable"))

    def __enter__(self) -> Self:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close all of it: whoever still waits hears of it."""
        self._closed.set()
        for each in self._open:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()

    @property
    def silent(self) -> bool:
        """Whether it has come to that."""
        return self._limit is not None and len(self.sent) >= self._limit

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listening.accept()
                server = socket.create_connection(self._server)
                self._open += (client, server)
                for source, to in ((client, server), (server, client)):
                    threading.Thread(target=self._forward, args=(source, to, to is server), daemon=True).start()

    def _forward(self, source: socket.socket, to: socket.socket, counted: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                if not counted and self.deaf.is_set():
                    self._closed.wait()
                if counted:
                    data = data[: None if self._limit is None else max(0, self._limit - len(self.sent))]
                    self.sent += data
                    to.sendall(data)
                elif not self.silent:
                    to.sendall(data)
            if not counted:  # the server has ended it
                to.shutdown(socket.SHUT_RDWR)


def message_ends(sent: bytes) -> Iterator[int]:
    """Where each message of a connection's frontend ends (PostgreSQL's documentation, "Message Formats")."""
    end = int.from_bytes(sent[:4])  # the first has no byte for its kind
    yield end
    while end < len(sent):
        end += 1 + int.from_bytes(sent[end + 1 : end + 5])
        yield end
