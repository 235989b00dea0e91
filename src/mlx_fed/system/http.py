"""HTTP server in a thread of this process."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn


def listen(host: str, port: int) -> socket.socket:
    """A listening socket on IPv4 or IPv6.

    Raises:
        OSError: If the port is in use, or the host is no address of this machine.
    """
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(1024)
    except OSError:
        listener.close()
        raise
    return listener


def configuration(app: Any, **options: Any) -> uvicorn.Config:
    """uvicorn's settings for an ASGI app without logs, web sockets and a proxy's headers."""
    quiet: dict[str, Any] = {"log_level": "error", "access_log": False, "lifespan": "off"}
    bare: dict[str, Any] = {"ws": "none", "proxy_headers": False, "server_header": False}
    return uvicorn.Config(app, **quiet, **bare, **options)


@contextmanager
def serve_in_thread(
    server: uvicorn.Server, listener: socket.socket, error: Exception
) -> Iterator[None]:
    """Runs a server in a thread; the context begins when the server has started.

    Args:
        server (uvicorn.Server): The server.
        listener (socket.socket): A socket of :func:`listen`.
        error (Exception): Raised if the server ends before it has started.
    """
    thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
    thread.start()
    try:
        while not server.started:
            if not thread.is_alive():
                raise error
            time.sleep(0.01)
        yield
    finally:
        server.should_exit = True
        thread.join()
