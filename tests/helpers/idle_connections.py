"""More idle connections to a page than it holds at a time."""

from __future__ import annotations

import socket
import urllib.request
from contextlib import suppress


def assert_room_is_made(port: int, url: str, count: int) -> None:
    """The page answers beside ``count`` idle connections, of which it has closed the first."""
    idle = [socket.create_connection(("127.0.0.1", port)) for _ in range(count)]
    with urllib.request.urlopen(url, timeout=10) as answer:
        assert answer.status == 200
    idle[0].settimeout(10)
    with suppress(ConnectionError):
        assert idle[0].recv(1) == b""  # it has made room
    for connection in idle:
        connection.close()
