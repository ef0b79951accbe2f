"""Ports that are ours before anything starts, so that the app can be told of them."""

import socket
from contextlib import suppress


def bound(port: int = 0) -> socket.socket:
    """A socket with this port of 127.0.0.1 (0: any that is free), that does not listen yet.

    Several may have the same port, of which one listens.
    """
    made = socket.socket()
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    with suppress(AttributeError, OSError):  # Linux can do without it; a BSD cannot
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    made.bind(("127.0.0.1", port))
    return made


def listening() -> socket.socket:
    """One that takes connections: they wait until somebody serves them."""
    made = socket.socket()
    made.bind(("127.0.0.1", 0))
    made.listen(256)
    return made
