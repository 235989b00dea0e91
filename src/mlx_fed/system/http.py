"""An HTTP server that runs in a thread of this process, for as long as a context lasts."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn


def listening(host: str, port: int) -> socket.socket:
    """A socket at which connections may come, on IPv4 or IPv6.

    Raises:
        OSError: If the port is taken, or the host is none of this machine's.
    """
    opened = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        opened.bind((host, port))
        opened.listen(1024)
    except OSError:
        opened.close()
        raise
    return opened


@contextmanager
def running(server: uvicorn.Server, listening: socket.socket, failed: Exception) -> Iterator[None]:
    """Serves from a thread; the context begins when the server has started.

    Args:
        server (uvicorn.Server): What is served, and how.
        listening (socket.socket): Where.
        failed (Exception): Raised if the server ends before it has started.
    """
    thread = threading.Thread(target=server.run, args=([listening],), daemon=True)
    thread.start()
    try:
        while not server.started:
            if not thread.is_alive():
                raise failed
            time.sleep(0.01)
        yield
    finally:
        server.should_exit = True
        thread.join()
